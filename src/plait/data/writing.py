"""The dataset of checked chunks: duplicates found, records split, shards, rejects and manifest written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.core.config import DataRecipe
from plait.core.errors import PlaitError
from plait.core.files import sha256_file
from plait.core.rejects import Reason, RejectKind
from plait.data import known
from plait.data.dataset import VERSION, Dataset, Manifest, Shard
from plait.data.duplicates import Duplicates, SplitPair, find_duplicates, first_of, list_equal
from plait.data.files import ARCHIVE_SUFFIXES, TABLE_SUFFIXES, Plan, Tree, suffix_of, unread
from plait.data.grouping import column_hint
from plait.data.preview import Example, report
from plait.data.record import SPLITS, Rejected, rejected, rejected_of
from plait.data.shards import Shards, Statistics
from plait.data.splitting import (
    STRATIFIED,
    columns_of,
    few_labels,
    overlap_of,
    read_chunk,
    split_records,
)
from plait.data.stores import Location, listing

_EXAMPLES = 12
FEW_EMPTY = 0.2  # share of the records up to which an empty cell is told of
GROUPS = "groups.parquet"  # beside the shards
GROUPS_NAMED = 6  # groups of a split that a manifest names
Progress = Callable[[str, int, int | None], None]  # stage, done, total


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
    group_by: str | None
    progress: Progress
    engine: str = "local"


def source_stamp(source: Location, out: Location) -> str:
    """A hash of the names, sizes and times of a source's files, hidden ones and those of `out` left aside."""
    digest = hashlib.sha256()
    if isinstance(source, str):
        for name, (_, length, stamp) in listing(source).items():
            digest.update(f"{name}\0{length}\0{stamp}\0".encode())
        return digest.hexdigest()
    skip = out.resolve() if isinstance(out, Path) else None
    alone = not source.is_dir()
    for folder, folders, names in [(str(source.parent), [], [source.name])] if alone else os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(folder) / f).resolve() != skip)
        within = os.path.relpath(folder, source)
        for name in sorted(names):
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - a Path a file takes as long
                inside = os.curdir if alone else name if within == os.curdir else os.path.join(within, name)  # noqa: PTH118
                digest.update(os.fsencode(f"{inside}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def source_name(source: Location) -> str:
    """What a manifest calls a source: its full path, or its address."""
    return str(source.resolve()) if isinstance(source, Path) else source


class _Rejects:
    """Writes rejects.jsonl and counts what is in it by kind."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0
        self.kinds: Counter[RejectKind] = Counter()
        self.first: dict[RejectKind, str] = {}  # the first reason of each kind, in full
        self.before: set[tuple[str, int | None, str]] = set()  # of the dataset that is added to

    def add(self, item: Rejected) -> None:
        if (item.file, item.line, item.reason) in self.before:
            return
        self.count += 1
        self.kinds[item.kind] += 1
        self.first.setdefault(item.kind, item.reason[:120])
        self.file.write(json.dumps(item.row) + "\n")

    def begin_after(self, earlier: list[Rejected]) -> None:
        """Begin with those of the dataset that is added to, which are not counted twice."""
        for item in earlier:
            self.add(item)
        self.before = {(item.file, item.line, item.reason) for item in earlier}

    def common(self) -> str:
        """The commonest reasons with their counts, for people."""
        return "; ".join(
            f"{kind.label} ({count})" + (f", as in '{first}'" if (first := self.first[kind]) != kind.label else "")
            for kind, count in self.kinds.most_common(3)
        )


def _unused(tree: Tree) -> Iterator[Rejected]:
    for name in tree.files:
        if name in tree.used:
            continue
        suffix = suffix_of(name)
        if tree.kind(name) is not None:
            reason = Reason(RejectKind.UNUSED, "no table names it")
        elif suffix == ".txt":
            reason = Reason(RejectKind.UNUSED, "a text that belongs to no medium of the same name")
        elif suffix in ARCHIVE_SUFFIXES:
            reason = Reason(RejectKind.UNKNOWN_FORMAT, "an archive inside an archive is not opened")
        elif name in tree.why_not:
            reason = tree.why_not[name]
        elif suffix in TABLE_SUFFIXES:
            reason = Reason(
                RejectKind.NOT_A_TABLE, "not read: it is no table of records, or names none of the media here"
            )
        else:
            reason = Reason(RejectKind.UNKNOWN_FORMAT, unread(name))
        yield Rejected(name, None, reason)


def _gather(paths: list[Path], names: list[str]) -> dict[str, np.ndarray]:
    """Facts of all records: digests as pairs of integers (N, 2), numbers (N,). They are held once."""
    schema = read_chunk(paths[0]).schema
    kinds = {name: schema.field(name).type for name in names}
    count = sum(len(read_chunk(path)) for path in paths)
    facts: dict[str, np.ndarray] = {
        name: np.empty((count, 2), "<u8")
        if pa.types.is_fixed_size_binary(kind)
        else np.empty(count, np.int8 if pa.types.is_string(kind) else kind.to_pandas_dtype())
        for name, kind in kinds.items()
    }
    place = 0
    for path in paths:
        table = read_chunk(path).select(names)
        rows = slice(place, place + len(table))
        place += len(table)
        for name, kind in kinds.items():
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_binary(kind):
                start = column.offset * 16
                raw = np.frombuffer(column.buffers()[1] or b"", np.uint8)[start : start + 16 * len(column)]
                facts[name][rows] = raw.view("<u8").reshape(-1, 2)
            elif pa.types.is_string(kind):
                facts[name][rows] = [SPLITS.index(v) if v else -1 for v in column.to_pylist()]
            else:
                facts[name][rows] = column.to_numpy()
    return facts


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


def write_dataset(
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
            for entry in json.loads(read_chunk(path).schema.metadata[b"rejects"]):
                rejects.add(rejected_of(entry))
        if not used.any():
            for unused in _unused(tree):
                rejects.add(unused)
            for path in paths:
                path.unlink()
            nothing = rejects.common() or "It is empty, or holds a heading alone"
            raise PlaitError(f"{source}: no record can be used. {nothing}.")
        division = _divide(paths, used, facts, source_plan, folder, options)
        groups = _write_groups(paths, division, folder) if source_plan.group_by else None
        manifest, examples = _write_records(source_plan, paths, folder, rejects, division, facts["rank"], options)
        for unused in _unused(tree):
            rejects.add(unused._replace(file=lead + unused.file))
    media = _write_known(paths, used, folder / known.FILE)
    manifest = manifest.model_copy(
        update={
            "source": f"{Dataset.open(out).manifest.source} + {source_name(source)}"
            if options.into
            else source_name(source),
            "source_stamp": source_stamp(source, out),
            "parts": ({"media": media} if media else {}) | ({"groups": groups.file} if groups else {}),
            "group_by": source_plan.group_by,
            "groups": groups.counts if groups else {},
            "group_names": groups.first if groups else {},
            "rejected": rejects.count,
            "dropped": division.dropped,
            "own_splits": not source_plan.tail and bool((facts["split"][used] >= 0).any()),
            "notes": source_plan.notes,
            "split_notes": [f"split: {division.rule}"],
            "warnings": [*tree.warnings, *source_plan.warnings, *_group_warnings(manifest, source_plan, groups)],
        }
    )
    manifest = _with_repeats(manifest, division, facts, rejects)
    name = out.name if options.into and isinstance(out, Path) else _last(source)
    (folder / "report.html").write_text(report(manifest, examples, rejects.kinds, name), encoding="utf-8", newline="\n")
    return manifest


def _divide(
    paths: list[Path], used: np.ndarray, facts: dict[str, np.ndarray], source_plan: Plan, folder: Path, options: Options
) -> Division:
    """Find splits and duplicates; what is alike is listed in `folder`."""
    labels = few_labels(paths, used, source_plan) if used.sum() <= STRATIFIED else None
    split, rule = split_records(facts["split"][used], facts["draw"][used] / 2.0**63, source_plan, labels)
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
    overlap = overlap_of(division.split[division.keep], group)
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


@dataclass(frozen=True)
class Groups:
    """The groups of a dataset: their file, those of each split, and how many stand in several."""

    file: Shard
    names: dict[str, list[str]]
    parted: int

    @property
    def counts(self) -> dict[str, int]:
        """How many each split has."""
        return {split: len(names) for split, names in self.names.items()}

    @property
    def first(self) -> dict[str, list[str]]:
        """The first ones of each split."""
        return {split: names[:GROUPS_NAMED] for split, names in self.names.items()}


def _write_groups(paths: list[Path], division: Division, folder: Path) -> Groups | None:
    """Write the group of each record, in the dataset's order; None where no record has one."""
    names = [name for path in paths for name in read_chunk(path)["group_name"].to_pylist()]
    kept = np.array(names, object)[division.used][division.keep]
    if not any(name is not None for name in kept):
        return None
    split = division.split[division.keep]
    order = np.argsort(split, kind="stable")
    path = folder / GROUPS
    pq.write_table(pa.table({"group": pa.array(kept[order].tolist(), pa.string())}), path)
    inside = {name: {one for one in kept[split == place] if one is not None} for place, name in enumerate(SPLITS)}
    file = Shard(file=path.name, split="", rows=len(kept), bytes=path.stat().st_size, sha256=sha256_file(path))
    parted = sum(map(len, inside.values())) - len(set().union(*inside.values()))
    return Groups(file, {split: sorted(names) for split, names in inside.items()}, parted)


def _group_warnings(manifest: Manifest, source_plan: Plan, groups: Groups | None) -> list[str]:
    """What is to be known of groups: that some stand in several splits, or that there may be some to name."""
    if source_plan.group_by is None:
        hint = column_hint(manifest.statistics)
        return [hint] if hint else []
    if groups is None:
        raise PlaitError(
            f"--group-by {source_plan.group_by}: no record has such a group. Name a column, folder, or a part that the "
            "files' names have, counted from 1 (name:1)."
        )
    if groups.parted:
        return [f"{groups.parted} groups ({source_plan.group_by}) stand in more than one split, as the source says."]
    return []


def _write_known(paths: list[Path], used: np.ndarray, path: Path) -> Shard | None:
    """Keep what decoding showed of the media that are worth it (see known.py); None where there are none."""

    def tables() -> Iterator[pa.Table]:
        place = 0
        for chunk in paths:
            table = read_chunk(chunk)
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
    columns = columns_of(paths, source_plan)
    shards = {name: Shards(folder, name, columns) for name in SPLITS}
    statistics = {name: Statistics(kind) for name, kind in columns.items()}
    rank = np.where(keep, ranks[division.used], np.iinfo(np.int64).max)
    shown = set(np.argsort(rank, kind="stable")[: min(_EXAMPLES, int(keep.sum()))].tolist())
    examples: dict[int, Example] = {}  # by record
    seen_in_train = division.duplicates.seen & keep if not options.drop else np.zeros(len(split), bool)
    for table, numbers, done in _kept_records(paths, division, rejects):
        for name, counted in statistics.items():
            if f"part:{name}" in table.column_names:
                counted.add(table, name)
        parts = [f"part:{name}" for name in columns if f"part:{name}" in table.column_names]
        rows = table.select(["id", "place", *parts]).rename_columns(
            ["id", "source", *(name.removeprefix("part:") for name in parts)]
        )
        rows = rows.append_column("seen", pa.array(seen_in_train[numbers]))
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
        table = read_chunk(path)
        here = division.used[place : place + len(table)]
        for row in np.flatnonzero(~here).tolist():
            id_, at = table["id"][row].as_py(), table["place"][row].as_py()
            rejects.add(
                rejected(
                    at, Reason(RejectKind.DUPLICATE, f"the id '{id_}' stands there twice; the first record is kept")
                )
            )
        place += len(table)
        table = table if here.all() else table.filter(pa.array(here))
        numbers = np.arange(number, number + len(table))
        number += len(table)
        kept_rows = division.keep[numbers]
        for row in np.flatnonzero(~kept_rows).tolist():
            twin = division.duplicates.twin(int(numbers[row]))
            rejects.add(
                rejected(
                    table["place"][row].as_py(),
                    Reason(RejectKind.NEAR_DUPLICATE, f"left out of train: a near-duplicate of {twin}"),
                )
            )
        yield table if kept_rows.all() else table.filter(pa.array(kept_rows)), numbers[kept_rows], number


def _meant(label: str, others: list[str]) -> str:
    """A label of one example that differs from another by a letter, with that one beside it; one that differs in case
    or spaces alone has a line of its own."""
    spelt = {other.strip().casefold(): other for other in others}
    own = label.strip().casefold()
    close = [] if own in spelt else get_close_matches(own, spelt, 1, 0.85)
    return f", meant '{spelt[close[0]]}'?" if close else ""


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
            others = [label for label in lengths.classes or {} if label not in alone]
            first_labels = ", ".join(f"'{label}'{_meant(label, others)}" for label in alone[:5])
            warnings.append(f"Column '{name}': {len(alone)} classes have one example only ({first_labels}).")
        records = sum(manifest.counts.values())
        if 0 < (empty := records - lengths.records) <= FEW_EMPTY * records:
            warnings.append(f"Column '{name}' is empty in {empty:,} of {records:,} records: nothing is learnt there.")
        spellings: dict[str, list[str]] = {}
        for label in lengths.classes or {}:
            spellings.setdefault(" ".join(label.split()).casefold(), []).append(label)
        for alike in [alike for alike in spellings.values() if len(alike) > 1][:3]:
            shown = ", ".join(f"'{label}'" for label in alike)
            warnings.append(f"Column '{name}': {shown} differ in case or spaces alone, and are {len(alike)} classes.")
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
