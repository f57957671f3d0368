"""Texts as token ids on disk: made once, memory-mapped, with no Python object a record or a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from plait.data.samples import Samples, SampleWriter, mapped

Encode = Callable[[list[str]], Sequence[Sequence[int]]]

IDS_BLOCK = 1 << 16  # records in a block of a file of ids
PART = 1 << 23  # tokens after which what was tokenised is kept: a few seconds of work


class Tokens:
    """The token ids of a column's texts by record; None where a record has no text.

    `samples` holds those of the records that have one, back to back on disk, and `rows` (N,) the number there of each
    record, -1 where absent. What is added later (`extend`) is kept in memory.
    """

    def __init__(self, samples: Samples, rows: np.ndarray) -> None:
        self.samples, self.rows = samples, rows
        self.more: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, record: int) -> list[int] | None:
        row = int(self.rows[record])
        if row < 0:
            return None
        stored = len(self.samples)
        return self.samples[row].tolist() if row < stored else list(self.more[row - stored])

    def has(self, record: int) -> bool:
        """Whether a record has a text."""
        return bool(self.rows[record] >= 0)

    @property
    def present(self) -> np.ndarray:
        """(N,) whether a record has a text."""
        return self.rows >= 0

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each record's text, 0 where it has none."""
        all_lengths = np.concatenate((self.samples.lengths, [len(ids) for ids in self.more], [0])).astype(np.int64)
        return all_lengths[self.rows]  # -1 is the last, which is 0

    def extend(self, texts: Iterable[list[int] | None]) -> None:
        """Add records."""
        rows = []
        for ids in texts:
            rows.append(-1 if ids is None else len(self.samples) + len(self.more))
            if ids is not None:
                self.more.append(ids)
        self.rows = np.concatenate((self.rows, np.array(rows, self.rows.dtype)))


class Ids:
    """The ids of records as Arrow strings; an id is a Python object only when it is asked for."""

    def __init__(self, values: Sequence[pa.Array]) -> None:
        """Raises nothing; `values` are string arrays, the records' ids one after another."""
        self.values = pa.chunked_array([array.cast(pa.large_string()) for array in values], pa.large_string())

    @classmethod
    def write(cls, path: Path, values: Iterable[pa.Array]) -> Ids:
        """Store the ids, a block of them in memory at a time, and map them."""
        schema = pa.schema({"id": pa.large_string()})
        waiting: list[pa.Array] = []

        def flush(writer: pa.RecordBatchWriter) -> None:
            if waiting:
                writer.write_batch(pa.record_batch([pa.concat_arrays(waiting)], schema=schema))
                waiting.clear()

        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for array in values:
                waiting.append(array.cast(pa.large_string()))
                if sum(map(len, waiting)) >= IDS_BLOCK:
                    flush(writer)
            flush(writer)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Ids:
        """Map what `write` stored. Raises OSError or ArrowException where it is missing or cut."""
        ids = cls([])
        ids.values = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["id"]
        return ids

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, record: int) -> str:
        return str(self.values[int(record)].as_py())

    def __iter__(self) -> Iterator[str]:
        return (str(value.as_py()) for value in self.values)

    def extend(self, ids: Iterable[str]) -> None:
        """Add records."""
        self.values = pa.chunked_array([*self.values.chunks, pa.array(list(ids), pa.large_string())])


def write_tokens(
    path: Path, texts: Iterable[pa.Array], encode: Encode, vocabulary: int, key: str = "", part: int = PART
) -> Tokens:
    """Tokenise texts and store them under `path`, a block in memory at a time. Stopped, it goes on from the last `part`
    tokens that were written, where the same `key` is given.

    Args:
        path: as in `Samples.write`; the records' numbers are in a file beside it.
        texts: string arrays, the texts of consecutive records, null where one has none.
        encode: a list of texts to their ids.
        vocabulary: one more than the largest id.
        key: what tells these texts and this tokenizer from others; where empty, nothing is gone on with.
        part: tokens after which what is done is kept.
    """
    kind = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    rows: list[np.ndarray] = []
    count = 0
    with SampleWriter(path, (), kind, key) as writer:
        kept = writer.total
        for array in texts:
            there = array.is_valid().to_numpy(zero_copy_only=False)
            rows.append(np.where(there, count - 1 + np.cumsum(there), -1))
            count += int(there.sum())
            if count <= len(writer):
                continue  # tokenised before
            for ids in encode([value for value in array.to_pylist() if value is not None]):
                writer.add(np.array(ids, kind))
            if key and writer.total - kept >= part:
                writer.keep()
                kept = writer.total
        writer.finish()
    numbers = np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)
    np.save(path.with_name(path.name + ".rows.npy"), numbers)
    return open_tokens(path)


def open_tokens(path: Path) -> Tokens:
    """Map what `write_tokens` stored. Raises PlaitError naming the file that is missing or cut."""
    return Tokens(Samples.open(path), mapped(path.with_name(path.name + ".rows.npy")))
