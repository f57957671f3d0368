"""A dataset on disk: Parquet shards for each split and a manifest. Media stay the encoded files they were."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from plait.core.errors import PlaitError
from plait.core.files import intact
from plait.data.record import SPLITS, Record
from plait.data.stores import Location, join, location, open_binary, raise_if_passing, size
from plait.data.views import DatasetViews

VERSION = 1
_CACHE_BYTES = 256 << 20


class Shard(BaseModel):
    """One Parquet file of a dataset."""

    file: str
    split: str
    rows: int
    bytes: int
    sha256: str


class Lengths(BaseModel):
    """A column's lengths: text in UTF-8 bytes, audio in seconds, images in pixels of the longer side."""

    unit: str
    records: int
    min: float
    mean: float
    max: float
    distinct: int | None = None  # text: how many different texts
    classes: dict[str, int] | None = None  # text: count of each, where few short texts repeat
    sizes: dict[str, int] | None = None  # images "WxH", audio "8000 Hz": the most frequent ones


class Manifest(BaseModel):
    """What a dataset holds. `counts` are records by split; `overlap` ("test/train") counts the records of the first
    split whose media (or, without media, text) stand in the second too; `near_duplicates` ("test/train") those of the
    first that have a near-duplicate in the second; `rejected` counts lines of rejects.jsonl, and `dropped` those among
    them that were left out of train for near-duplicates; `chats` are text columns that hold conversations,
    `multi_label` those that hold several labels (`record.split_labels`), `numbers` those that hold numbers to predict.
    `own_splits` says that the source names its splits itself. `group_by` says what groups were made by whose records
    share a split (see grouping.py), `groups` how many of them stand in each, and `group_names` the first ones of each.
    `kind` is "records", or the name of the feature whose data it holds; `unit` says what `counts` count, and
    `parts` are further files of that feature. `notes` are for people, `split_notes` those on how the splits were
    made, `warnings` those on what may be amiss."""

    model_config = ConfigDict(extra="ignore")

    version: int
    source: str
    source_stamp: str = ""  # a hash of the names, sizes and times of the source's files
    seed: int
    columns: dict[str, str]
    counts: dict[str, int]
    rejected: int
    duplicates: int
    overlap: dict[str, int]
    near_duplicates: dict[str, int] = {}
    dropped: int = 0
    chats: list[str] = []
    multi_label: list[str] = []
    numbers: list[str] = []
    own_splits: bool = False
    group_by: str | None = None
    groups: dict[str, int] = {}
    group_names: dict[str, list[str]] = {}
    kind: str = "records"
    unit: str = "records"
    parts: dict[str, Shard] = {}
    shards: list[Shard]
    statistics: dict[str, Lengths]
    notes: list[str]
    split_notes: list[str] = []
    warnings: list[str]

    @property
    def groups_told(self) -> str:
        """How many groups each split has, and which: "train 4 (amy, ben, cid, dan), val 1 (eve)"; "" without any."""
        told = []
        for split, count in self.groups.items():
            names = self.group_names.get(split, [])
            more = ", ..." if len(names) < count else ""
            told.append(f"{split} {count}" + (f" ({', '.join(names)}{more})" if names else ""))
        return ", ".join(told)

    @property
    def texts_distinct(self) -> dict[str, int]:
        """The number of different texts of each text column."""
        return {name: value.distinct for name, value in self.statistics.items() if value.distinct is not None}


