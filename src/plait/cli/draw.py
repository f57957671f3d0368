"""The command that draws images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, SeedOption, app, out, write


@app.command()
def draw(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(help="What to draw; each text gets a row.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each; more than one make a contact sheet.")] = 1,
    best_of: Annotated[int | None, typer.Option(help="Draw so many for each, keep those nearest to the text.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A PNG file.")] = Path("drawing.png"),
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Draw images of texts.

    Example: plait draw runs/demo "three" -n 16 -o threes.png
    """
    from plait.search.contact_sheet import contact_sheet

    loaded = plait.load(model, device, precision)
    images = [p for text in texts for p in loaded.draw(text, n=n, best_of=best_of, guidance=guidance, seed=seed)]
    write(out_file, contact_sheet(images, n if len(texts) > 1 else None))
    out.print(f"{len(images)} drawn: {out_file}")
