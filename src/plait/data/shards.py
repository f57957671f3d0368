"""The writing end of a dataset: shards of one split, a row group at a time, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.core.files import sha256_file
from plait.data.dataset import Lengths, Shard
from plait.modalities.media import MEDIA

_GROUP_BYTES, _GROUP_ROWS = 4 << 20, 1024
_SHARD_BYTES = 256 << 20
_CLASSES_MOST = 256


def byte_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """The bytes of each value of a text or binary column, int64; 0 where there is none."""
    lengths = pc.fill_null(pc.binary_length(column.cast(pa.large_binary())), 0)
    return lengths.to_numpy().astype(np.int64)


@dataclass
class Statistics:
    """What is counted about a column while records go by."""

    kind: str
    records: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = 0.0
    texts: Counter[str] | None = field(default_factory=Counter)  # None: too many, or too long
    hashes: list[np.ndarray] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table, name: str) -> None:
        """Count a column of a chunk's table (see work.py); rows without a value do not count."""
        table = table.filter(pc.is_valid(table[f"part:{name}"]))
        if not len(table):
            return
        if self.kind == "text":
            values = table[f"part:{name}"]
            lengths = byte_lengths(values).astype(np.float64)
            texts = values.to_pylist()
            self.hashes.append(np.unique(np.fromiter(map(hash, texts), np.int64, len(texts))))
            if self.texts is not None:
                self.texts.update(texts)
                if lengths.max() > 200 or len(self.texts) > _CLASSES_MOST:
                    self.texts = None
        else:
            first, second = (table[f"{fact}:{name}"].to_numpy() for fact in ("first", "second"))
            lengths = MEDIA[self.kind].length(first, second)
            pairs, counts = np.unique(np.stack([first, second], 1), axis=0, return_counts=True)
            for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True):
                self.sizes[MEDIA[self.kind].size_name(a, b)] += count
        self.records += len(table)
        self.total += float(lengths.sum())
        self.low, self.high = min(self.low, float(lengths.min())), max(self.high, float(lengths.max()))

    def lengths(self) -> Lengths:
        """The figures, once all records were counted."""
        few = self.kind == "text" and self.texts is not None and len(self.texts) * 2 <= max(self.records, 4)
        return Lengths(
            unit="bytes" if self.kind == "text" else MEDIA[self.kind].unit,
            records=self.records,
            min=round(self.low, 4),
            mean=round(self.total / self.records, 4),
            max=round(self.high, 4),
            distinct=len(np.unique(np.concatenate(self.hashes))) if self.kind == "text" else None,
            classes=dict(sorted(self.texts.items())) if few and self.texts else None,
            sizes=dict(sorted(self.sizes.most_common(10))) if self.kind != "text" else None,
        )


class Shards:
    """Writes the shards of one split. Where a row group ends depends on the rows alone."""

    def __init__(self, folder: Path, split: str, columns: dict[str, str]) -> None:
        self.folder, self.split = folder, split
        kinds = {"id": "text", "source": "text", **columns}
        types: dict[str, Any] = {n: pa.large_string() if k == "text" else pa.large_binary() for n, k in kinds.items()}
        types |= {"id": pa.string(), "source": pa.string(), "seen": pa.bool_()}
        self.schema = pa.schema(types)
        self.texts = [name for name, kind in kinds.items() if kind == "text"]
        self.done: list[Shard] = []
        self.pending: list[pa.Table] = []
        self.rows = self.bytes = self.shard_rows = self.shard_bytes = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append rows; columns that the table lacks have no value in them."""
        absent = [name for name in self.schema.names if name not in table.column_names]
        for name in absent:
            table = table.append_column(name, pa.nulls(len(table), self.schema.field(name).type))
        table = table.select(self.schema.names).cast(self.schema)
        sizes = sum(byte_lengths(table[name]) for name in self.schema.names[2:] if name != "seen")
        ends = np.cumsum(np.broadcast_to(sizes, len(table)))
        start = 0
        while start < len(table):
            before = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + _GROUP_BYTES - self.bytes)) + 1
            stop = min(full, start + _GROUP_ROWS - self.rows, len(table))
            self.pending.append(table.slice(start, stop - start))
            self.rows += stop - start
            self.bytes += int(ends[stop - 1]) - before
            start = stop
            if self.bytes >= _GROUP_BYTES or self.rows >= _GROUP_ROWS:
                self._flush()

    def _name(self) -> str:
        return f"{self.split}-{len(self.done):05d}.parquet"

    def _flush(self) -> None:
        if not self.rows:
            return
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.folder / self._name(),
                self.schema,
                # Encoded media do not get smaller.
                compression={name: "zstd" if name in self.texts else "none" for name in self.schema.names},
                # An image with five captions stands in five rows, and once in its row group's dictionary.
                use_dictionary=[name for name in self.schema.names if name not in ("id", "seen")],
                dictionary_pagesize_limit=4 * _GROUP_BYTES,
                write_statistics=False,
            )
        self.writer.write_table(pa.concat_tables(self.pending).combine_chunks(), row_group_size=self.rows)
        self.shard_rows += self.rows
        self.shard_bytes += self.bytes
        self.pending, self.rows, self.bytes = [], 0, 0
        if self.shard_bytes >= _SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """End the shard at hand; the finished ones are in `done`."""
        self._flush()
        if self.writer is None:
            return
        self.writer.close()
        path = self.folder / self._name()
        shard = Shard(file=path.name, split=self.split, rows=self.shard_rows, bytes=path.stat().st_size,
                      sha256=sha256_file(path))  # fmt: skip
        self.done.append(shard)
        self.writer, self.shard_rows, self.shard_bytes = None, 0, 0
