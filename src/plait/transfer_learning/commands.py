"""The command that says where it pays to go on from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.console import DeviceOption, app, out, plain


@app.command()
def transfer(
    source: Annotated[str, typer.Argument(help="A trained run to go on from.")],
    dataset: Annotated[str, typer.Argument(help="A prepared dataset with a column of labels.")],
    study: Annotated[Path, typer.Option("-o", "--out", help="The study's folder.")],
    labels: Annotated[str, typer.Option(help="Training records a label, with commas; all for all.")] = "1,10,100,all",
    ways: Annotated[str, typer.Option(help="What is compared, with commas.")] = "scratch,frozen,lora,full",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="The time of each run.")] = None,
    steps: Annotated[int | None, typer.Option(help="The steps of each run, instead of minutes.")] = None,
    read: Annotated[str | None, typer.Option(help="The column that is read; the first medium if left out.")] = None,
    column: Annotated[str | None, typer.Option(help="The column of labels; the one with fewest if left out.")] = None,
    old: Annotated[str | None, typer.Option(help="The source's own data, by which forgetting is measured.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML file or a name of `plait recipes`; else the source's.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Test records, at most.")] = 1000,
    device: DeviceOption = "auto",
) -> None:
    """Compare beginning from nothing with going on from a trained model: frozen, low-rank, or all of it.

    The same command goes on where a study stopped.

    Example: plait transfer runs/fashion data/mnist -o runs/transfer --labels 1,10 --steps 200
    """
    from plait.transfer_learning.api import transfer as compare

    compared = compare(
        source, dataset, study, labels=_listed(labels), ways=_listed(ways), seeds=seeds, minutes=minutes, steps=steps,
        read=read, column=column, old=old, recipe=recipe, limit=limit, device=device, progress=True,
    )  # fmt: skip
    if compared.source_accuracy is not None:
        out.print(f"The source as it is, without any of these records: {compared.source_accuracy:.3f}")
    for line in compared.lines():
        out.print(plain(line))
    out.print(f"All figures: {study / 'study.json'}\nReport: {compared.report}")


def _listed(text: str) -> list[str]:
    """The parts of a text between commas."""
    return [part.strip() for part in text.split(",")]
