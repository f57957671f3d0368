"""The command line: one function a command, and no logic of its own."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.models import CommandInfo

# A thread that waits for another must not spin while somebody else could use the processor; read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from plait.cli import (
    checkpoint,
    classify,
    decide,
    demo,
    describe,
    doctor,
    draw,
    embed,
    evaluate,
    example,
    export,
    generate,
    key,
    mcp,
    models,
    prepare,
    recipes,
    serve,
    sizes,
    speak,
    studio,
    train,
    transcribe,
)
from plait.cli.suggestions import SuggestingCommand
from plait.console import app, err, plain
from plait.core import dist
from plait.core.features import features

# A heading of `plait --help` -> the modules whose commands stand under it, before those of features.
PANELS = {
    "From files to a model": (example, prepare, train, recipes, checkpoint),
    "Measure": (evaluate, demo),
    "Use a model": (generate, classify, decide, describe, transcribe, draw, speak, embed, export),
    "Understand a model": (),
    "Serve": (studio, serve, mcp, key),
    "Check and foresee": (doctor, sizes, models),
}


def _arrange_commands() -> None:
    """Import the features' commands, and put all commands under their headings, in the order of `PANELS`."""
    panels = {module.__name__: panel for panel, modules in PANELS.items() for module in modules}
    for feature in features():
        if feature.commands is not None:
            importlib.import_module(feature.commands)
            panels[feature.commands] = feature.panel
    headings, modules = list(PANELS), list(panels)

    def place(command: CommandInfo) -> tuple[int, int]:
        module = getattr(command.callback, "__module__", "")
        return headings.index(panels[module]), modules.index(module)

    app.registered_commands.sort(key=place)
    for command in app.registered_commands:
        command.rich_help_panel = panels[getattr(command.callback, "__module__", "")]
        command.cls = SuggestingCommand


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plait {dist.VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One model that reads and writes text, images and audio from your own files."""


_arrange_commands()


def _expanded(argument: str) -> str:
    """`--out=~/data` with the user's home in place of `~`, as the shell puts it where a space stands before."""
    option, equals, value = argument.partition("=")
    tilde = equals and option.startswith("--") and (value == "~" or value.startswith("~/"))
    return f"{option}={Path(value).expanduser()}" if tilde else argument


def main() -> None:
    """Run the command line; a user's mistake ends in one message and exit code 1."""
    from plait.core import isa
    from plait.core.errors import PlaitError, Terminated, is_out_of_memory

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is shown as its code
            stream.reconfigure(errors="backslashreplace")
    try:
        isa.cap()
        sys.argv[1:] = map(_expanded, sys.argv[1:])
        app()
    except PlaitError as error:
        err.quiet = False
        err.print(f"[red]plait:[/red] {plain(str(error))}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        err.quiet = False
        err.print("[red]plait:[/red] The memory is used up. Close other programs, or choose a smaller --size.")
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("\nStopped.")
        sys.exit(130)
    except Terminated:
        sys.exit(143)
