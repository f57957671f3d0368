"""Records on their way: cut into chunks, each checked once by one of several processes and kept aside until all are.

A chunk's file is named after what went into it. So a run that was stopped finds the chunks that are done, and what
comes out depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.core.system import OUT_OF_HEARING, processors, read_line
from plait.data.files import Item, Media, RawRecord
from plait.data.record import Rejected
from plait.data.stores import StoreError
from plait.data.work import Task, check_chunk, send

_ROWS, _BYTES = 512, 16 << 20  # of a chunk
_FORM = 4  # of the chunks' files and of the fingerprints in them; another number makes all chunks anew
LONG_TEXT = 200  # characters from which on a text goes to a process as bytes, not as JSON
_PATIENCE = 120.0  # seconds for one record


def stage(
    items: Iterator[Item],
    folder: Path,
    seed: int,
    near: bool,
    chats: list[str],
    workers: int | None,
    progress: Callable[[int], None],
    known: Path | None = None,
    engine: str = "local",
) -> list[Path]:
    """Check all items and return the files of their chunks in `folder`, in the order of the items (see work.py).

    Columns in `chats` hold conversations. `workers` is the number of processes: as many as there are processors where
    None, none where 0. `progress` is told how many records are done. `known` is the file of media that were decoded
    before (see known.py); it saves work and changes nothing of what comes out. `engine` is "local", or "ray" for the
    workers of a Ray cluster, as many as it has processors where `workers` is None.
    Raises PlaitError where a chunk cannot be written.
    """
    paths: list[Path] = []
    waiting: deque[tuple[Future[None] | None, int]] = deque()
    pool = make_pool(engine, workers, folder)
    processes = pool.count
    done = 0

    def take() -> None:
        nonlocal done
        future, count = waiting.popleft()
        if future is not None:
            future.result()
        done += count
        progress(done)

    with pool:
        chunks = chunks_of(items)
        ahead = next(chunks, None)
        while ahead is not None:
            chunk, ahead = ahead, next(chunks, None)
            task, blobs, key = task_of(chunk, {"seed": seed, "near": near, "chats": chats})
            path = folder / f"{len(paths):07d}-{key}.arrow"
            task |= {"out": str(path), "known": str(known) if known else ""}
            paths.append(path)
            if path.is_file():
                waiting.append((None, len(chunk)))
            else:
                # One chunk of text is done sooner than a process starts.
                alone = ahead is None and len(paths) == 1 and not any(map(_has_media, chunk))
                waiting.append((pool.submit(task, blobs, here=alone), len(chunk)))
            while len(waiting) > 2 * processes + 2:
                take()
        while waiting:
            take()
    return paths


def _has_media(item: Item) -> bool:
    return isinstance(item, RawRecord) and any(isinstance(value, Media) for value in item.parts.values())


def chunks_of(items: Iterator[Item]) -> Iterator[list[Item]]:
    """The items in pieces of at most 512 records, or of 16 MiB of text and media and one record more."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item, RawRecord):
            size += sum(map(_bytes, item.parts.values()))
        if len(chunk) >= _ROWS or size >= _BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes(value: str | Media) -> int:
    """The bytes of a part; looks at the file of a medium, and notes what tells its content from a later one."""
    if isinstance(value, str):
        return len(value)
    if value.data is not None:
        return len(value.data)
    if value.pixels is not None:
        return value.pixels.nbytes
    if isinstance(value.path, Path) and not value.stamp:
        with contextlib.suppress(OSError):  # a file that is gone is refused when it is read
            status = value.path.stat()
            value.size, value.stamp = status.st_size, str(status.st_mtime_ns)
    return value.size


def task_of(chunk: list[Item], options: Task) -> tuple[Task, list[bytes], str]:
    """The chunk as a process wants it, and its key."""
    blobs: list[bytes] = []
    items: list[Any] = []
    digest = hashlib.sha256(f"{_FORM}:{json.dumps(options)}".encode())

    def part(value: str | Media) -> str | dict[str, Any]:
        if isinstance(value, str):
            if len(value) < LONG_TEXT:
                return value
            data = value.encode(errors="surrogatepass")
            digest.update(hashlib.sha256(data).digest())
            blobs.append(data)
            return {"text": len(blobs) - 1}
        described: dict[str, Any] = {"kind": value.kind, "name": value.name}
        if value.data is None and value.pixels is None:
            digest.update(f"{value.size}:{value.stamp}\0".encode())
            return described | {"path": str(value.path)}
        if value.pixels is not None:
            described["pixels"] = value.pixels.shape
        data = value.data if value.data is not None else value.pixels.tobytes()  # type: ignore[union-attr]
        digest.update(hashlib.sha256(data).digest())
        blobs.append(data)
        return described | {"blob": len(blobs) - 1}

    for item in chunk:
        if isinstance(item, Rejected):
            items.append(list(item))
            continue
        parts = {name: part(value) for name, value in item.parts.items()}
        items.append({"id": item.id, "place": item.place, "split": item.split, "group": item.group, "parts": parts})
    written_items = json.dumps(items).encode()
    digest.update(written_items)
    return {"items": items, "written_items": written_items, **options}, blobs, digest.hexdigest()[:32]


