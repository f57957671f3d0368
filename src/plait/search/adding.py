"""Adding to an index: entries are compared with what is there, decoded, embedded and written in whole batches."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.record import Rejected, UnusableError, rejected
from plait.modalities.descriptor import MediaError
from plait.modalities.media import Checker, preview
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


@dataclass
class Read:
    """A medium or text as it was read: its parts (from when to when, and what the model takes), and a preview."""

    parts: list[tuple[float | None, float | None, Any]]
    preview: bytes | None


class Adding:
    """Entries on their way into an index: compared with what is there, decoded, embedded, written."""

    def __init__(self, index: Index, progress: Progress) -> None:
        self.index, self.progress = index, progress
        self.new = self.changed = self.same = 0
        self.rejected: list[Rejected] = []
        self.rows: list[dict[str, Any]] = []
        self.reading: list[tuple[Entry, bytes, Future[Read]]] = []
        self.begun = time.monotonic()
        with index.reading():
            index.table.checkout_latest()
            there = index.table.search().select(["id", "_content"]).limit(None).to_arrow()
        self.known = dict(zip(there["id"].to_pylist(), there["_content"].to_pylist(), strict=True))
        self.seen: dict[str, int] = {}

    def take(self, items: list[Entry | Rejected], checker: Checker, pool: ThreadPoolExecutor) -> None:
        """Begin to decode what is new of these, and meanwhile embed what was taken before."""
        before, self.reading = self.reading, []
        for item in items:
            if isinstance(item, Rejected):
                self.rejected.append(item)
                continue
            count = self.seen[item.id] = self.seen.get(item.id, 0) + 1
            if count > 1:  # records of one table may share an id
                item.id += f"~{count}"
            try:
                content = item.content()
            except (OSError, ValueError) as error:
                self._reject(item, _reason(error))
                continue
            body = content.encode() if isinstance(content, str) else content
            facts = json.dumps([item.kind, item.split, item.texts, len(body)], sort_keys=True).encode()
            digest = hashlib.sha256(facts + body).digest()[:16]
            if self.known.get(item.id) == digest:
                self.same += 1
            else:
                self.reading.append((item, digest, pool.submit(self._read, item.kind, content, checker)))
        self._embed(before)

    def finish(self) -> None:
        """Embed and write what is left."""
        self._embed(self.reading)
        self.reading = []
        self.commit()

    def _embed(self, taken: list[tuple[Entry, bytes, Future[Read]]]) -> None:
        ready = []
        for item, digest, future in taken:
            try:
                read = future.result()
                ready += [(item, digest, part, read.preview) for part in read.parts]
            except (MediaError, PlaitError) as error:
                self._reject(item, _reason(error))
        vectors = self._embedded([value for _, _, (_, _, value), _ in ready])
        for (item, digest, (start, stop, _), small), vector in zip(ready, vectors, strict=True):
            if isinstance(vector, Reason):
                self._reject(item, vector)
            else:
                self._row(item, digest, vector, small)
                if start is not None:
                    self._at(item, start, stop)
        if len(self.rows) >= COMMIT or time.monotonic() - self.begun > COMMIT_SECONDS:
            self.commit()

    def _reject(self, item: Entry, reason: Reason) -> None:
        self.rejected.append(rejected(item.source, reason))

    def _read(self, kind: str, content: str | bytes, checker: Checker) -> Read:
        """What the model takes, and the preview."""
        if isinstance(content, str):
            return Read([(None, None, content)], None)
        value = checker.decode(kind, content)
        return Read(self.index.model.moments(kind, value), preview(kind, content, value))

    def _embedded(self, values: list[Any]) -> list[np.ndarray | Reason]:
        """The vector of each value, or why it has none."""
        if not values:
            return []
        try:
            return list(self.index.model.embed_inputs(values))
        except PlaitError as error:
            if len(values) == 1:
                return [_reason(error)]
            return [one for value in values for one in self._embedded([value])]

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


def _reason(error: Exception) -> Reason:
    """Why a record cannot be added."""
    if isinstance(error, UnusableError | MediaError):
        return error.reason
    if isinstance(error, OSError):
        return Reason(RejectKind.UNREADABLE, error.strerror or str(error))
    return Reason(RejectKind.NOT_TAKEN, str(error).removesuffix("."))


def _named(column: str) -> str:
    """The column of an index for a column of records: names of our own are given another end."""
    name = column.lstrip("_") or "column"
    return f"{name}_" if name in (*OWN, *TIMES) else name
