"""Processes that train runs, one after another each. They end at once when the process that started them does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from plait.core.config import Recipe
from plait.core.device import threads
from plait.core.errors import DivergedError, PlaitError, Terminated
from plait.core.files import only_writer
from plait.data.dataset import Dataset
from plait.training.run import Progress
from plait.training.trainer import train

LEAVING = 20.0  # seconds that a dying process may take to let go of a run's folder


@dataclass(frozen=True)
class Job:
    """A run to train; `reuse` as in `train`. With `asks` the worker waits after each validation for leave to go on."""

    folder: Path
    recipe: Recipe
    reuse: Path | None = None
    asks: bool = False


@dataclass(frozen=True)
class Message:
    """What a worker tells. `kind` is "progress" or "validation" (a Progress), "done", "stopped" (leave was refused),
    "diverged" or "failed" (a text), or "died" (a text): then the worker is gone."""

    kind: str
    value: Any = None


class _StoppedError(PlaitError):
    """The leave to go on was refused."""


class Worker:
    """One process and the job that it has."""

    def __init__(self, place: int, dataset: str | Path, device: str, share: int) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.place = place
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=_work, args=(child_end, dataset, device), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(share)
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        child_end.close()
        self.job: Job | None = None

    def send(self, value: object) -> None:
        """Hand it a job, or leave to go on; that it has just died shows at the next `receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(value)

    def receive(self) -> Message:
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            message = Message("died", f"killed by signal {-code}" if code < 0 else f"ended with code {code}")
        if message.kind not in ("progress", "validation"):
            self.job = None
        return message


class Workers:
    """Up to `count` workers that share the processor's threads, or the GPUs, of this machine."""

    def __init__(self, count: int, dataset: str | Path, device: str) -> None:
        self._count, self._dataset, self._device = count, dataset, device
        self._all: list[Worker] = []

    @property
    def free(self) -> bool:
        """Whether another job can be given."""
        return sum(worker.job is not None for worker in self._all) < self._count

    def give(self, job: Job) -> Worker:
        """Start a job with a worker that is idle, or a new one."""
        worker = next((worker for worker in self._all if worker.job is None), None) or self._start()
        worker.job = job
        worker.send(job)
        return worker

    def _start(self) -> Worker:
        place = min(set(range(self._count)) - {worker.place for worker in self._all})
        gpus, device = torch.cuda.device_count(), self._device
        if gpus > 1 and device in ("auto", "cuda"):
            device = f"cuda:{place % gpus}"
        self._all.append(Worker(place, self._dataset, device, max(threads() // self._count, 1)))
        return self._all[-1]

    def receive(self, seconds: float) -> list[tuple[Worker, Message]]:
        """Messages as they come; none where `seconds` pass without."""
        busy: dict[Any, Worker] = {worker.connection: worker for worker in self._all if worker.job is not None}
        received = []
        for connection in wait(list(busy), seconds):
            worker = busy[connection]
            received.append((worker, worker.receive()))
            if received[-1][1].kind == "died":
                self._all.remove(worker)
        return received

    def close(self) -> None:
        """Let all workers end: those that train stop where they are, and their runs can go on from there."""
        for worker in self._all:
            worker.connection.close()
        for worker in self._all:
            worker.process.join(LEAVING)
            worker.process.kill()


def _work(connection: Connection, dataset: str | Path, device: str) -> None:
    """The life of a worker: its main thread trains, another listens and ends the process with its parent's."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put(connection.recv())
        os._exit(0)  # checkpoints bear it

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, Terminated):
        opened = Dataset.open(dataset)
        while True:
            job: Job = inbox.get()
            _tell(connection, _train(job, opened, device, connection, inbox))


def _tell(connection: Connection, message: Message) -> None:
    try:
        connection.send(message)
    except OSError:  # nobody listens any more
        os._exit(0)


def _train(job: Job, dataset: Dataset, device: str, connection: Connection, inbox: queue.SimpleQueue[Any]) -> Message:
    def report(progress: Progress) -> None:
        validated = progress.work == "validation"
        _tell(connection, Message("validation" if validated else "progress", progress))
        if validated and job.asks and not inbox.get():
            raise _StoppedError

    try:
        _wait_for(job.folder)
        train(dataset, job.folder, job.recipe, report, device, reuse=job.reuse)
    except _StoppedError:
        return Message("stopped")
    except DivergedError as error:
        return Message("diverged", str(error))
    except PlaitError as error:
        return Message("failed", str(error))
    return Message("done")


def _wait_for(folder: Path) -> None:
    """Wait while a process that is about to end still holds the folder."""
    deadline = time.monotonic() + LEAVING
    while True:
        try:
            with only_writer(folder):
                return
        except PlaitError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
