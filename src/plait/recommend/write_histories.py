"""Histories: who chose what in which order. A dataset of them has a user in each record and a catalogue beside it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plait.core.errors import PlaitError
from plait.core.files import sha256_file
from plait.core.rejects import Reason, RejectKind
from plait.core.rng import key_of, uniform
from plait.data.dataset import VERSION, Dataset, Lengths, Manifest, Shard
from plait.data.files import Tree
from plait.data.preview import Example, report
from plait.data.record import SPLITS, Rejected
from plait.data.stores import join, open_binary
from plait.data.tables import rows
from plait.data.writing import source_name
from plait.recommend.catalogue import Catalogue, Item
from plait.recommend.interactions import Interaction, read_interactions, read_items
from plait.recommend.settings import ItemsRecipe

TRAIN, VAL, TEST, HIDDEN = range(4)  # what an interaction is for; a hidden one is neither learnt nor asked for
COLD = 101  # key of `uniform`
_GROUP = 4096  # users in a row group
_EXAMPLES = 12


@dataclass
class Remarks:
    """What people are told of a preparation: in general, of the splits and what they follow, and of what is amiss."""

    notes: list[str]
    splits: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Histories:
    """Interactions by user and, within a user, in order of time. User u has the places `starts[u]` to `starts[u + 1]`
    of the arrays."""

    users: list[str]
    starts: np.ndarray  # (U + 1,) int64
    items: np.ndarray  # (N,) int32, numbers in the catalogue
    parts: np.ndarray  # (N,) uint8: TRAIN, VAL, TEST or HIDDEN
    times: np.ndarray | None = None  # (N,) int64, where they are known

    def __len__(self) -> int:
        return len(self.users)

    def owners(self) -> np.ndarray:
        """The user of every interaction, (N,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def read_histories(dataset: Dataset) -> Histories:
    """All histories of a dataset. Raises PlaitError where a file is damaged."""
    tables = []
    for shard in dataset.manifest.shards:
        file = join(dataset.path, shard.file)
        try:
            with open_binary(file) as opened:
                tables.append(pq.read_table(opened, columns=["id", "item", "part", "time"]))
        except (OSError, pa.ArrowException) as error:
            raise PlaitError(f"{file} is damaged: {error}. Run plait prepare again.") from error
    table = pa.concat_tables(tables).combine_chunks()
    lists = {name: table[name].combine_chunks() for name in ("item", "part", "time")}
    lengths = np.diff(lists["item"].offsets.to_numpy())
    times = None if table["time"].null_count else lists["time"].flatten().to_numpy()
    return Histories(
        users=table["id"].to_pylist(),
        starts=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        items=lists["item"].flatten().to_numpy(),
        parts=lists["part"].flatten().to_numpy(),
        times=times,
    )


def read_catalogue(dataset: Dataset) -> Catalogue:
    """The catalogue of a dataset of histories. Raises PlaitError where the dataset has none, or it is damaged."""
    return Catalogue.read(catalogue_file(dataset))


def catalogue_file(dataset: Dataset) -> Path:
    """The file of a dataset's catalogue. Raises PlaitError where there is none here."""
    if "items" not in dataset.manifest.parts:
        raise PlaitError(f"{dataset.path} holds no histories of items. Prepare a table of interactions.")
    place = join(dataset.path, dataset.manifest.parts["items"].file)
    if not isinstance(place, Path):
        raise PlaitError(f"{dataset.path} is far away; copy a dataset of histories to this machine first.")
    return place


# --- writing ----------------------------------------------------------------------------------------------------


def write_histories(
    tree: Tree, interactions: str, items: str | None, folder: Path, recipe: ItemsRecipe, seed: int, progress: Any
) -> Manifest:
    """A dataset of histories in `folder`, but for the manifest, which is returned. Raises PlaitError where nothing
    can be used, or the two tables do not belong together."""
    rejects: list[Rejected] = list(tree.refused)
    remarks = Remarks([f"{interactions}: interactions"])
    interactions_read: list[Interaction] = []
    light = 0
    for row in read_interactions(tree, interactions, recipe):
        if isinstance(row, Rejected):
            rejects.append(row)
        elif recipe.least_weight is not None and (row.weight is None or row.weight < recipe.least_weight):
            light += 1
        else:
            interactions_read.append(row)
            if len(interactions_read) % 100_000 == 0:
                progress("check", len(interactions_read), None)
    if not interactions_read:
        common = Counter(reject.reason for reject in rejects).most_common(3)
        common += [(f"weighs less than {recipe.least_weight:g}, or nothing", light)] if light else []
        common_reasons = "; ".join(f"{reason} ({count})" for reason, count in common) or "nothing was found"
        raise PlaitError(f"{interactions}: no interaction can be used. {common_reasons}.")
    _tell_weights(interactions_read, recipe, light, remarks)
    known = _items(tree, items, recipe, {row.item for row in interactions_read}, interactions, rejects, remarks)
    histories = _ordered(interactions_read, list(known), remarks)
    untested = _untested(tree, recipe.untested, histories.users, remarks)
    cold = _cold(list(known), recipe.cold, seed)
    _split(histories, recipe, untested, cold, remarks)
    histories.items, order = _known_first(histories, len(known))
    listed = list(known.values())
    trained = len(set(histories.items[histories.parts == TRAIN].tolist()))
    catalogue = Catalogue([listed[i] for i in order], trained)
    if len(catalogue) > trained:
        remarks.notes.append(
            f"{len(catalogue) - trained:,} items stand in no training history; what they are places them"
        )
    if recipe.cold:
        remarks.notes.append(f"{recipe.cold:.0%} of the items, drawn by the seed, were kept out of training")
    progress("write", 0, 1)
    return _write(tree, folder, histories, catalogue, rejects, remarks, seed)


def _items(
    tree: Tree, table: str | None, recipe: ItemsRecipe, in_use: set[str], interactions: str, rejects: list[Rejected],
    remarks: Remarks,
) -> dict[str, Item]:  # fmt: skip
    """Id -> item: those of the table, then those that interactions alone name."""
    known: dict[str, Item] = {}
    twice = 0
    if table is not None:
        remarks.notes.append(f"{table}: items")
        for line, row in read_items(tree, table, recipe):
            if isinstance(row, Rejected):
                rejects.append(Rejected(row.file, line, row.why))
            elif row.id in known:
                twice += 1
                rejects.append(
                    Rejected(
                        table,
                        line,
                        Reason(RejectKind.DUPLICATE, f"the item '{row.id}' stands there twice; the first row is kept"),
                    )
                )
            else:
                known[row.id] = row
        if twice:
            remarks.warnings.append(
                f"{twice:,} rows of {table} repeat an item: the first of each is kept, see rejects.jsonl."
            )
        shared = in_use & known.keys()
        if not shared:
            raise PlaitError(
                f"The ids of {table} and {interactions} do not match: the one has {_first_three(known)}, the other "
                f"{_first_three(in_use)}. Name the column of ids in the recipe: data.items.columns.id or .item."
            )
        if lone := sorted(in_use - shared, key=_natural):
            remarks.warnings.append(
                f"{len(lone):,} items of {interactions} have no row in {table}, such as {_first_three(lone)}."
            )
    for id_ in sorted(in_use - known.keys(), key=_natural):
        known[id_] = Item(id_)
    return known


def _first_three(ids: Any) -> str:
    return ", ".join(f"'{id_}'" for id_ in sorted(ids, key=_natural)[:3])


def _natural(text: str) -> tuple[int, str]:
    """Numbers in order of size."""
    return (len(text) if text.isdigit() else 1 << 30, text)


def _ordered(interactions: list[Interaction], ids: list[str], remarks: Remarks) -> Histories:
    """The interactions by user, in order of time; of equal times, in that of the file."""
    numbers = {id_: i for i, id_ in enumerate(ids)}
    names = list(dict.fromkeys(row.user for row in interactions))
    place = {name: i for i, name in enumerate(names)}
    users = np.array([place[row.user] for row in interactions])
    items = np.array([numbers[row.item] for row in interactions], np.int32)
    times = None
    order = np.argsort(users, kind="stable")
    if all(row.time is not None for row in interactions):
        times = _counted_times([row.time for row in interactions if row.time is not None], remarks)
        plain = times[order]
        same = users[order][1:] == users[order][:-1]
        disordered = len(np.unique(users[order][1:][same & (plain[1:] < plain[:-1])]))
        order = np.lexsort((times, users))
        sorted_times = times[order]
        ties = int((same & (sorted_times[1:] == sorted_times[:-1])).sum())
        if disordered:
            remarks.notes.append(
                f"{disordered:,} of {len(names):,} users had lines out of order of time; they were sorted"
            )
        tied = ties / max(int(same.sum()), 1)
        remarks.splits.append(
            f"{tied:.1%} of the steps from one interaction to the next are ties in time, whose order is that of the "
            "file"
        )
        times = sorted_times
    elif any(row.time is not None for row in interactions):
        remarks.warnings.append("Some interactions have no time: the order is that of the file.")
    else:
        remarks.splits.append("no times: the order of the file is taken for that of time")
    starts = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=len(names)))))
    parts = np.zeros(len(interactions), np.uint8)
    return Histories(names, starts, items[order], parts, times)


