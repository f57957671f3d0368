"""The command line: one function a command, and no logic of its own."""

from __future__ import annotations

import importlib
import os
import sys

# A thread that waits for another must not spin while somebody else could use the processor; read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from plait.cli import doctor, evaluate, recipes, serve, train, use
from plait.console import app, err, plain
from plait.core.features import features

PANELS = ("From files to a model", "Measure", "Use a model", "Understand a model", "Serve", "Check and foresee")


def _arrange_commands() -> None:
    """Import the features' commands, and put all commands under the panels of --help, in the order of `PANELS`."""
    panels = {
        train.__name__: "From files to a model",
        recipes.__name__: "From files to a model",
        evaluate.__name__: "Measure",
        use.__name__: "Use a model",
        serve.__name__: "Serve",
        doctor.__name__: "Check and foresee",
    }
    for feature in features():
        if feature.commands is not None:
            importlib.import_module(feature.commands)
            panels[feature.commands] = feature.panel
    for command in app.registered_commands:
        assert command.callback is not None
        command.rich_help_panel = panels[command.callback.__module__]
    modules = list(panels)
    app.registered_commands.sort(
        key=lambda command: (
            PANELS.index(str(command.rich_help_panel)),
            modules.index(getattr(command.callback, "__module__", "")),
        )
    )


_arrange_commands()


def main() -> None:
    """Run the command line; a user's mistake ends in one message and exit code 1."""
    from plait.core import isa
    from plait.core.errors import PlaitError, Terminated

    try:
        isa.cap()
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
