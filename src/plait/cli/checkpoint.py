"""The commands that list and verify a run's checkpoints."""

from __future__ import annotations

import sys

import typer
from rich.table import Table

import plait
from plait.console import RunArgument, app, out, plain

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="List and verify the checkpoints of a run.\n\nExample: plait checkpoint verify runs/photos",
)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel="From files to a model")


@checkpoint_app.command("list")
def list_checkpoints(run: RunArgument) -> None:
    """Show the checkpoints of a run, the newest first.

    Example: plait checkpoint list runs/photos
    """
    table = Table("step", "", "MB", "validation", "state", box=None, header_style="bold")
    for row in plait.Run(run).checkpoints():
        losses = "  ".join(f"{name} {value:.3f}" for name, value in row["validation"].items())
        state = "[red]damaged[/red]" if row["wrong"] else "whole"
        table.add_row(str(row["step"]), " ".join(row["names"]), f"{row['bytes'] / 1e6:.1f}", plain(losses), state)
    out.print(table)


@checkpoint_app.command("verify")
def verify_checkpoints(run: RunArgument) -> None:
    """Compare every file of a run's checkpoints with its sha256; exit code 1 where one is damaged.

    Example: plait checkpoint verify runs/photos
    """
    damaged = 0
    for row in plait.Run(run).checkpoints():
        damaged += bool(row["wrong"])
        out.print(f"step {row['step']}: {'damaged' if row['wrong'] else 'whole'}")
        for line in row["wrong"]:
            out.print(f"  [red]{plain(line)}[/red]")
    if damaged:
        sys.exit(1)
