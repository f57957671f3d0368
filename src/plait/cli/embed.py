"""The command that embeds inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.cli.table_options import InputOption, OverwriteOption, WorkersOption, write_table
from plait.console import (
    DeviceOption,
    ModelArgument,
    PrecisionOption,
    app,
    note_windows,
    out,
    plain,
    write,
)


@app.command()
def embed(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(help="Texts, images, recordings; folders; tables.")],
    out_file: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="A .npy, .csv, .jsonl or .parquet file; else JSON lines."),
    ] = None,
    columns: InputOption = None,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Place texts, images and audio clips in one space.

    Example: plait embed runs/demo "three" runs/demo/files/images/0003.png
    """
    import io
    import json

    import numpy as np

    from plait.library.tables import FORMATS, TableQuery
    from plait.modalities.inputs import inputs_of

    loaded = plait.load(model, device, precision)
    if out_file is not None and out_file.suffix.lower() in FORMATS:
        write_table(loaded, inputs, out_file, TableQuery("embed"), columns, overwrite, workers)
        return
    values = inputs_of(inputs).values
    for value in values:
        note_windows(loaded, value)
    vectors = loaded.embed_inputs(values)
    if out_file is not None:
        array = io.BytesIO()
        np.save(array, vectors)
        write(out_file, array.getvalue())
        out.print(f"{vectors.shape[0]} vectors of {vectors.shape[1]}: {out_file}")
        return
    for name, vector in zip(map(str, values), vectors, strict=True):
        out.print(plain(json.dumps({"input": name, "embedding": [round(float(x), 6) for x in vector]})))