def _counted_times(times: list[float], remarks: Remarks) -> np.ndarray:
    """The times (N,) as integers: as they are, or in millionths where some have a fraction."""
    if all(isinstance(time, int) for time in times):
        return np.array(times, np.int64)
    exact = np.array(times, np.float64)
    scale = 1e6 if np.abs(exact).max() < 2**40 else 1.0  # larger ones are no seconds
    if scale > 1:
        remarks.notes.append("times have fractions of a second: they are kept in microseconds")
    return np.rint(exact * scale).astype(np.int64)


def _untested(tree: Tree, setting: str | None, users: list[str], remarks: Remarks) -> np.ndarray:
    """Which users (U,) a table marks as learnt from alone."""
    marks = np.zeros(len(users), bool)
    if setting is None:
        return marks
    file, _, column = setting.rpartition(":")
    file = next((name for name in tree.files if name == file or name.rpartition("/")[2] == file), "")
    if not file:
        raise PlaitError(f"data.items.untested: {setting} names no file of the source. Write FILE:COLUMN.")
    tree.used.add(file)
    place = {user: i for i, user in enumerate(users)}
    for line, row in rows(tree, file):
        if isinstance(row, Reason):
            continue
        if column not in row:
            raise PlaitError(f"data.items.untested: {file} has no column '{column}'. It has {', '.join(row)}.")
        ids = [str(value) for value in row.values() if str(value) in place]
        if str(row[column]).strip().lower() in ("1", "true", "yes"):
            if not ids:
                raise PlaitError(f"data.items.untested: {file}, line {line}, names no user of the interactions.")
            marks[place[ids[0]]] = True
    remarks.notes.append(f"{int(marks.sum()):,} users are learnt from and not asked for: {setting}")
    return marks


