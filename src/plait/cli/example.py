"""The command example: small data to try every command on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from plait.console import app, out, plain


@app.command()
def example(
    kind: Annotated[str | None, typer.Argument(help="Which; left out, they are listed.")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("-o", "--out", help="A new folder; else one named by the kind.")
    ] = None,
) -> None:
    """Write small example data, to try the commands before you have files of your own.

    Example: plait example digits -o photos
    """
    from plait.data.examples import examples, write_example

    if kind is None:
        table = Table("example", "what", box=None, header_style="bold")
        for name, known in examples().items():
            table.add_row(name, plain(known.description))
        out.print(table)
        return
    folder = write_example(kind, out_folder or Path(kind))
    out.print(plain(f"Written: {folder}, {examples()[kind].description}."))
    out.print(plain(f"Next: plait train {folder} -o runs/{folder.name}"))
