"""Adding to an index: what became of entries (see embedding.py) is written in whole batches."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from plait.core.rejects import Reason
from plait.data.record import Rejected, rejected
from plait.search.embedding import Outcome
from plait.search.entries import Entry

if TYPE_CHECKING:
    from plait.search.index import Index

OWN = ("id", "source", "kind", "split", "text")  # columns of every index that --where may name
TIMES = ("start", "stop")  # seconds, of moments of a medium
COMMIT, COMMIT_SECONDS = 1024, 15.0  # entries, or seconds, after which what is embedded is written

Progress = Callable[[str, int, int | None], None]


def checksums(ids: list[str], contents: list[bytes], vectors: np.ndarray) -> np.ndarray:
    """A crc32 (N,) uint32 of each entry's id, content hash and vector."""
    rows = zip(ids, contents, np.ascontiguousarray(vectors, np.float32), strict=True)
    return np.array([zlib.crc32(v.tobytes(), zlib.crc32(i.encode() + c)) for i, c, v in rows], np.uint32)


class Adding:
    """Entries on their way into an index: numbered, compared with what is there, written."""

    def __init__(self, index: Index, progress: Progress) -> None:
        self.index, self.progress = index, progress
        self.new = self.changed = self.same = 0
        self.rejected: list[Rejected] = []
        self.rows: list[dict[str, Any]] = []
        self.begun = time.monotonic()
        with index.reading():
            index.table.checkout_latest()
            there = index.table.search().select(["id", "_content"]).limit(None).to_arrow()
        self.known = dict(zip(there["id"].to_pylist(), there["_content"].to_pylist(), strict=True))
        self.seen: dict[str, int] = {}

    def numbered(self, items: list[Entry | Rejected]) -> list[Entry]:
        """The entries among these, each with an id of its own; what was refused is noted."""
        entries = []
        for item in items:
            if isinstance(item, Rejected):
                self.rejected.append(item)
                continue
            count = self.seen[item.id] = self.seen.get(item.id, 0) + 1
            if count > 1:  # records of one table may share an id
                item.id += f"~{count}"
            entries.append(item)
        return entries

    def known_of(self, items: list[Entry]) -> dict[str, bytes]:
        """The digests of those that are in the index."""
        return {item.id: self.known[item.id] for item in items if item.id in self.known}

    def put(self, items: list[Entry], outcomes: list[Outcome]) -> None:
        """Take over what became of entries; write where that is due."""
        for item, outcome in zip(items, outcomes, strict=True):
            if outcome.reason is not None:
                self._reject(item, outcome.reason)
            self.same += outcome.same
            for part in outcome.parts:
                if isinstance(part.vector, Reason):
                    self._reject(item, part.vector)
                    continue
                self._row(item, outcome.digest, part.vector, outcome.preview)
                if part.start is not None:
                    self._at(item, part.start, part.stop)
        if len(self.rows) >= COMMIT or time.monotonic() - self.begun > COMMIT_SECONDS:
            self.commit()

    def _reject(self, item: Entry, reason: Reason) -> None:
        self.rejected.append(rejected(item.source, reason))

    def _row(self, item: Entry, digest: bytes, vector: np.ndarray, small: bytes | None) -> None:
        text = item.value if isinstance(item.value, str) else "\n".join(item.texts.values())
        row: dict[str, Any] = {
            "id": item.id,
            "source": item.source,
            "kind": item.kind,
            "split": item.split,
            "text": text or None,
        }
        row |= {"_content": digest, "_vector": vector, "_preview": small}
        self.rows.append(row | {_named(name): value for name, value in item.texts.items()})

    def _at(self, item: Entry, start: float, stop: float | None) -> None:
        """Say of the last row that it is a moment; the first one of a medium has the medium's id."""
        self.rows[-1] |= {"start": start, "stop": stop}
        if start > 0:
            self.rows[-1]["id"] = f"{item.id}@{start:g}"
        elif item.id in self.known:  # its moments of before are none any more
            with self.index.reading("written"):
                begin = f"{item.id}@".replace("'", "''")
                self.index.table.delete(f"starts_with(id, '{begin}')")

    def commit(self) -> None:
        """Write what is embedded, in one step that happens or does not."""
        rows, index = self.rows, self.index
        self.rows, self.begun = [], time.monotonic()
        if rows:
            with index.reading("written"):
                table = index.table
                there = set(table.schema.names)
                if names := dict.fromkeys(name for row in rows for name in row if name not in there):
                    kinds = {name: pa.float64() if name in TIMES else pa.string() for name in names}
                    table.add_columns([pa.field(name, kind) for name, kind in kinds.items()])
                schema = table.schema
                vectors = np.stack([row.pop("_vector") for row in rows]).astype(np.float32)
                sums = checksums([row["id"] for row in rows], [row["_content"] for row in rows], vectors)
                arrays = []
                for part in schema:
                    if part.name == "_vector":
                        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]))
                    elif part.name == "_check":
                        arrays.append(pa.array(sums))
                    else:
                        arrays.append(pa.array([row.get(part.name) for row in rows], part.type))
                data = pa.Table.from_arrays(arrays, schema=schema)
                changed = sum(row["id"] in self.known for row in rows)
                if changed:
                    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                    merge.execute(data)
                else:
                    table.add(data)
                index.add_export_constraints()
            self.known |= {row["id"]: row["_content"] for row in rows}
            self.new, self.changed = self.new + len(rows) - changed, self.changed + changed
        self.progress("add", self.new + self.changed + self.same, None)


def _named(column: str) -> str:
    """The column of an index for a column of records: names of our own are given another end."""
    name = column.lstrip("_") or "column"
    return f"{name}_" if name in (*OWN, *TIMES) else name
