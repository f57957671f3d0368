"""The command that writes a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import ModelArgument, app, out, plain


@app.command()
def export(
    model: ModelArgument,
    out_folder: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="folder, transformers, gguf, peft (LoRA alone), onnx, tflite, html (a page offline)."),
    ] = "transformers",
    adapter: Annotated[Path | None, typer.Option(help="A folder of an adapter to add to the weights first.")] = None,
    length: Annotated[int | None, typer.Option(help="Positions of a tflite graph; by itself 512 at most.")] = None,
) -> None:
    """Write a model for other machines and programs: a folder for plait; the text-and-codes backbone; and of a run that
    recognises images or audio, as onnx, the whole classifier, or of images, as html, a page that classifies offline.
    docs/how-to/export.md says what each form can do.

    Example: plait export runs/photos --to onnx -o classifier
    """
    exported = plait.export(
        model, out_folder, to=to, adapter=adapter, length=length, tell=lambda line: out.print(plain(line))
    )
    if exported.difference is not None:
        out.print(f"Compared: within {exported.difference:.1e} of ours")
    if exported.accuracy is not None:
        out.print(
            f"Measured: {exported.accuracy:.1%} of records of test are right by what was written, the network alone. "
            "The whole run's figure is that of plait evaluate."
        )
    out.print(f"Written: {exported.folder}")