class Pool(Protocol):
    """What checks chunks: a context manager."""

    count: int  # chunks that are under work at a time

    def __enter__(self) -> Pool: ...

    def __exit__(self, *exception: object) -> None: ...

    def submit(self, task: Task, blobs: list[bytes], here: bool = False) -> Future[None]:
        """Check a chunk and write `task["out"]`; `here` in this process."""
        ...


def make_pool(engine: str, workers: int | None, folder: Path) -> Pool:
    """The pool of an engine. Raises PlaitError for one that is not known or not installed."""
    if engine == "ray":
        from plait.data.ray_engine import RayPool

        return RayPool(workers, folder)
    if engine != "local":
        raise PlaitError(f"There is no engine '{engine}'. Known are local and ray.")
    return LocalPool(processors() if workers is None else workers, folder)


class LocalPool:
    """Processes that check chunks, one for each thread that waits for them."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self._threads = ThreadPoolExecutor(max(count, 1))
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._all:
                process.kill()
        self._threads.shutdown(wait=True)
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def submit(self, task: Task, blobs: list[bytes], here: bool = False) -> Future[None]:
        if self.count and not here:
            return self._threads.submit(self.run, task, blobs)
        future: Future[None] = Future()
        try:
            check_chunk(task, blobs)
        except OSError as error:
            raise _unwritten(self.folder, error.strerror or str(error)) from error
        future.set_result(None)
        return future

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        status = self.folder / f".at-{threading.get_ident()}"
        status.write_bytes(bytes(8))
        # A plain process, not multiprocessing: nothing of the caller's main module is imported again.
        code = "import sys; sys.path.insert(0, sys.argv[1]); from plait.data.work import serve; serve(sys.argv[2])"
        with self._lock:
            if self._closed:
                raise PlaitError("Stopped.")
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2]), str(status)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                **OUT_OF_HEARING,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            self._all.append(process)
        return process, status

    def run(self, task: Task, blobs: list[bytes]) -> None:
        """Check a chunk in a process; a record at which that crashes or hangs is refused, and the chunk begun anew."""
        faults: dict[str, Reason] = {}
        while True:
            process, status = getattr(self._own, "process", None) or self._start()
            self._own.process = process, status
            answer = self._ask(process, status, task | {"faults": faults}, blobs)
            if isinstance(answer, dict):
                if "store" in answer:
                    raise StoreError(answer["store"])
                if "error" in answer:
                    raise _unwritten(self.folder, answer["error"])
                return
            self._own.process = None
            if self._closed:
                raise PlaitError("Stopped.")
            at = str(struct.unpack("<q", status.read_bytes())[0])
            if at == "-1" or at in faults:
                raise PlaitError(
                    f"A process that checks media ended while it wrote {task['out']}. Is there memory enough? Try "
                    "fewer with --workers 1; what is done is kept."
                )
            faults[at] = answer

    def _ask(
        self, process: subprocess.Popen[bytes], status: Path, task: Task, blobs: list[bytes]
    ) -> dict[str, Any] | Reason:
        """The answer of a process, or how it ended: it crashed, or was ended as it hung at one record."""
        assert process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin, task, blobs)
            line = read_line(process, _is_stuck(status), 2.0)
        except (OSError, ValueError):  # a pipe whose other end is gone
            line = b""
        if line is None:
            process.wait()
            return Reason(RejectKind.TOO_SLOW, f"decoding took more than {_PATIENCE:g} s")
        if not line:
            process.wait()
            return Reason(RejectKind.CRASHED)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _is_stuck(status: Path) -> Callable[[], bool]:
    """Whether the record that `status` names has been under work for too long, asked again and again."""
    last, since = b"", time.monotonic()

    def is_stuck() -> bool:
        nonlocal last, since
        now = status.read_bytes()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > _PATIENCE

    return is_stuck


def _unwritten(folder: Path, reason: str) -> PlaitError:
    return PlaitError(f"Cannot write {folder}: {reason}. Free space there; what is done is kept.")
