"""What stands twice in a dataset: equal and near-equal media and texts, within splits and across them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from plait.data.fingerprints import PERMUTATIONS
from plait.data.near import MOST, MOST_TEXTS, NEAR, NO_PAIRS, Fingerprints, Pairs, near_texts
from plait.data.record import SPLITS
from plait.modalities.media import MEDIA


def first_of(keys: np.ndarray) -> np.ndarray:
    """For each key (N, 2), the number (N,) of the first that equals it."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    changed = np.ones(len(keys), bool)
    changed[1:] = (keys[order][1:] != keys[order][:-1]).any(1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(changed)][np.cumsum(changed) - 1]
    return first


class SplitPair(NamedTuple):
    """Two splits, of which the later one holds something that stands in the earlier one too."""

    later: str
    earlier: str


@dataclass
class Duplicates:
    """What was found. Records (N,) are those that are used, in order.

    `seen`: records of val and test that have an equal or near-equal one in train. `spoils`: those of train that have
    one in val or test. `near`: a bit for each split in which a record has a near-duplicate other than itself.
    """

    seen: np.ndarray
    spoils: np.ndarray
    near: np.ndarray
    twins: dict[int, str] = field(default_factory=dict)
    unsearched: dict[str, int] = field(default_factory=dict)  # kind -> how many there are: too many

    @classmethod
    def none(cls, count: int) -> Duplicates:
        """Nothing found, or not looked for."""
        return cls(np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, np.uint8))

    def twin(self, record: int) -> str:
        """The id of a record of val or test that one of train spoils, with its split."""
        return self.twins[record]

    def counts(self, split: np.ndarray, keep: np.ndarray) -> dict[SplitPair, int]:
        """Records of one split that have a near-duplicate in another or the same."""
        by_pair = {}
        for first, second in combinations_with_replacement(range(len(SPLITS)), 2):
            # What was left out of train is gone, and with it all that was near across that border.
            if first == 0 < second and not keep.all():
                continue
            count = int((keep & (split == second) & (self.near >> first & 1 == 1)).sum())
            if count:
                by_pair[SplitPair(SPLITS[second], SPLITS[first])] = count
        return by_pair


@dataclass
class _Parts:
    """The media of one kind, or the texts of records without media: where they stand, and what they are."""

    owner: list[np.ndarray] = field(default_factory=list)  # records
    digest: list[np.ndarray] = field(default_factory=list)  # (n, 2) of what each of these records holds


@dataclass(frozen=True)
class _Columns:
    """The columns of a chunk that tell of parts of one kind."""

    prints: str
    digests: str
    kind: str


def _rows(paths: list[Path], used: np.ndarray) -> Iterator[tuple[pa.Table, _Columns, np.ndarray, np.ndarray]]:
    """For each chunk and its columns: the chunk, the columns, the rows that have such a part, and their records."""
    place = number = 0
    for path in paths:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            kinds = json.loads(table.schema.metadata[b"kinds"])
            here = used[place : place + len(table)]
            place += len(table)
            columns = [_Columns("words", "group", "text")]
            columns += [_Columns(f"print:{name}", f"digest:{name}", k) for name, k in kinds.items() if k != "text"]
            for one in columns:
                rows = np.flatnonzero(here & table[one.prints].is_valid().to_numpy())
                yield table, one, rows, number + np.cumsum(here)[rows] - 1
            number += int(here.sum())


def _collect(paths: list[Path], used: np.ndarray) -> dict[str, _Parts]:
    """The parts by kind."""
    parts = {kind: _Parts() for kind in (*MEDIA, "text")}
    for table, columns, rows, records in _rows(paths, used):
        raw = b"".join(table[columns.digests].take(pa.array(rows)).to_pylist())
        parts[columns.kind].owner.append(records)
        parts[columns.kind].digest.append(np.frombuffer(raw, "<u8").reshape(-1, 2))
    return parts


def _write_prints(paths: list[Path], used: np.ndarray, kind: str, numbers: np.ndarray, file: Path) -> Fingerprints:
    """The fingerprints of the parts of a kind whose numbers, in the order of `_collect`, are `numbers` (ascending)."""
    offsets = [np.zeros(1, np.int64)]
    before = size = 0
    with file.open("wb") as out:
        for table, columns, rows, _ in _rows(paths, used):
            if columns.kind != kind:
                continue
            chosen = numbers[np.searchsorted(numbers, before) : np.searchsorted(numbers, before + len(rows))] - before
            before += len(rows)
            values = table[columns.prints].take(pa.array(rows[chosen])).to_pylist()
            out.write(b"".join(values))
            offsets.append(size + np.cumsum([len(value) for value in values], dtype=np.int64))
            size = int(offsets[-1][-1]) if len(values) else size
    return Fingerprints(file, np.concatenate(offsets))


