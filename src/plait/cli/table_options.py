"""What the commands share that answer for whole folders and write a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.console import err, out, plain

if TYPE_CHECKING:
    from plait.inference.base import Model
    from plait.library.tables import TableQuery

OutOption = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="A table of all answers: .csv, .jsonl or .parquet. Stopped, it goes on."),
]
InputOption = Annotated[list[str] | None, typer.Option("--input", help="With -o: the column of a table that is read.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="With -o: replace a table that is there.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="With -o: processes that decode media; all cores if left out.")
]
XmpOption = Annotated[bool, typer.Option("--xmp", help="With -o: an XMP sidecar beside each image, too.")]


def write_table(
    model: Model, sources: list[str], table: Path, query: TableQuery, inputs: list[str] | None, overwrite: bool,
    workers: int | None,
) -> None:  # fmt: skip
    """`plait.tabulate`, and what to tell of it."""
    from plait.library.tables import tabulate

    try:
        done = tabulate(
            model, list(sources), table, query, inputs=inputs, overwrite=overwrite, workers=workers, progress=True
        )
    except KeyboardInterrupt:
        err.print("\nStopped. What is answered is kept; the same command goes on from here.")
        raise
    again = f", {done.resumed} of them by an earlier call" if done.resumed else ""
    out.print(plain(f"{done.rows} row{'s' * (done.rows != 1)}{again}: {done.path}"))
    if done.failed:
        err.print(f"[yellow]Note:[/yellow] {done.failed} could not be answered; the column error says why.")
    if done.kept:
        err.print(f"[yellow]Note:[/yellow] {done.kept} sidecars of other programs were left as they are.")