def _cold(ids: list[str], share: float, seed: int) -> np.ndarray:
    """Which items (I,) training must not see."""
    keys = np.array([key_of(id_) for id_ in ids], np.int64)
    return uniform(seed, keys, COLD) < share


def _split(histories: Histories, recipe: ItemsRecipe, untested: np.ndarray, cold: np.ndarray, remarks: Remarks) -> None:
    """Say what each interaction is for."""
    starts, parts = histories.starts, histories.parts
    owner = histories.owners()
    if recipe.split == "time":
        if histories.times is None:
            raise PlaitError("data.items.split: time needs a time in every interaction. Use leave-one-out.")
        first, second = np.quantile(histories.times, [0.8, 0.9])
        parts[histories.times > first] = VAL
        parts[histories.times > second] = TEST
        parts[untested[owner] & (parts > TRAIN)] = HIDDEN
        remarks.splits.append("split by time: the first 80 % of all interactions train, 10 % val, the last 10 % test")
    else:
        lengths = np.diff(starts)
        has_held_out = (lengths >= 3) & ~untested
        parts[starts[1:][has_held_out] - 1] = TEST
        parts[starts[1:][has_held_out] - 2] = VAL
        remarks.splits.append("leave one out: of each user's items the last is test, the one before it val")
        if few := int(((lengths < 3) & ~untested).sum()):
            remarks.notes.append(
                f"{few:,} users have fewer than 3 interactions: they are learnt from and not asked for"
            )
    parts[cold[histories.items] & (parts == TRAIN)] = HIDDEN