def find_duplicates(paths: list[Path], used: np.ndarray, split: np.ndarray, out: Path) -> Duplicates:
    """Compare the records of chunks (see work.py) by their media, and those without media by their text.

    `used` says which records count, `split` (N,) where those are. Every pair is written to `out`, a line each.
    """
    duplicates = Duplicates.none(len(split))
    lines: list[tuple[int, int, str, float]] = []
    for kind, collected in _collect(paths, used).items():
        if not sum(map(len, collected.owner)):
            continue
        owner, digest = np.concatenate(collected.owner), np.concatenate(collected.digest)
        distinct, thing = np.unique(first_of(digest), return_inverse=True)
        if len(distinct) > _most(kind):
            duplicates.unsearched[kind] = len(distinct)
            a, b, distance = NO_PAIRS
        else:
            with tempfile.TemporaryDirectory(dir=paths[0].parent) as scratch:
                a, b, distance = _near(kind, _write_prints(paths, used, kind, distinct, Path(scratch) / "prints"))
        # The splits, as bits, in which a thing occurs, and in which things near to it do.
        where = np.zeros(len(distinct), np.uint8)
        np.bitwise_or.at(where, thing, (1 << split[owner]).astype(np.uint8))
        near = np.zeros(len(distinct), np.uint8)
        np.bitwise_or.at(near, a, where[b])
        np.bitwise_or.at(near, b, where[a])
        np.bitwise_or.at(duplicates.near, owner, near[thing])
        both = (where | near)[thing]
        duplicates.seen[owner[(split[owner] > 0) & (both & 1 == 1)]] = True
        duplicates.spoils[owner[(split[owner] == 0) & (both & 6 > 0)]] = True
        lines += _lines(kind, owner, thing, split, where, (a, b, distance))
    _write(paths, used, split, lines, duplicates, out)
    return duplicates


def _most(kind: str) -> int:
    """Distinct things of a kind up to which near-duplicates are looked for: what fits into some hundred megabytes."""
    return MOST[MEDIA[kind].comparison] if kind in MEDIA else MOST_TEXTS


def _near(kind: str, prints: Fingerprints) -> Pairs:
    if kind in MEDIA:
        return NEAR[MEDIA[kind].comparison](prints)
    long = prints.there()
    a, b, distance = near_texts(prints.matrix("<u4", PERMUTATIONS))
    return long[a], long[b], distance


def _lines(
    kind: str, owner: np.ndarray, thing: np.ndarray, split: np.ndarray, where: np.ndarray, pairs: Pairs
) -> list[tuple[int, int, str, float]]:
    """Two records, the kind and the distance: for each pair of near things, and each thing in two splits at distance
    0. Of a thing's records the first in each split stands for all."""
    order = np.lexsort((np.arange(len(owner)), split[owner], thing))
    stands: dict[int, dict[int, int]] = {}
    listed = np.zeros(len(where), bool)
    listed[pairs[0]] = listed[pairs[1]] = True
    listed |= np.bitwise_count(where) > 1
    for n in order[listed[thing[order]]].tolist():
        stands.setdefault(int(thing[n]), {}).setdefault(int(split[owner[n]]), int(owner[n]))
    lines = []
    for records in stands.values():
        chosen = list(records.values())
        lines += [(chosen[0], other, kind, 0.0) for other in chosen[1:]]
    for a, b, distance in zip(*(values.tolist() for values in pairs), strict=True):
        for x in stands[a].values():
            lines += [(x, y, kind, round(distance, 4)) for y in stands[b].values()]
    return lines


def _write(
    paths: list[Path],
    used: np.ndarray,
    split: np.ndarray,
    lines: list[tuple[int, int, str, float]],
    duplicates: Duplicates,
    out: Path,
) -> None:
    """One line for each pair, and the twins of what spoils val or test."""
    # The earlier split stands first.
    lines = sorted((b, a, k, d) if (split[b], b) < (split[a], a) else (a, b, k, d) for a, b, k, d in lines)
    numbers = np.unique(np.array([line[:2] for line in lines], np.int64))
    ids_and_sources = dict(zip(numbers.tolist(), _ids_and_sources(paths, used, numbers), strict=True))

    def shown(record: int) -> dict[str, Any]:
        return {"id": ids_and_sources[record][0], "split": SPLITS[split[record]], "source": ids_and_sources[record][1]}

    with out.open("w", encoding="utf-8", newline="\n") as file:
        for a, b, kind, distance in lines:
            for x, y in ((a, b), (b, a)):
                if split[x] == 0 < split[y]:
                    duplicates.twins.setdefault(x, f"'{ids_and_sources[y][0]}' of {SPLITS[split[y]]}")
            entry = {"kind": kind, "distance": distance, "first": shown(a), "second": shown(b)}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def list_equal(paths: list[Path], used: np.ndarray, split: np.ndarray, content: np.ndarray, out: Path) -> None:
    """Append to `out` a line for each record that repeats an earlier one in all its parts. `content` (N, 2) are digests
    of the records that are used."""
    first = first_of(content)
    repeated = np.flatnonzero(first != np.arange(len(first)))
    numbers = np.unique(np.concatenate((repeated, first[repeated])))
    ids_and_sources = dict(zip(numbers.tolist(), _ids_and_sources(paths, used, numbers), strict=True))
    with out.open("a", encoding="utf-8") as file:
        for record in repeated.tolist():
            entry: dict[str, Any] = {"kind": "record", "distance": 0.0}
            for name, one in (("first", int(first[record])), ("second", record)):
                entry[name] = {
                    "id": ids_and_sources[one][0],
                    "split": SPLITS[split[one]],
                    "source": ids_and_sources[one][1],
                }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _ids_and_sources(paths: list[Path], used: np.ndarray, numbers: np.ndarray) -> list[tuple[str, str]]:
    """(id, source) of records by their number among the used ones, ascending."""
    ids_and_sources: list[tuple[str, str]] = []
    place = number = 0
    for path in paths:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            rows = np.flatnonzero(used[place : place + len(table)])
            place += len(table)
            here = numbers[(numbers >= number) & (numbers < number + len(rows))] - number
            part = table.select(["id", "place"]).take(pa.array(rows[here])).to_pydict()
            ids_and_sources += zip(part["id"], part["place"], strict=True)
            number += len(rows)
    return ids_and_sources
