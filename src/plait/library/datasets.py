"""`plait.prepare`: files, or what is held in memory, become a checked dataset."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.config import DataRecipe, Recipe, as_recipe
from plait.core.errors import PlaitError
from plait.core.files import cache_folder
from plait.core.progress import ProgressBar
from plait.data.cost import Cost
from plait.data.dataset import Dataset
from plait.data.memory import in_memory, write_source
from plait.data.prepare import changed_source
from plait.data.prepare import estimate as estimate_files
from plait.data.prepare import prepare as prepare_files
from plait.data.stores import location


def prepare(
    source: Any,
    out: str | Path,
    *,
    map: Mapping[str, str] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    pattern: str | None = None,
    group_by: str | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int | None = None,
    engine: str = "local",
    near_duplicates: bool = True,
    drop_near_duplicates: bool = False,
    replace: bool = False,
    into: bool = False,
    progress: bool | None = None,
) -> Dataset:
    """Check data and make a dataset of them: splits, counts, what was rejected and why.

    Args:
        source: a folder, an archive, a table, a text file, a URL, or `hf:NAME` of the Hugging Face hub; or what is held
            in memory: a `datasets.Dataset`, a pandas DataFrame, a list of dictionaries whose values are texts,
            numbers, PIL images, arrays of pixels, (waveform, rate), bytes or paths of media files; a dictionary of
            these by split.
        out: the dataset's folder, or a URL.
        map: what columns of a table are: `{"image": "photo", "text": "caption:text", "ignore": "a,b"}`.
        labels: names of integer classes: `{"label": ["cat", "dog"]}`.
        pattern: regular expression on file names whose named groups become text columns.
        group_by: what records have in common that share a split: a column (who speaks, which patient), which is then
            not learnt, a named group of the pattern, "folder", or "name:2" for the second part of files' names.
        recipe: map, labels, pattern and group_by are taken from it where they are left out.
        seed: of the split.
        workers: processes that decode media; as many as there are processors if left out, 0 for none.
        engine: "local", or "ray" for the workers of a Ray cluster, which read media by themselves.
        near_duplicates: look for records that are alike.
        drop_near_duplicates: leave out of train what val or test has too.
        replace: take the place of a dataset in `out` that was made from another source.
        into: add the source to the dataset in `out`, whose records stay as they are; new ids begin with the source's
            name. Nothing that is there is decoded again.
        progress: True for bars, or lines where there is no terminal; None for bars in terminals and notebooks alone.

    Returns:
        The dataset; `.report`, `.rejects`, `.to_pandas()` show it.

    Raises PlaitError where nothing can be read or written, or an option does not fit. Stopped at any moment, the same
    call goes on from there.
    """
    data_options = {"map": dict(map) if map else None, "pattern": pattern, "group_by": group_by}
    names = {column: list(values) for column, values in labels.items()} if labels else None
    data = as_recipe(recipe, {"data": {**data_options, "labels": names}}).data
    place = location(out)
    from_memory = in_memory(source)
    if from_memory:
        if isinstance(source, Dataset):
            raise PlaitError(f"{source.path} is prepared already.")
        source = _written(source, place)
    with ProgressBar(progress) as bar:
        prepare_files(
            source, place, column_map=data.map or None, labels=data.labels or None, pattern=data.pattern,
            recipe=data, seed=seed, workers=workers, engine=engine, near_duplicates=near_duplicates,
            drop_near_duplicates=drop_near_duplicates, replace=replace, into=into,
            group_by=data.group_by, progress=bar,
        )  # fmt: skip
    if from_memory:
        shutil.rmtree(source, ignore_errors=True)
    return Dataset.open(place)


def estimate(
    source: str | Path,
    *,
    map: Mapping[str, str] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    pattern: str | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    workers: int | None = None,
    near_duplicates: bool = True,
) -> Cost:
    """What `prepare` with these arguments will cost: time, disk and memory, from the first records. Nothing is kept.

    Raises PlaitError where nothing can be read, or an option does not fit.
    """
    names = {column: list(values) for column, values in labels.items()} if labels else None
    data = as_recipe(recipe, {"data": {"map": dict(map) if map else None, "pattern": pattern, "labels": names}}).data
    return estimate_files(
        source, column_map=data.map or None, labels=data.labels or None, pattern=data.pattern, workers=workers,
        near_duplicates=near_duplicates,
    )  # fmt: skip


def _written(source: Any, out: Path | str) -> Path:
    """What is held in memory as a folder of files beside the dataset."""
    name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    folder = out.parent / f".{out.name}.memory" if isinstance(out, Path) else cache_folder(f"memory-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        write_source(source, folder)
    except OSError as error:
        raise PlaitError(f"Cannot write {folder}: {error.strerror}. Free space or choose another folder.") from error
    return folder


def is_prepared(source: Any) -> bool:
    """Whether what `train` was given is a dataset already, and no files to prepare."""
    if isinstance(source, (str, Path)):
        place = location(source)
        return isinstance(place, str) or (place / "manifest.json").is_file()
    return isinstance(source, Dataset)


def open_or_prepare(
    source: Any, folder: Path, recipe: Recipe, bar: ProgressBar, allow_changes: bool, **options: Any
) -> Dataset:
    """A dataset from whatever `train` was given: one that is open or prepared, or data, which are prepared in `folder`
    unless they were before.

    Raises PlaitError where `folder` holds a dataset of other files, unless changes are allowed: then it is made anew.
    """
    if isinstance(source, Dataset):
        return source
    if is_prepared(source):
        if recipe.data != DataRecipe():
            bar.message(f"Note: {source} is prepared already, so the recipe's data section has no effect.")
        return Dataset.open(location(source))
    if not in_memory(source) and (folder / "manifest.json").is_file():
        dataset = Dataset.open(folder)
        difference = changed_source(source, dataset.manifest, folder)
        if difference is None:
            return dataset
        if not allow_changes:
            raise PlaitError(
                f"{folder} holds the data of another run: {difference}. Choose another folder with -o, or pass "
                "--allow-changes to prepare the files anew and go on with them."
            )
        options = {**options, "replace": True}
    prepared = prepare(source, folder, recipe=recipe, progress=bar.enabled, **options)
    bar.message(prepared.summary())
    return prepared
