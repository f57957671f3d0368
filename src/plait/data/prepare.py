"""Files -> a dataset: every record checked, split, counted; what cannot be used is listed. The bytes that come out do
not depend on the number of processes, nor on how often the work was interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plait.core.config import DataRecipe
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import cache_folder, only_writer, publish_folder, read_json, sealed, sha256_file, write_json
from plait.core.system import processors
from plait.data import known
from plait.data.adding import grown_plan
from plait.data.cost import Cost, first_chunk_cost
from plait.data.dataset import VERSION, Dataset, Manifest, Shard
from plait.data.duplicates import Duplicates, SplitPair, find_duplicates, first_of, list_equal
from plait.data.files import ARCHIVE_SUFFIXES, TABLE_SUFFIXES, Plan, Tree, scan, suffix_of
from plait.data.preview import Example, report
from plait.data.readers import plan
from plait.data.record import SPLITS, Rejected, rejected
from plait.data.shards import Shards, Statistics
from plait.data.staging import stage
from plait.data.stores import Location, check_writable, listing, location, read_bytes, size, upload
from plait.modalities.media import KINDS

_VAL_MOST = 5000  # records that become val where a source names other splits alone
_STRATIFIED = 5000  # records up to which each label is split by itself: beyond, a hash does as well, and stays put
_LABEL_BYTES = 200  # of a text that may be a label
_EXAMPLES = 12

Progress = Callable[[str, int, int | None], None]  # stage, done, total
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
        drop_near_duplicates, into, progress or (lambda *_: None), engine,
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


@dataclass
class Options:
    """What `prepare` was asked for."""

    column_map: dict[str, str] | None
    labels: dict[str, list[str]] | None
    pattern: str | None
    recipe: DataRecipe
    seed: int
    workers: int | None
    near: bool
    drop: bool
    into: bool
    progress: Progress
    engine: str = "local"


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
            made = json.loads(read_bytes(f"{out}/manifest.json")) if size(f"{out}/manifest.json") is not None else None
        except (OSError, ValueError) as error:
            raise PlaitError(f"{out} cannot be used: {error}. Choose another place with -o.") from error
        if made is None:
            check_writable(out)
            return
    else:
        if out.exists() and not out.is_dir():
            raise PlaitError(f"{out} is a file. Choose another folder with -o.")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not (out / "manifest.json").is_file() or not (out / "rejects.jsonl").is_file():
            raise PlaitError(f"{out} holds other files and is not a dataset. Choose another folder with -o.")
        made = read_json(out / "manifest.json")
    before = made.get("source") if isinstance(made, dict) else None
    if before != _named(source) and not replace:
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


def changed_source(source: str | Path, made: Manifest, folder: Path) -> str | None:
    """How the files at `source` differ from those that a dataset in `folder` was made of, for people; None where they
    do not, as far as their names, sizes and times tell."""
    place = location(source)
    if isinstance(source, str) and source.startswith("hf:"):
        place = _local(source)
    if made.source != _named(place):
        return f"it was made from {made.source}, not from {_named(place)}"
    if made.source_stamp != source_stamp(place, folder):
        return f"files of {made.source} were added, removed or changed since"
    return None


def source_stamp(source: Location, out: Location) -> str:
    """A hash of the names, sizes and times of a source's files, hidden ones and those of `out` left aside."""
    digest = hashlib.sha256()
    if isinstance(source, str):
        for name, (_, length, stamp) in listing(source).items():
            digest.update(f"{name}\0{length}\0{stamp}\0".encode())
        return digest.hexdigest()
    skip = out.resolve() if isinstance(out, Path) else None
    for folder, folders, names in os.walk(source) if source.is_dir() else [(str(source.parent), [], [source.name])]:
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(folder) / f).resolve() != skip)
        for name in sorted(names):
            with contextlib.suppress(OSError):
                status = (Path(folder) / name).stat()
                inside = os.path.relpath(Path(folder) / name, source)
                digest.update(os.fsencode(f"{inside}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def _named(source: Location) -> str:
    return str(source.resolve()) if isinstance(source, Path) else source


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
    if not (options.column_map or options.labels or options.pattern or options.into):
        writer = next(filter(None, (kind(tree, options.recipe) for kind in DATA_KINDS.all())), None)
    if writer is not None:
        manifest = writer(folder, options.seed, options.progress)
        named = {"source": _named(source), "source_stamp": source_stamp(source, out)}
        manifest = manifest.model_copy(update=named)
        write_json(folder / "manifest.json", sealed(manifest.model_dump()))
        return manifest
    source_plan = plan(tree, options.column_map, options.labels, options.pattern)
    if options.into:
        source_plan = grown_plan(Dataset.open(out), source_plan, _last(source))
    total = source_plan.given.total()
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
    manifest = _write(source, out, tree, source_plan, paths, folder, options)
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


# --- splitting --------------------------------------------------------------------------------------------------


def _split(given: np.ndarray, draw: np.ndarray, source_plan: Plan, labels: np.ndarray | None) -> tuple[np.ndarray, str]:
    """The split of each record (N,) as a number in SPLITS, and the rule in words. `given` is what the source says,
    -1 where it says nothing; `draw` (N,) in [0, 1) is a hash of the content; `labels` (N,) numbers the records' labels,
    where they have any."""
    if source_plan.tail:
        return np.where(given < 0, 0, given), "the last tenth of the text is val and test, half each"
    if source_plan.grown:
        rule = "what was there stays; new records 80/10/10 by a hash of the content, equal media with what was there"
        return np.where(given < 0, _beside(given, draw), given), rule
    if not (given >= 0).any():
        if labels is not None and len(draw) <= _STRATIFIED:
            rule = "80/10/10 of each label by a hash of the content; equal media share a split"
            return _stratified(draw, labels), rule
        return np.digitize(draw, [0.8, 0.9]), "80/10/10 by a hash of the content; equal media share a split"
    split = np.where(given < 0, 0, given)
    train = int((split == 0).sum())
    # Three standard deviations below the most, since a hash decides.
    share = 0.0 if (given == 1).any() or not train else min(0.1, (_VAL_MOST - 3 * _VAL_MOST**0.5) / train)
    words = f", and {share:.1%} of train becomes val by a hash of the content" if share else ""
    return np.where((split == 0) & (draw < share), 1, split), "as the source says" + words


def _beside(given: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Splits (N,) by the hash of the content, but those of equal content whose split is given."""
    drawn = np.digitize(draw, [0.8, 0.9])
    there = np.flatnonzero(given >= 0)
    there = there[np.argsort(draw[there], kind="stable")]
    place = np.searchsorted(draw[there], draw).clip(max=len(there) - 1)
    return np.where(draw[there][place] == draw, given[there][place], drawn) if len(there) else drawn


def _stratified(draw: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A tenth of each label's records for val, and one for test, those that `draw` puts last. What rounding leaves
    over counts for the labels that come next. Equal draws share a split, whatever their labels are."""
    split = np.zeros(len(draw), np.int64)
    place: dict[float, int] = {}
    due = taken = 0.0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        distinct = [value for value in np.unique(draw[members]).tolist() if value not in place]
        due += len(distinct) / 10
        count = min(round(due - taken), len(distinct) // 3)
        taken += count
        border = len(distinct) - 2 * count
        for rank, value in enumerate(distinct):
            place[value] = 0 if rank < border else 1 if rank < border + count else 2
        split[members] = [place[value] for value in draw[members].tolist()]
    return split


def _labels(paths: list[Path], used: np.ndarray, source_plan: Plan) -> np.ndarray | None:
    """The labels (N,) of the records that are used, as numbers, -1 where one has none: by the first column of few and
    short texts. None where there is no such column."""
    for column, kind in _kinds(paths, source_plan).items():
        if kind != "text" or column in source_plan.chats:
            continue
        cells = [cell for path in paths for cell in _cells(path, column)]
        used_cells = [cell for cell, use in zip(cells, used, strict=True) if use]
        known = [cell for cell in used_cells if cell is not None]
        number = {cell: place for place, cell in enumerate(dict.fromkeys(known))}
        short = all(len(cell.encode()) <= _LABEL_BYTES for cell in number)
        if short and 1 < len(number) <= len(known) // 4:
            return np.array([-1 if cell is None else number[cell] for cell in used_cells])
    return None


def _cells(path: Path, column: str) -> list[str | None]:
    """The texts of a column in a chunk."""
    table, name = _read(path), f"part:{column}"
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def _overlap(split: np.ndarray, group: np.ndarray) -> dict[SplitPair, int]:
    """Records of one split whose media (or text) stand in another too."""
    there = np.zeros((len(split), len(SPLITS)), bool)  # in the row of a group's first record
    there[group, split] = True
    overlap = {}
    for first, second in combinations(range(len(SPLITS)), 2):
        if count := int((there[group, first] & (split == second)).sum()):
            overlap[SplitPair(SPLITS[second], SPLITS[first])] = count
    return dict(sorted(overlap.items()))


# --- writing ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> pa.Table:
    """The table of a chunk, its bytes left on the disk until they are needed."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class _Rejects:
    """Writes rejects.jsonl and counts reasons."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0
        self.reasons: Counter[str] = Counter()
        self.before: set[Rejected] = set()  # of the dataset that is added to

    def add(self, item: Rejected) -> None:
        if item in self.before:
            return
        self.count += 1
        self.reasons[item.summary] += 1
        self.file.write(json.dumps(item._asdict()) + "\n")

    def begin_after(self, earlier: list[Rejected]) -> None:
        """Begin with those of the dataset that is added to, which are not counted twice."""
        for item in earlier:
            self.add(item)
        self.before = set(earlier)

    def common(self) -> str:
        """The commonest reasons with their counts, for people."""
        return "; ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))


def _unused(tree: Tree) -> Iterator[Rejected]:
    for name in tree.files:
        if name in tree.used:
            continue
        suffix = suffix_of(name)
        if tree.kind(name) is not None:
            reason = "no table names it"
        elif suffix == ".txt":
            reason = "a text that belongs to no medium of the same name"
        elif suffix in ARCHIVE_SUFFIXES:
            reason = "an archive inside an archive is not opened"
        elif name in tree.why_not:
            reason = tree.why_not[name]
        elif suffix in TABLE_SUFFIXES:
            reason = "not read: it is no table of records, or names none of the media here"
        else:
            reason = "not a kind of file that is read"
        yield Rejected(name, None, reason)


def _gather(paths: list[Path], names: list[str]) -> dict[str, np.ndarray]:
    """Facts of all records: digests as pairs of integers (N, 2), numbers (N,)."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        table = _read(path).select(names)
        for name in names:
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_binary(column.type):
                start = column.offset * 16
                raw = np.frombuffer(column.buffers()[1] or b"", np.uint8)[start : start + 16 * len(column)]
                pieces[name].append(raw.copy().view("<u8").reshape(-1, 2))
            elif pa.types.is_string(column.type):
                pieces[name].append(np.array([SPLITS.index(v) if v else -1 for v in column.to_pylist()], np.int8))
            else:
                pieces[name].append(column.to_numpy())
    return {name: np.concatenate(arrays) for name, arrays in pieces.items()}


@dataclass(frozen=True)
class Division:
    """What becomes of the records.

    Attributes:
        used: Which of all have an id of their own, (A,) bool; the others repeat one.
        split: The number of the split of each that is used, (N,).
        rule: How it was found, for people.
        duplicates: Which of them are alike.
        keep: Which of them are written, (N,) bool.
    """

    used: np.ndarray
    split: np.ndarray
    rule: str
    duplicates: Duplicates
    keep: np.ndarray

    @property
    def dropped(self) -> int:
        """How many are left out for near-duplicates."""
        return int((~self.keep).sum())


def _write(
    source: Location, out: Location, tree: Tree, source_plan: Plan, paths: list[Path], folder: Path, options: Options
) -> Manifest:
    """The dataset of all chunks, but for the manifest, which is returned."""
    facts = _gather(paths, ["key", "content", "group", "draw", "rank", "split"]) if paths else {}
    used = first_of(facts["key"]) == np.arange(len(facts["key"])) if paths else np.zeros(0, bool)
    lead = f"{_last(source)}/" if options.into else ""
    with (folder / "rejects.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        rejects = _Rejects(file)
        if options.into:
            rejects.begin_after(Dataset.open(out).rejects)
        for refused in tree.refused:
            rejects.add(refused._replace(file=lead + refused.file))
        for path in paths:
            for entry in json.loads(_read(path).schema.metadata[b"rejects"]):
                rejects.add(Rejected(*entry))
        if not used.any():
            for unused in _unused(tree):
                rejects.add(unused)
            for path in paths:
                path.unlink()
            raise PlaitError(f"{source}: no record can be used. {rejects.common() or 'Nothing was found'}.")
        division = _divide(paths, used, facts, source_plan, folder, options)
        manifest, examples = _write_records(source_plan, paths, folder, rejects, division, facts["rank"], options)
        for unused in _unused(tree):
            rejects.add(unused._replace(file=lead + unused.file))
    media = _write_known(paths, used, folder / known.FILE)
    manifest = manifest.model_copy(
        update={
            "source": f"{Dataset.open(out).manifest.source} + {_named(source)}" if options.into else _named(source),
            "source_stamp": source_stamp(source, out),
            "parts": {"media": media} if media else {},
            "rejected": rejects.count,
            "dropped": division.dropped,
            "notes": source_plan.notes,
            "split_notes": [f"split: {division.rule}"],
            "warnings": [*tree.warnings, *source_plan.warnings],
        }
    )
    manifest = _with_repeats(manifest, division, facts, rejects)
    name = out.name if options.into and isinstance(out, Path) else _last(source)
    (folder / "report.html").write_text(
        report(manifest, examples, rejects.reasons, name), encoding="utf-8", newline="\n"
    )
    return manifest


def _divide(
    paths: list[Path], used: np.ndarray, facts: dict[str, np.ndarray], source_plan: Plan, folder: Path, options: Options
) -> Division:
    """Find splits and duplicates; what is alike is listed in `folder`."""
    labels = _labels(paths, used, source_plan) if used.sum() <= _STRATIFIED else None
    split, rule = _split(facts["split"][used], facts["draw"][used] / 2.0**63, source_plan, labels)
    duplicates = Duplicates.none(len(split))
    if options.near:
        options.progress("compare", 0, 1)
        duplicates = find_duplicates(paths, used, split, folder / "duplicates.jsonl")
        options.progress("compare", 1, 1)
    list_equal(paths, used, split, facts["content"][used], folder / "duplicates.jsonl")
    keep = ~duplicates.spoils if options.drop else np.ones(len(split), bool)
    return Division(used, split, rule, duplicates, keep)


def _with_repeats(manifest: Manifest, division: Division, facts: dict[str, np.ndarray], rejects: _Rejects) -> Manifest:
    """The manifest with what stands in it more than once, and the warnings that follow from all of it."""
    group, content = (first_of(facts[name][division.used][division.keep]) for name in ("group", "content"))
    repeated = int((content != np.arange(len(content))).sum())
    overlap = _overlap(division.split[division.keep], group)
    near = division.duplicates.counts(division.split, division.keep)
    unsearched = [
        f"Near-duplicates were not looked for among {count:,} distinct {kind} parts: that many do not fit into memory. "
        "Equal ones are listed."
        for kind, count in division.duplicates.unsearched.items()
    ]
    return manifest.model_copy(
        update={
            "duplicates": repeated,
            "overlap": {f"{pair.later}/{pair.earlier}": count for pair, count in overlap.items()},
            "near_duplicates": {f"{pair.later}/{pair.earlier}": count for pair, count in near.items()},
            "warnings": [
                *manifest.warnings,
                *unsearched,
                *_warnings(manifest, overlap, near, rejects, repeated, division.dropped),
            ],
        }
    )


def _last(source: Location) -> str:
    """The last part of a source's name."""
    return (source.name if isinstance(source, Path) else source.rstrip("/").rpartition("/")[2]) or str(source)


def _write_known(paths: list[Path], used: np.ndarray, path: Path) -> Shard | None:
    """Keep what decoding showed of the media that are worth it (see known.py); None where there are none."""

    def tables() -> Iterator[pa.Table]:
        place = 0
        for chunk in paths:
            table = _read(chunk)
            here = used[place : place + len(table)]
            place += len(table)
            for name, kind in json.loads(table.schema.metadata[b"kinds"]).items():
                if kind != "text":
                    large = pc.greater_equal(pc.binary_length(table[f"part:{name}"]), known.LEAST)
                    part = table.filter(pc.and_(pc.fill_null(large, False), pa.array(here)))
                    prints = part[f"print:{name}"]
                    prints = pc.if_else(pc.equal(pc.binary_length(prints), 0), None, prints)
                    facts = [pa.array([kind] * len(part), pa.string())]
                    facts += [part[f"{fact}:{name}"] for fact in ("digest", "first", "second")]
                    yield pa.table([*facts, prints], schema=known.SCHEMA)

    rows = known.write_known(path, tables())
    if not rows:
        path.unlink()
        return None
    return Shard(file=path.name, split="", rows=rows, bytes=path.stat().st_size, sha256=sha256_file(path))


def _kinds(paths: list[Path], source_plan: Plan) -> dict[str, str]:
    """The columns that have a value somewhere: those of the plan, then those that turned up, by kind and name."""
    there: dict[str, str] = {}
    for path in paths:
        there |= json.loads(_read(path).schema.metadata[b"kinds"])
    late = sorted(set(there) - set(source_plan.columns), key=lambda name: (KINDS.index(there[name]), len(name), name))
    return {name: there[name] for name in [*source_plan.columns, *late] if name in there}


def _write_records(
    source_plan: Plan,
    paths: list[Path],
    folder: Path,
    rejects: _Rejects,
    division: Division,
    ranks: np.ndarray,
    options: Options,
) -> tuple[Manifest, list[Example]]:
    """Write the shards; returns the manifest as far as records tell, and examples to show: those that are first in
    `ranks` (A,)."""
    split, keep = division.split, division.keep
    columns = _kinds(paths, source_plan)
    shards = {name: Shards(folder, name, columns) for name in SPLITS}
    statistics = {name: Statistics(kind) for name, kind in columns.items()}
    rank = np.where(keep, ranks[division.used], np.iinfo(np.int64).max)
    shown = set(np.argsort(rank, kind="stable")[: min(_EXAMPLES, int(keep.sum()))].tolist())
    examples: dict[int, Example] = {}  # by record
    seen = division.duplicates.seen & keep if not options.drop else np.zeros(len(split), bool)
    for table, numbers, done in _kept_records(paths, division, rejects):
        for name, counted in statistics.items():
            if f"part:{name}" in table.column_names:
                counted.add(table, name)
        parts = [f"part:{name}" for name in columns if f"part:{name}" in table.column_names]
        rows = table.select(["id", "place", *parts]).rename_columns(
            ["id", "source", *(name.removeprefix("part:") for name in parts)]
        )
        rows = rows.append_column("seen", pa.array(seen[numbers]))
        for number in shown.intersection(numbers.tolist()):
            row = rows.slice(int(np.searchsorted(numbers, number)), 1).to_pylist()[0]
            cells = {name: row[name] for name in columns if row.get(name) is not None}
            examples[number] = Example(row["id"], SPLITS[split[number]], cells)
        for place, name in enumerate(SPLITS):
            chosen = split[numbers] == place
            if chosen.any():
                shards[name].add(rows.filter(pa.array(chosen)))
        options.progress("write", done, len(split))
    for writer in shards.values():
        writer.close()
    manifest = Manifest(
        version=VERSION,
        source="",
        seed=options.seed,
        columns={name: kind for name, kind in columns.items() if statistics[name].records},
        counts={name: sum(shard.rows for shard in shards[name].done) for name in SPLITS},
        rejected=0,
        duplicates=0,
        overlap={},
        shards=[shard for name in SPLITS for shard in shards[name].done],
        statistics={name: counted.lengths() for name, counted in statistics.items() if counted.records},
        chats=[name for name in source_plan.chats if name in columns],
        multi_label=[name for name in source_plan.multi_label if name in columns],
        numbers=[name for name in source_plan.numbers if name in columns],
        notes=[],
        warnings=[],
    )
    return manifest, [examples[number] for number in sorted(examples, key=lambda number: int(rank[number]))]


def _kept_records(
    paths: list[Path], division: Division, rejects: _Rejects
) -> Iterator[tuple[pa.Table, np.ndarray, int]]:
    """Of each chunk the records that are written, their numbers among those that are used, and how many of these there
    were so far. The others are rejected."""
    place = number = 0  # among all records, and among those that are used
    for path in paths:
        table = _read(path)
        here = division.used[place : place + len(table)]
        for row in np.flatnonzero(~here).tolist():
            id_, at = table["id"][row].as_py(), table["place"][row].as_py()
            rejects.add(rejected(at, f"the id '{id_}' stands there twice; the first record is kept"))
        place += len(table)
        table = table.filter(pa.array(here))
        numbers = np.arange(number, number + len(table))
        number += len(table)
        kept = division.keep[numbers]
        for row in np.flatnonzero(~kept).tolist():
            twin = division.duplicates.twin(int(numbers[row]))
            rejects.add(rejected(table["place"][row].as_py(), f"left out of train: a near-duplicate of {twin}"))
        yield table.filter(pa.array(kept)), numbers[kept], number


def _warnings(
    manifest: Manifest,
    overlap: dict[SplitPair, int],
    near: dict[SplitPair, int],
    rejects: _Rejects,
    duplicates: int,
    dropped: int,
) -> list[str]:
    """What may be amiss with the records of a dataset."""
    warnings = [f"No record for {split}." for split in SPLITS if not manifest.counts[split]]
    for name, lengths in manifest.statistics.items():
        alone = [label for label, count in (lengths.classes or {}).items() if count == 1]
        if alone:
            some = ", ".join(f"'{label}'" for label in alone[:5])
            warnings.append(f"Column '{name}': {len(alone)} classes have one example only ({some}).")
    for pair, count in overlap.items():
        warnings.append(f"{count} records of {pair.later} hold the same media or text as records of {pair.earlier}.")
    if dropped:
        warnings.append(f"{dropped} records were left out of train: val or test has near-duplicates of them.")
    for pair, count in near.items():
        warnings.append(
            f"{count} records of {pair.later} are near-duplicates of "
            f"{'others of ' if pair.later == pair.earlier else ''}{pair.earlier}: "
            "see duplicates.jsonl."
            + (" To leave them out of train: --drop-near-duplicates." if pair.earlier == "train" != pair.later else "")
        )
    if duplicates:
        warnings.append(f"{duplicates} records repeat another one exactly: see duplicates.jsonl.")
    if rejects.count - dropped:
        warnings.append(
            f"{rejects.count - dropped} files or rows were not used: {rejects.common()}. See rejects.jsonl."
        )
    return warnings
