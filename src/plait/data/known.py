"""What decoding showed of a dataset's media, kept beside them: whoever adds files decodes none of the old ones again.

A medium is known by its content, never by its name. Light, since the processes that check media read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

FILE = "media.arrow"
LEAST = 4096  # bytes of a medium that is kept in mind; smaller ones are decoded sooner than looked up
FORM = b"2"  # of the fingerprints; another one makes all anew
SCHEMA = pa.schema(
    {"kind": pa.string(), "digest": pa.binary(16), "first": pa.float64(), "second": pa.float64(), "print": pa.binary()},
    {b"form": FORM},
)


class MediumFacts(NamedTuple):
    """What is known of a decoded medium: the two figures of `MediaFiles.facts`, and its fingerprint."""

    first: float
    second: float
    print: bytes


class KnownMedia:
    """The media of a dataset by kind and content, mapped from its file."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        digests = np.frombuffer(b"".join(table["digest"].to_pylist()), "S16") if len(table) else np.zeros(0, "S16")
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]

    def get(self, kind: str, digest: bytes, near: bool) -> MediumFacts | None:
        """What is known of a medium; None where nothing is, or where a fingerprint is wanted and missing."""
        at = int(np.searchsorted(self._digests, np.bytes_(digest)))
        while at < len(self._digests) and self._digests[at] == np.bytes_(digest):
            row = self.table.slice(int(self._order[at]), 1).to_pylist()[0]
            if row["kind"] == kind and (row["print"] is not None or not near):
                return MediumFacts(row["first"], row["second"], (row["print"] or b"") if near else b"")
            at += 1
        return None


def known_media(path: str) -> KnownMedia | None:
    """What lies at a path; None where there is nothing, or nothing of this form."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return _opened(path, status.st_ino, status.st_mtime_ns)  # another file of that name is another


@lru_cache(maxsize=1)
def _opened(path: str, *stamp: int) -> KnownMedia | None:
    with contextlib.suppress(OSError, pa.ArrowException):
        table = pa.ipc.open_file(pa.memory_map(path)).read_all()
        if (table.schema.metadata or {}).get(b"form") == FORM:
            return KnownMedia(table)
    return None


def write_known(path: Path, tables: Iterable[pa.Table]) -> int:
    """Store rows of SCHEMA, of each kind and digest the first alone; returns how many they are."""
    seen: set[bytes] = set()  # hashes of what was written
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for table in _distinct(tables, seen):
            writer.write_table(table)
            count += len(table)
    return count


def _distinct(tables: Iterable[pa.Table], seen: set[bytes]) -> Iterator[pa.Table]:
    for table in tables:
        keep = []
        for row, (kind, digest) in enumerate(zip(*(table[n].to_pylist() for n in ("kind", "digest")), strict=True)):
            key = digest[:8] + kind.encode()
            if key not in seen:
                seen.add(key)
                keep.append(row)
        if keep:
            yield table.take(pa.array(keep)).cast(SCHEMA)
