"""The command line: one function a command, and no logic of its own."""

from __future__ import annotations

import os
import sys

# A thread that waits for another must not spin while somebody else could use the processor; read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from plait.chat import commands as chatting
from plait.cli import evaluate as measuring
from plait.cli import recipes as offering
from plait.cli import serve as serving
from plait.cli import train as training
from plait.cli import use as using
from plait.cli.common import app, err, plain
from plait.explain import commands as explaining
from plait.plan import commands as foreseeing
from plait.recommend import commands as recommending
from plait.search import commands as searching
from plait.transfer import commands as transferring

# A file of commands is a panel of --help, in this order.
PANELS = {
    training.__name__: "From files to a model",
    offering.__name__: "From files to a model",
    measuring.__name__: "Measure",
    transferring.__name__: "Measure",
    using.__name__: "Use a model",
    searching.__name__: "Use a model",
    recommending.__name__: "Use a model",
    chatting.__name__: "Use a model",
    explaining.__name__: "Understand a model",
    serving.__name__: "Serve",
    foreseeing.__name__: "Check and foresee",
}
modules = list(PANELS)
app.registered_commands.sort(key=lambda command: modules.index(command.callback.__module__))
for command in app.registered_commands:
    command.rich_help_panel = PANELS[command.callback.__module__]


def main() -> None:
    """Run the command line; a user's mistake ends in one message and exit code 1."""
    from plait.core.errors import PlaitError, Terminated

    try:
        app()
    except PlaitError as error:
        err.quiet = False
        err.print(f"[red]plait:[/red] {plain(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("\nStopped.")
        sys.exit(130)
    except Terminated:
        sys.exit(143)
