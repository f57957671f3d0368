"""The command that names what is in an input."""

from __future__ import annotations

from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, note_windows, out, plain


@app.command()
def classify(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Images or recordings, folders of them, or texts.")],
    labels: Annotated[str | None, typer.Option(help="Choose between these, with commas.")] = None,
    column: Annotated[str | None, typer.Option(help="Answer in this text column.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 3,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Name what is in an image or a recording, with probabilities.

    Example: plait classify runs/demo runs/demo/files/images/0003.png
    """
    from plait.modalities.inputs import inputs_of

    loaded = plait.load(model, device, precision)
    wanted = [label.strip() for label in labels.split(",")] if labels else None
    for value in inputs_of(files).values:
        note_windows(loaded, value)
        ranked = loaded.classify_inputs([value], labels=wanted, column=column, top=top)[0]
        out.print(plain(f"{value}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in ranked)))
