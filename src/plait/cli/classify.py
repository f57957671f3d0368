"""The command that names what is in an input."""

from __future__ import annotations

from typing import Annotated

import typer

import plait
from plait.cli.table_options import InputOption, OutOption, OverwriteOption, WorkersOption, XmpOption, write_table
from plait.console import DeviceOption, ModelArgument, PrecisionOption, app, note_windows, out, plain


@app.command()
def classify(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Images, recordings, texts; folders; tables.")],
    labels: Annotated[str | None, typer.Option(help="Choose between these, with commas.")] = None,
    column: Annotated[str | None, typer.Option(help="Answer in this text column.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 3,
    table: OutOption = None,
    inputs: InputOption = None,
    xmp: XmpOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Name what is in an image, a recording or a text, with probabilities; of a whole folder or table with -o.

    Example: plait classify runs/demo runs/demo/files/images/0003.png
    """
    from plait.library.tables import NONE_OF_THESE, TableQuery
    from plait.modalities.inputs import inputs_of

    loaded = plait.load(model, device, precision)
    label_list = [label.strip() for label in labels.split(",")] if labels else None
    if table is not None:
        query = TableQuery(
            "classify", column, tuple(label_list) if label_list else None, top, sidecar="xmp" if xmp else None
        )
        write_table(loaded, files, table, query, inputs, overwrite, workers)
        return
    for value in inputs_of(files).values:
        note_windows(loaded, value)
        if column in loaded.numbers or (column is None and loaded.numbers and not (loaded.labels or loaded.several)):
            number = loaded.estimate_inputs([value], column)[0]
            out.print(plain(f"{value}: {number.value:.4g} (9 of 10: {number.low:.4g} to {number.high:.4g})"))
            continue
        ranked = loaded.classify_inputs([value], labels=label_list, column=column, top=top)[0]
        if ranked.chosen is not None:
            out.print(plain(f"{value}: {', '.join(ranked.chosen) or 'none of the labels'}"))
            continue
        unlike = f"{NONE_OF_THESE}; the nearest: " if ranked.none_of_these else ""
        answers = ", ".join(f"{label} {probability:.3f}" for label, probability in ranked)
        out.print(plain(f"{value}: {unlike}{answers}"))
