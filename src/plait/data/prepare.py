"""Files -> a dataset: every record checked, split, counted; what cannot be used is listed. The bytes that come out do
not depend on the number of processes, nor on how often the work was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from plait.core.config import DataRecipe
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import cache_folder, only_writer, publish_folder, read_json, sealed, write_json
from plait.core.system import processors
from plait.data import known
from plait.data.adding import grown_plan
from plait.data.cost import Cost, first_chunk_cost
from plait.data.dataset import Dataset, Manifest
from plait.data.files import Tree, scan
from plait.data.grouping import NameWatch, grouped_plan
from plait.data.readers import plan
from plait.data.staging import stage
from plait.data.stores import Location, check_writable, location, read_bytes, size, upload
from plait.data.writing import (
    Options,
    Progress,
    _last,
    source_name,
    source_stamp,
    write_dataset,
)

Writer = Callable[[Path, int, Progress], Manifest]  # a dataset into a folder, but for the manifest, which is returned


class DataKind(Protocol):
    """Data of a kind of its own, other than records of columns; a feature adds it."""

    def __call__(self, tree: Tree, recipe: DataRecipe) -> Writer | None:
        """What writes the dataset, where the source holds data of this kind; else None. `recipe` may have a section of
        the feature's."""
        ...


DATA_KINDS: ExtensionPoint[DataKind] = ExtensionPoint("data_kind")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    column_map: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
    pattern: str | None = None,
    recipe: DataRecipe | None = None,
    seed: int = 0,
    workers: int | None = None,
    engine: str = "local",
    near_duplicates: bool = True,
    drop_near_duplicates: bool = False,
    replace: bool = False,
    into: bool = False,
    group_by: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make a dataset in the folder `out` of what lies at `source`; returns its manifest.

    `source` is a path, a URL that fsspec reads, or `hf:NAME[:CONFIG]`, a data set of the Hugging Face hub; `out` may
    be a URL too. `column_map` says what a table's columns are, `{"image": "photo", "text": "caption:text", "ignore":
    "a,b"}` (see plait.data.tables). `labels` names integer classes: `{"label": ["cat", "dog"]}`. `pattern` is a regular
    expression whose named groups become text columns of media files. `recipe` has the sections of data of other
    kinds, which features add. `workers` are the processes that decode
    media (None: as many as there are processors; 0: none, in this process). `engine` is "local", or "ray" for the
    workers of a Ray cluster. `near_duplicates` looks for records that
    are alike, and `drop_near_duplicates` leaves those out of train that val or test have too. `into` adds the source to
    the dataset that is in `out`, whose records, splits and ids stay; new ids begin with the source's name.
    `group_by` names what records of a group have in common that share a split (see grouping.py).
    `progress(stage, done, total)` is called now and then.

    Media that a dataset in `out` holds already are not decoded again, whether the source is added to it or has grown.

    Stopped at any moment, it goes on where it was when it is called again: chunks that are done lie beside `out`, in
    `.NAME.partial`, until all are.
    Raises PlaitError where nothing can be read, nothing can be written or an option does not fit.
    """
    out = location(out)
    source = _local(source)
    if into:
        _check_into(source, out)
    else:
        _check_out(source, out, replace)
    options = Options(
        column_map, labels, pattern, recipe or DataRecipe(), seed, workers, near_duplicates or drop_near_duplicates,
        drop_near_duplicates, into, group_by, progress or (lambda *_: None), engine,
    )  # fmt: skip
    partial = _partial(out)
    with only_writer(partial):
        try:
            if isinstance(out, Path):
                with publish_folder(out) as folder:
                    manifest = _make(source, out, folder, partial, options)
            else:
                with publish_folder(partial / "out") as folder:
                    manifest = _make(source, out, folder, partial, options)
                upload(partial / "out", out, "manifest.json")
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            if not any(partial.glob("chunks/*.arrow")):
                shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _local(source: str | Path) -> Location:
    if isinstance(source, str) and source.startswith("hf:") and not source.startswith("hf://"):
        from plait.data.hub import download

        return download(source.removeprefix("hf:"))
    return location(source)


def _partial(out: Location) -> Path:
    """Where chunks lie until all are done: beside the dataset, or in the user's cache where that is far away."""
    if isinstance(out, Path):
        return out.parent / f".{out.name}.partial"
    return cache_folder(f"prepare-{hashlib.sha256(out.encode()).hexdigest()[:16]}")


def _check_out(source: Location, out: Location, replace: bool) -> None:
    if isinstance(source, Path):
        if not source.exists():
            hint = f" For a data set of the Hugging Face hub write hf:{source}." if len(source.parts) == 2 else ""
            raise PlaitError(f"{source} does not exist. Name a folder, a table, a text file or an archive.{hint}")
        inside = isinstance(out, Path) and source.resolve().is_relative_to(out.resolve())
    else:
        inside = isinstance(out, str) and f"{source.rstrip('/')}/".startswith(f"{out.rstrip('/')}/")
    if inside:
        raise PlaitError(f"The dataset would overwrite its source {source}. Choose another folder with -o.")
    if isinstance(out, str):
        try:
            manifest = (
                json.loads(read_bytes(f"{out}/manifest.json")) if size(f"{out}/manifest.json") is not None else None
            )
        except (OSError, ValueError) as error:
            raise PlaitError(f"{out} cannot be used: {error}. Choose another place with -o.") from error
        if manifest is None:
            check_writable(out)
            return
    else:
        if out.exists() and not out.is_dir():
            raise PlaitError(f"{out} is a file. Choose another folder with -o.")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not (out / "manifest.json").is_file() or not (out / "rejects.jsonl").is_file():
            raise PlaitError(f"{out} holds other files and is not a dataset. Choose another folder with -o.")
        manifest = read_json(out / "manifest.json")
    before = manifest.get("source") if isinstance(manifest, dict) else None
    if before != source_name(source) and not replace:
        raise PlaitError(f"{out} holds a dataset made from {before}. Choose another folder with -o, or delete it.")


def _check_into(source: Location, out: Location) -> None:
    """Raises PlaitError where nothing can be added to `out`, or the source is missing."""
    if not isinstance(out, Path):
        raise PlaitError(f"{out} is far away: add to a dataset in a folder of this machine, and copy that.")
    if isinstance(source, Path) and not source.exists():
        raise PlaitError(f"{source} does not exist. Name a folder, a table, a text file or an archive.")
    if isinstance(source, Path) and source.resolve().is_relative_to(out.resolve()):
        raise PlaitError(f"{source} lies in the dataset {out}. Name other files.")
    kind = Dataset.open(out).manifest.kind
    if kind != "records":
        raise PlaitError(f"{out} holds data of a kind of its own ({kind}), to which nothing can be added. Prepare all "
                         "files together.")  # fmt: skip


def changed_source(source: str | Path, manifest: Manifest, folder: Path) -> str | None:
    """How the files at `source` differ from those that a dataset in `folder` was made of, for people; None where they
    do not, as far as their names, sizes and times tell."""
    place = location(source)
    if isinstance(source, str) and source.startswith("hf:"):
        place = _local(source)
    if manifest.source != source_name(place):
        return f"it was made from {manifest.source}, not from {source_name(place)}"
    if manifest.source_stamp != source_stamp(place, folder):
        return f"files of {manifest.source} were added, removed or changed since"
    return None


def _make(source: Location, out: Location, folder: Path, partial: Path, options: Options) -> Manifest:
    scratch = partial / "unpacked"
    shutil.rmtree(scratch, ignore_errors=True)
    chunks = partial / "chunks"
    chunks.mkdir(exist_ok=True)
    for left in chunks.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    options.progress("look", 0, None)
    tree = scan(source, scratch, out)
    writer = None
    if not (options.column_map or options.labels or options.pattern or options.into or options.group_by):
        writer = next(filter(None, (kind(tree, options.recipe) for kind in DATA_KINDS.all())), None)
    if writer is not None:
        manifest = writer(folder, options.seed, options.progress)
        named = {"source": source_name(source), "source_stamp": source_stamp(source, out)}
        manifest = manifest.model_copy(update=named)
        write_json(folder / "manifest.json", sealed(manifest.model_dump()))
        return manifest
    source_plan = plan(tree, options.column_map, options.labels, options.pattern)
    group_by = options.group_by or (Dataset.open(out).manifest.group_by if options.into else None)
    names = NameWatch()
    if group_by is not None:
        source_plan = grouped_plan(source_plan, group_by)
    else:
        read_all = source_plan.read
        source_plan = dataclasses.replace(source_plan, read=lambda: names.watch(read_all()))
    if options.into:
        source_plan = grown_plan(Dataset.open(out), source_plan, _last(source))
    total = source_plan.split_counts.total()
    before = out / known.FILE if isinstance(out, Path) and (out / known.FILE).is_file() else None

    def told(done: int) -> None:
        options.progress("check", done, max(total, done) if total else None)

    paths = stage(
        source_plan.read(),
        chunks,
        options.seed,
        options.near,
        source_plan.chats,
        options.workers,
        told,
        before,
        options.engine,
    )
    if (hint := names.hint()) is not None:
        source_plan.warnings.append(hint)
    manifest = write_dataset(source, out, tree, source_plan, paths, folder, options)
    write_json(folder / "manifest.json", sealed(manifest.model_dump()))
    return manifest


def estimate(source: str | Path, **options: Any) -> Cost:
    """What `prepare` of a source will cost, from the first chunk of its records; nothing is kept.

    `options` are those of `prepare`. Raises PlaitError as it does.
    """
    place = _local(source)
    workers = options.get("workers")
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        tree = scan(place, Path(scratch) / "unpacked", Path(scratch))
        source_plan = plan(tree, options.get("column_map"), options.get("labels"), options.get("pattern"))
        near = options.get("near_duplicates", True)
        return first_chunk_cost(source_plan, Path(scratch), near, processors() if workers is None else workers)