def _known_first(histories: Histories, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The histories' items renumbered so that those of training come first, and the old number of each."""
    trained = np.zeros(count, bool)
    trained[histories.items[histories.parts == TRAIN]] = True
    order = np.argsort(~trained, kind="stable")
    new = np.empty(count, np.int32)
    new[order] = np.arange(count)
    return new[histories.items], order


def _write(
    tree: Tree, folder: Path, histories: Histories, catalogue: Catalogue, rejects: list[Rejected], remarks: Remarks,
    seed: int,
) -> Manifest:  # fmt: skip
    """Write tables, rejects and the report; returns the manifest."""
    _write_table(histories, folder / "histories-00000.parquet")
    catalogue.write(folder / "items.parquet")
    for name in tree.files:
        if name not in tree.used:
            rejects.append(
                Rejected(name, None, Reason(RejectKind.UNUSED, "neither of the two tables, nor named by them"))
            )
    with (folder / "rejects.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for reject in rejects:
            file.write(json.dumps(reject.row) + "\n")
    if rejects:
        remarks.warnings.append(f"{len(rejects):,} files or rows were not used: see rejects.jsonl.")
    remarks.notes.append(f"{len(histories):,} users, {len(catalogue):,} items, {len(histories.items):,} interactions")
    manifest = _manifest(folder, histories, catalogue, len(rejects), remarks, seed)
    examples, reasons = _examples(histories, catalogue), Counter(reject.kind for reject in rejects)
    name = source_name(tree.source).rstrip("/").rpartition("/")[2]
    (folder / "report.html").write_text(report(manifest, examples, reasons, name), encoding="utf-8", newline="\n")
    return manifest


def _tell_weights(interactions: list[Interaction], recipe: ItemsRecipe, light: int, remarks: Remarks) -> None:
    """Note what weights (ratings) were used for; `light` interactions were left out by them."""
    if recipe.least_weight is not None:
        remarks.notes.append(f"{light:,} interactions of a weight below {recipe.least_weight:g} were left out")
        return
    weights = [one.weight for one in interactions if one.weight is not None]
    if weights and min(weights) < max(weights):
        remarks.warnings.append(
            f"Ratings ({min(weights):g} to {max(weights):g}) are not weighed: what somebody rated counts as chosen, "
            "liked or not. To leave low ones out, set data.items.least_weight in a recipe."
        )


def _write_table(histories: Histories, path: Path) -> None:
    """A row a user, with lists of items, what each is for, and times."""
    offsets = pa.array(histories.starts, pa.int32())

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    times = pa.nulls(len(histories), pa.list_(pa.int64())) if histories.times is None else lists(histories.times)
    table = pa.table(
        {
            "id": pa.array(histories.users, pa.string()),
            "source": pa.array(histories.users, pa.string()),
            "item": lists(histories.items),
            "part": lists(histories.parts),
            "time": times,
        }
    )
    pq.write_table(table, path, compression="zstd", row_group_size=_GROUP)


def _manifest(
    folder: Path, histories: Histories, catalogue: Catalogue, rejected: int, remarks: Remarks, seed: int
) -> Manifest:
    """What the dataset in `folder` holds."""
    lengths = np.diff(histories.starts)
    statistics = Lengths(
        unit="items",
        records=len(histories),
        min=float(lengths.min()),
        mean=round(float(lengths.mean()), 4),
        max=float(lengths.max()),
        distinct=len(catalogue),
    )
    return Manifest(
        version=VERSION,
        source="",
        seed=seed,
        columns={"item": "item"},
        counts={name: int((histories.parts == part).sum()) for part, name in enumerate(SPLITS)},
        rejected=rejected,
        duplicates=0,
        overlap={},
        kind="recommend",
        unit="interactions",
        parts={"items": _shard(folder / "items.parquet", "", len(catalogue))},
        shards=[_shard(folder / "histories-00000.parquet", "train", len(histories))],
        statistics={"item": statistics},
        notes=remarks.notes,
        split_notes=remarks.splits,
        warnings=remarks.warnings,
    )


def _examples(histories: Histories, catalogue: Catalogue) -> list[Example]:
    """The beginnings of some histories, for the report."""
    examples = []
    for user in range(0, len(histories), max(len(histories) // _EXAMPLES, 1))[:_EXAMPLES]:
        items = histories.items[histories.starts[user] : histories.starts[user + 1]][-8:]
        parts: dict[str, str | bytes] = {"item": " → ".join(catalogue.name(int(item)) for item in items)}
        examples.append(Example(histories.users[user], "", parts))
    return examples


def _shard(path: Path, split: str, count: int) -> Shard:
    return Shard(file=path.name, split=split, rows=count, bytes=path.stat().st_size, sha256=sha256_file(path))
