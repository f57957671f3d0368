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

from plait.config import Recipe
from plait.data.dataset import Dataset
from plait.runtime import DivergedError, PlaitError, only_writer, threads
from plait.training.trainer import Progress, train

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


class _StoppedError(Exception):
    """The leave to go on was refused."""


class Worker:
    """One process and the job that it has."""

    def __init__(self, dataset: Path, device: str, share: int) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, dataset, device), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(share)
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Start a job; a worker that has just died says so at the next `receive`."""
        self.job = job
        self.send(job)

    def send(self, value: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(value)

    def receive(self) -> Message:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            message = Message("died", f"killed by signal {-code}" if code < 0 else f"ended with code {code}")
        if message.kind not in ("progress", "validation"):
            self.job = None
        return message


class Workers:
    """Some workers that share the processor's threads, or the GPUs, of this machine."""

    def __init__(self, count: int, dataset: Path, device: str) -> None:
        self._dataset, self._device = dataset, device
        self._share = max(threads() // count, 1)
        self.all = [self._start(place) for place in range(count)]

    def _start(self, place: int) -> Worker:
        gpus = torch.cuda.device_count()
        device = f"cuda:{place % gpus}" if gpus > 1 and self._device in ("auto", "cuda") else self._device
        return Worker(self._dataset, device, self._share)

    def idle(self) -> list[Worker]:
        return [worker for worker in self.all if worker.job is None]

    def receive(self, seconds: float) -> list[tuple[Worker, Message]]:
        """Messages as they come, none where `seconds` pass without. A new worker takes the place of a dead one."""
        busy: dict[Any, Worker] = {worker.connection: worker for worker in self.all if worker.job is not None}
        received = []
        for connection in wait(list(busy), seconds):
            worker = busy[connection]
            message = worker.receive()
            received.append((worker, message))
            if message.kind == "died":
                place = self.all.index(worker)
                self.all[place] = self._start(place)
        return received

    def close(self) -> None:
        """Let all workers end: those that train stop where they are, and their runs can go on from there."""
        for worker in self.all:
            worker.connection.close()
        for worker in self.all:
            worker.process.join()


def _work(connection: Connection, dataset: Path, device: str) -> None:
    """The life of a worker: its main thread trains, another listens and ends the process with its parent's."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put(connection.recv())
        os._exit(0)  # checkpoints bear it

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
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
        validated = progress.stage == "validation"
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
