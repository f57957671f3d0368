"""The command that describes images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.cli.table_options import InputOption, OutOption, OverwriteOption, WorkersOption, XmpOption, write_table
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, existing, out, plain


@app.command(
    "caption",
    hidden=True,
    help="""The same as describe.

    Example: plait caption runs/demo runs/demo/files/images -o captions.csv
    """,
)
@app.command()
def describe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Images, or with -o folders of them.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    table: OutOption = None,
    inputs: InputOption = None,
    xmp: XmpOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Say in words what is in an image; of a whole folder with -o. `plait caption` is the same.

    Example: plait describe runs/demo runs/demo/files/images/0003.png --column zh
    """
    loaded = plait.load(model, device, precision)
    if table is not None:
        from plait.library.tables import TableQuery

        query = TableQuery("describe", column, sidecar="xmp" if xmp else None)
        write_table(loaded, [str(file) for file in files], table, query, inputs, overwrite, workers)
        return
    for file in files:
        out.print(plain(f"{file}: {loaded.describe(existing(file), column=column)}"))
