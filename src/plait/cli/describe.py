"""The command that describes images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, existing, out, plain


@app.command()
def describe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Images.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Say in words what is in an image.

    Example: plait describe runs/demo runs/demo/files/images/0003.png --column zh
    """
    loaded = plait.load(model, device, precision)
    for file in files:
        out.print(plain(f"{file}: {loaded.describe(existing(file), column=column)}"))