def _manifest(path: Location) -> Any:
    """What manifest.json holds. Raises PlaitError."""
    file = join(path, "manifest.json")
    try:
        if size(file) is None:
            raise PlaitError(
                f"{path} is not a dataset (it has no manifest.json). Make one: plait prepare SOURCE -o {path}"
            )
        with open_binary(file) as opened:
            return json.loads(opened.read())
    except OSError as error:
        raise PlaitError(f"{file} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise PlaitError(f"{file} cannot be read as JSON: {error}. Run plait prepare again.") from error


def _sha256(place: Location) -> str:
    with open_binary(place) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class Dataset(DatasetViews):
    """Prepared records, numbered from 0 over all splits: train, then val, then test. Safe to use from threads."""

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.columns: dict[str, str] = dict(manifest.columns)
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.shards])
        self._files: list[pq.ParquetFile | None] = [None] * len(manifest.shards)
        self._groups: list[np.ndarray] = [np.zeros(0, np.int64)] * len(manifest.shards)
        self._cache: OrderedDict[tuple[int, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._cached = 0
        self._last: tuple[tuple[int, int, tuple[str, ...]] | None, pa.Table | None] = None, None  # read in order
        self._lock = threading.Lock()
        self._ids: list[str] | None = None

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Dataset:
        """The dataset in a folder, or at a URL that fsspec reads. Checks that its shards are there in full size, with
        `verify` also their sha256.

        Raises PlaitError naming the file that is missing, cut or changed.
        """
        path = location(path)
        value = _manifest(path)
        if not isinstance(value, dict) or value.get("version") != VERSION:
            version = value.get("version") if isinstance(value, dict) else None
            raise PlaitError(
                f"{path}/manifest.json has version {version}; this Plait reads {VERSION}. Run plait prepare again."
            )
        # An older manifest has no seal; an unknown key without one is a seal whose name was altered.
        if value.keys() - Manifest.model_fields.keys() and not intact(value):
            raise PlaitError(f"{path}/manifest.json was altered. Copy the dataset again, or run plait prepare again.")
        try:
            manifest = Manifest.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlaitError(
                f"{path}/manifest.json is damaged: {where}: {first['msg']}. Run plait prepare again."
            ) from error
        for shard in [*manifest.shards, *manifest.parts.values()]:
            file = join(path, shard.file)
            if Path(shard.file).name != shard.file:
                raise PlaitError(f"{path}/manifest.json names a file outside of the dataset: {shard.file}.")
            try:
                length = size(file)
                if length is None:
                    raise PlaitError(f"{file} is missing. Copy the dataset again, or run plait prepare again.")
                if length != shard.bytes or (verify and _sha256(file) != shard.sha256):
                    raise PlaitError(f"{file} is damaged. Copy the dataset again, or run plait prepare again.")
            except OSError as error:
                raise PlaitError(f"{file} cannot be read: {error}.") from error
        return cls(path, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def indices(self, split: str) -> np.ndarray:
        """The numbers (int64) of a split's records: "train", "val" or "test"."""
        if split not in SPLITS:
            raise PlaitError(f"Unknown split '{split}'. Splits are {', '.join(SPLITS)}.")
        pieces = [
            np.arange(self._starts[n], self._starts[n + 1], dtype=np.int64)
            for n, shard in enumerate(self.manifest.shards)
            if shard.split == split
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def group_sizes(self, split: str) -> list[int]:
        """How many records of a split each of its row groups holds, in the order of `indices`."""
        sizes = []
        for shard, numbers in _runs(self.indices(split), self._starts):
            with self._lock:
                self._file(shard)  # its row groups are known then
            sizes += [len(inside) for _, inside in _runs(numbers - self._starts[shard], self._groups[shard])]
        return sizes

    @property
    def ids(self) -> list[str]:
        """The id of every record."""
        if self._ids is None:
            self._ids = [str(value) for value in self._column("id")]
        return self._ids

    def texts(self, column: str) -> Texts:
        """The text of every record in a text column, read when asked for; None where a record has none."""
        self._known([column])
        if self.columns[column] != "text":
            raise PlaitError(f"Column '{column}' of {self.path} holds {self.columns[column]}, not text.")
        return Texts(self, column)

    def seen(self) -> np.ndarray:
        """Which records (N,) of val and test have an equal or near-equal one in train: true for those."""
        has_column = len(self) and "seen" in self._file(0).schema_arrow.names  # not in datasets of an early Plait
        if not has_column or not (self.manifest.near_duplicates or self.manifest.overlap):
            return np.zeros(len(self), bool)
        return np.array(self._column("seen"), bool)

    @property
    def groups(self) -> list[str | None] | None:
        """The group of every record, None for one without; None where there are no groups."""
        if "groups" not in self.manifest.parts:
            return None
        place = join(self.path, self.manifest.parts["groups"].file)
        with open_binary(place) as file:
            return list(pq.read_table(file)["group"].to_pylist())

    def record(self, index: int, columns: Sequence[str] | None = None) -> Record:
        """Record number `index`, with only the named columns where `columns` is given."""
        return next(self.iterate([index], columns))

    def iterate(self, indices: Iterable[int] | None = None, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Records in the order of `indices` (all where None), read by row groups with bounded memory.

        Ascending indices read every row group once; a random order is served from a cache of some 256 MiB.
        """
        names = list(self.columns) if columns is None else list(columns)
        self._known(names)
        columns_read = ("id", "source", *names)
        for index in range(len(self)) if indices is None else indices:
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            shard = int(np.searchsorted(self._starts, index, side="right")) - 1
            table, row = self._group(shard, int(index - self._starts[shard]), columns_read)
            values = {name: table.column(name)[row].as_py() for name in columns_read}
            parts = {name: values[name] for name in names if values[name] is not None}
            yield Record(values["id"], self.manifest.shards[shard].split, parts, values["source"])

    def cells(self, column: str, indices: np.ndarray) -> Iterator[pa.Array]:
        """The values of a column (or of "id") for ascending `indices`, an Arrow array for each row group: no Python
        object a record, and no more than a few row groups in memory."""
        if column != "id":
            self._known([column])
        for shard, numbers in _runs(indices, self._starts):
            with self._lock:
                self._file(shard)  # its row groups are known then
            rows = numbers - self._starts[shard]
            for group, inside in _runs(rows, self._groups[shard]):
                table, _ = self._group(shard, int(inside[0]), (column,), keep=False)
                taken = table.column(column).take(pa.array(inside - self._groups[shard][group]))
                yield taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken

    def _known(self, columns: Sequence[str]) -> None:
        for column in columns:
            if column not in self.columns:
                raise PlaitError(f"{self.path} has no column '{column}'. Columns: {', '.join(self.columns)}.")

    def _file(self, shard: int) -> pq.ParquetFile:
        file = self._files[shard]
        if file is None:
            name = join(self.path, self.manifest.shards[shard].file)
            try:
                file = pq.ParquetFile(name if isinstance(name, Path) else open_binary(name), memory_map=True)
            except (OSError, pa.ArrowException) as error:
                raise_if_passing(error, str(name))
                raise PlaitError(f"{name} is damaged: {error}. Run plait prepare again.") from error
            rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            self._files[shard], self._groups[shard] = file, np.cumsum([0, *rows])
        return file

    def _group(self, shard: int, row: int, columns: tuple[str, ...], keep: bool = True) -> tuple[pa.Table, int]:
        """A row's group, and its place in there. What is read in order is not kept: it is read once."""
        with self._lock:
            file = self._file(shard)
            group = int(np.searchsorted(self._groups[shard], row, side="right")) - 1
            key = shard, group, columns
            table = self._cache[key] if key in self._cache else self._last[1] if self._last[0] == key else None
            if table is None:
                table = self._read(file, shard, group, columns)
                if not keep:
                    self._last = key, table
                    return table, row - int(self._groups[shard][group])
                self._cache[key] = table
                self._cached += table.nbytes
                while self._cached > _CACHE_BYTES and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
            elif key in self._cache:
                self._cache.move_to_end(key)
            return table, row - int(self._groups[shard][group])

    def _read(self, file: pq.ParquetFile, shard: int, group: int | None, columns: Sequence[str]) -> pa.Table:
        try:
            columns_read = list(columns)
            table = file.read(columns_read) if group is None else file.read_row_group(group, columns_read)
            return table.combine_chunks()
        except (OSError, ValueError, pa.ArrowException) as error:
            name = join(self.path, self.manifest.shards[shard].file)
            raise_if_passing(error, str(name))
            raise PlaitError(f"{name} is damaged: {error}. Run plait prepare again.") from error

    def _column(self, name: str) -> list[Any]:
        values: list[Any] = []
        for shard in range(len(self.manifest.shards)):
            with self._lock:
                values.extend(self._read(self._file(shard), shard, None, [name]).column(0).to_pylist())
        return values

    def __getstate__(self) -> dict[str, Any]:
        # Open files, the lock and the cache stay behind when a dataset goes to another process.
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["manifest"])  # type: ignore[misc]


class Texts(Sequence[str | None]):
    """The texts of a column by record. A few thousand of them are in memory at a time, so that ascending access is as
    fast as a list's, and a large column costs nothing."""

    BLOCK, BLOCKS = 2048, 4  # records that are read at once; blocks that are kept

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset, self.column = dataset, column
        self._blocks: OrderedDict[int, list[str | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), self.BLOCK):
            yield from self._read(np.arange(start, min(start + self.BLOCK, len(self))))

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    @overload
    def __getitem__(self, index: np.ndarray) -> np.ndarray: ...
    def __getitem__(self, index: Any) -> Any:
        """A text; of an array of numbers, in any order, an array of objects."""
        if isinstance(index, slice):
            return self._read(np.arange(len(self))[index])
        if isinstance(index, np.ndarray):
            texts = np.empty(len(index), object)
            order = np.argsort(index, kind="stable")
            texts[order] = self._read(index[order])
            return texts
        place = range(len(self))[int(index)]  # raises IndexError
        number, inside = divmod(place, self.BLOCK)
        if number not in self._blocks:
            start = number * self.BLOCK
            self._blocks[number] = self._read(np.arange(start, min(start + self.BLOCK, len(self))))
            if len(self._blocks) > self.BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number][inside]

    def _read(self, ascending: np.ndarray) -> list[str | None]:
        if not len(ascending):
            return []
        return [text for cells in self.dataset.cells(self.column, ascending) for text in cells.to_pylist()]


def _runs(indices: np.ndarray, borders: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cut ascending indices where they cross a border: (number of the piece between borders, its indices)."""
    piece = np.searchsorted(borders, indices, side="right") - 1
    cuts = np.concatenate(([0], np.flatnonzero(np.diff(piece)) + 1, [len(indices)]))
    for start, stop in pairwise(cuts.tolist()):
        if stop > start:
            yield int(piece[start]), indices[start:stop]


class ConcatDataset(Dataset):
    """Several datasets as one, the first one's records coming first. Columns of one name are one column; `source` says
    where a record is from."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        """Raises PlaitError where two of them disagree about what a column holds."""
        columns: dict[str, str] = {}
        for dataset in datasets:
            for name, kind in dataset.columns.items():
                if columns.setdefault(name, kind) != kind:
                    raise PlaitError(
                        f"Column '{name}' holds {kind} in {dataset.path}, and {columns[name]} in another dataset. "
                        f"Give it another name: plait prepare --map {kind}={name}:NEWNAME."
                    )
        first = datasets[0].manifest
        every = [dataset.manifest for dataset in datasets]
        joined = {
            "columns": columns,
            "counts": {split: sum(m.counts.get(split, 0) for m in every) for split in SPLITS},
            "shards": [shard for m in every for shard in m.shards],
            "chats": list(dict.fromkeys(name for m in every for name in m.chats)),
            "multi_label": list(dict.fromkeys(name for m in every for name in m.multi_label)),
            "numbers": list(dict.fromkeys(name for m in every for name in m.numbers)),
        }
        super().__init__(datasets[0].path, first.model_copy(update=joined))
        self.datasets = list(datasets)
        self._offsets = np.cumsum([0, *(len(dataset) for dataset in datasets)])

    def source(self, indices: np.ndarray) -> np.ndarray:
        """Which of the datasets each record (N,) is from, counted from 0."""
        return np.searchsorted(self._offsets, indices, side="right") - 1

    def indices(self, split: str) -> np.ndarray:
        pairs = zip(self.datasets, self._offsets, strict=False)
        return np.concatenate([dataset.indices(split) + offset for dataset, offset in pairs])

    def group_sizes(self, split: str) -> list[int]:
        return [size for dataset in self.datasets for size in dataset.group_sizes(split)]

    def iterate(self, indices: Iterable[int] | None = None, columns: Sequence[str] | None = None) -> Iterator[Record]:
        self._known(list(columns or []))
        for index in range(len(self)) if indices is None else indices:
            which = int(self.source(np.array(index)))
            dataset = self.datasets[which]
            names = [name for name in dataset.columns if columns is None or name in columns]
            yield dataset.record(int(index - self._offsets[which]), names)

    def cells(self, column: str, indices: np.ndarray) -> Iterator[pa.Array]:
        for which, numbers in _runs(indices, self._offsets):
            dataset = self.datasets[which]
            if column == "id" or column in dataset.columns:
                yield from dataset.cells(column, numbers - self._offsets[which])
            else:
                yield pa.nulls(len(numbers), pa.large_string())

    def _column(self, name: str) -> list[Any]:
        values: list[Any] = []
        for dataset in self.datasets:
            present = name == "id" or name in dataset.columns
            values += dataset._column(name) if present else [None] * len(dataset)
        return values

    def seen(self) -> np.ndarray:
        return np.concatenate([dataset.seen() for dataset in self.datasets])

    def __getstate__(self) -> dict[str, Any]:
        return {"datasets": self.datasets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["datasets"])  # type: ignore[misc]


class SubsetDataset(Dataset):
    """A dataset of whose splits only some records are used; numbers and ids stay what they are."""

    def __init__(self, dataset: Dataset, chosen: dict[str, np.ndarray]) -> None:
        """`chosen` has the records (numbers, ascending) of the splits that are cut; the others stay whole."""
        counts = {split: len(numbers) for split, numbers in chosen.items()}
        all_counts = {**dataset.manifest.counts, **counts}
        super().__init__(dataset.path, dataset.manifest.model_copy(update={"counts": all_counts}))
        self.dataset, self.chosen = dataset, chosen

    def indices(self, split: str) -> np.ndarray:
        return self.chosen[split] if split in self.chosen else super().indices(split)

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["dataset"], state["chosen"])  # type: ignore[misc]
