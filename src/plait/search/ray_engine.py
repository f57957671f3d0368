"""Entries embedded by the workers of a Ray cluster: `plait index add --engine ray`.

A worker holds the model, which must lie at the same place for all (a shared disk, or a Hugging Face name), and reads
media that lie in an object store by itself. One process writes the index, in the order of the sources: so the same
entries come out as on one machine. A worker that dies is started anew by Ray, and what it had is embedded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from plait.core.device import threads
from plait.core.errors import PlaitError
from plait.data.ray_engine import RETRIES, connected
from plait.data.stores import StoreError
from plait.inference.model import load
from plait.modalities.media import Checker
from plait.search.embedding import Embedder, Outcome
from plait.search.entries import Entry


class Worker:
    """A worker of Ray with a model. What it raises comes back as a string: Ray shows errors with its own traces."""

    def __init__(self, model: str, device: str) -> None:
        import torch

        torch.set_num_threads(threads())  # as on one machine, to the last bit; Ray gives its workers one
        self.embedder = Embedder(load(model, device), Checker(), ThreadPoolExecutor(2, "media"))

    def embed(self, items: list[Entry], known: dict[str, bytes]) -> tuple[str, list[Outcome] | None]:
        """(why it failed, what became of the entries)."""
        try:
            return "", self.embedder.finish(self.embedder.begin(items, known))
        except StoreError as error:
            return str(error), None


class RayEmbedder:
    """Workers that embed chunks of entries, whose outcomes come back in order."""

    def __init__(self, workers: int | None, model: str, device: str) -> None:
        """`workers` are as many as the cluster has free processors where None. Raises PlaitError for more than it
        has, which would be waited for without an end."""
        self.cluster = connected("--engine ray")
        ray = self.cluster.ray
        total, free = (int(r.get("CPU", 0)) for r in (ray.cluster_resources(), ray.available_resources()))
        if (workers or 1) > total:
            raise PlaitError(f"The Ray cluster has {total} processors, fewer than {workers or 1} workers need.")
        self.count = workers or max(free, 1)
        remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        self.workers = [remote.remote(model, device) for _ in range(self.count)]
        self.waiting: list[tuple[list[Entry], Any]] = []
        self.sent = 0

    def __enter__(self) -> RayEmbedder:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            self.cluster.ray.kill(worker)
        self.cluster.close()

    def take(self, items: list[Entry], known: dict[str, bytes]) -> Iterator[tuple[list[Entry], list[Outcome]]]:
        """Send entries to a worker, and give what is done where each has two chunks already. Raises PlaitError."""
        worker = self.workers[self.sent % self.count]
        self.sent += 1
        self.waiting.append((items, worker.embed.remote(items, known)))
        while len(self.waiting) > 2 * self.count:
            yield self._next()

    def rest(self) -> Iterator[tuple[list[Entry], list[Outcome]]]:
        """What is still with the workers."""
        while self.waiting:
            yield self._next()

    def _next(self) -> tuple[list[Entry], list[Outcome]]:
        items, reference = self.waiting.pop(0)
        ray = self.cluster.ray
        try:
            fault, outcomes = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PlaitError(f"A worker of Ray failed: {reason}. What is written stays; run it again.") from None
        if fault:
            raise StoreError(fault)
        return items, outcomes
