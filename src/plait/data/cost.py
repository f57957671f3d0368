"""What preparing a source will cost, told from its first records."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from plait.data.files import Plan
from plait.data.staging import chunks_of, task_of
from plait.data.work import check_chunk

FACTS = 200  # bytes of memory for what is known of a record: digests, places in the order, splits
LEADER, WORKER = 300 << 20, 250 << 20  # bytes of the process that leads and of one that checks
DISK = 2.1  # times the records' bytes: the chunks, and the dataset that is made of them


@dataclass(frozen=True)
class Cost:
    """What `prepare` takes. `records` may be an estimate; the seconds are those of an idle machine."""

    records: int
    bytes: int  # of texts and media
    seconds: float
    disk: int  # bytes, while it works; half of it stays
    memory: int  # bytes, of all processes
    sample: int  # records that this is told from

    def describe(self) -> str:
        """The figures in a few words."""
        return (
            f"About {self.records:,} records, {_size(self.bytes)}: {_time(self.seconds)}, {_size(self.disk)} of disk "
            f"meanwhile and {_size(self.disk // 2)} after, {_size(self.memory)} of memory (told from the first "
            f"{self.sample:,} records)."
        )


def first_chunk_cost(source_plan: Plan, folder: Path, near: bool, workers: int) -> Cost:
    """Check the first chunk of a plan in `folder`, and reckon from there."""
    chunk = next(chunks_of(source_plan.read()), [])
    task, blobs, _ = task_of(chunk, {"seed": 0, "near": near, "chats": source_plan.chats})
    out = folder / "first.arrow"
    begun = time.process_time()
    check_chunk(task | {"out": str(out)}, blobs)
    spent = time.process_time() - begun
    size = pa.ipc.open_file(pa.memory_map(str(out))).read_all().nbytes
    total = max(source_plan.split_counts.total(), len(chunk))
    times = total / max(len(chunk), 1)
    return Cost(
        records=total,
        bytes=int(size * times),
        seconds=1.0 + 1.3 * spent * times / max(min(workers, times), 1),
        disk=int(DISK * size * times),
        memory=LEADER + WORKER * workers + FACTS * total,
        sample=len(chunk),
    )


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count // 1000} kB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
