"""The command that makes a dataset of files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import SeedOption, app, err, out, plain, show_manifest


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="A folder, archive or table, a URL, or hf:NAME of the Hugging Face hub.")
    ],
    out_folder: Annotated[str | None, typer.Option("-o", "--out", help="The dataset's folder, or a URL.")] = None,
    into: Annotated[
        str | None, typer.Option(help="Add to this dataset instead; what is there is not decoded again.")
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="What a column is: image=COL, audio=COL, text=COL, text=COL:NEWNAME, ignore=COL."),
    ] = None,
    several: Annotated[
        list[str] | None, typer.Option("--labels", help="A column that holds several labels a record: a|b, or a list.")
    ] = None,
    number: Annotated[list[str] | None, typer.Option(help="A column of numbers that is to be predicted.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Regular expression on file names; its named groups become text columns.")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Keep records of a COLUMN's value, a folder, or name:N (a part of the file's name) in a split."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Take map, labels and pattern from this recipe.")] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the workers of a Ray cluster decode; see docs/how-to/cluster.md.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode media; all cores if left out.")
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option(help="Look for records that are alike; see duplicates.jsonl.")
    ] = True,
    drop_near_duplicates: Annotated[
        bool, typer.Option("--drop-near-duplicates", help="Leave out of train what val or test has too.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it will cost of time, disk and memory, and do nothing.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Check files and make a dataset of them: splits, counts, what was rejected and why.

    Ctrl-C stops it, and the same command goes on from there.

    Example: plait prepare photos/ -o data/photos
    """
    entries = [*(map_ or []), *(f"labels={one}" for one in several or []), *(f"number={one}" for one in number or [])]
    columns = _column_map(entries)
    if estimate:
        out.print(plain(plait.estimate(source, map=columns, pattern=pattern, recipe=recipe, workers=workers,
                                       near_duplicates=near_duplicates).describe()))  # fmt: skip
        return
    if (out_folder is None) == (into is None):
        raise plait.PlaitError("Name either a new dataset with -o, or one to add to with --into.")
    place = into or out_folder or ""
    try:
        dataset = plait.prepare(
            source, place, map=columns, pattern=pattern, recipe=recipe, workers=workers, engine=engine, seed=seed,
            near_duplicates=near_duplicates, drop_near_duplicates=drop_near_duplicates, into=into is not None,
            group_by=group_by, progress=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        err.print("\nStopped. What is done is kept; the same command goes on from here.")
        raise
    show_manifest(dataset.manifest, place)
    if dataset.manifest.counts.get("train"):
        out.print(f"Next: plait train {place} -o runs/{Path(place).name}")
    else:
        out.print(f"There is nothing to train on. Next: plait evaluate RUN --data {place}")


def _column_map(entries: list[str] | None) -> dict[str, str] | None:
    """Each KIND=COLUMN as an entry; columns of one kind are joined by commas."""
    columns: dict[str, str] = {}
    for entry in entries or []:
        kind, _, column = entry.partition("=")
        columns[kind] = f"{columns[kind]},{column}" if kind in columns else column
    return columns or None
