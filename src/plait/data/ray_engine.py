"""Chunks of records checked by the workers of a Ray cluster: `plait prepare --engine ray`.

A worker gets a chunk with what lies in memory, reads the media that lie elsewhere by itself (so they must lie where
every worker can read them: an object store, or a shared disk), and sends the chunk's file back. The same bytes come out
as on one machine. A worker that dies is replaced by Ray, and its chunk checked anew.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.data.staging import LocalPool
from plait.data.stores import StoreError
from plait.data.work import Task

RETRIES = 5  # of a chunk whose worker died
PASSED = ("AWS_", "GOOGLE_", "AZURE_", "PLAIT_", "FSSPEC_")  # settings of stores that workers get, by how they begin


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster; `ours` where it was connected to, or started, here."""

    ray: Any
    ours: bool

    def close(self) -> None:
        """Leave it, where it was entered here."""
        if self.ours:
            self.ray.shutdown()


def connected(what: str) -> Cluster:
    """The cluster that RAY_ADDRESS names or that runs on this machine; where there is none, one that is started here.
    Raises PlaitError where Ray is not installed, naming `what` it is for."""
    ray = import_extra("ray", "ray", what)
    if ray.is_initialized():
        return Cluster(ray, ours=False)
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": environment}, include_dashboard=None,
    )  # fmt: skip
    return Cluster(ray, ours=True)


class RayPool:
    """Workers of a cluster that check chunks."""

    def __init__(self, workers: int | None, folder: Path) -> None:
        """`workers` are chunks under work at a time: as many as the cluster has processors where None."""
        self.folder = folder
        self.cluster = connected("--engine ray")
        self.ray = self.cluster.ray
        self.count = workers or max(int(self.ray.cluster_resources().get("CPU", 1)), 1)
        self.check = self.ray.remote(num_cpus=1, max_retries=RETRIES)(checked)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cluster.close()

    def submit(self, task: Task, blobs: list[bytes], here: bool = False) -> Future[None]:
        """Check a chunk in a worker; once the future is asked, its file lies at `task["out"]`."""
        sent = {name: value for name, value in task.items() if name != "written_items"} | {"out": ""}
        return _Chunk(self, task, self.check.remote(sent, blobs))


class _Chunk(Future[None]):
    """A chunk under work. What Ray holds of it is fetched when its result is asked for, in the caller's thread."""

    def __init__(self, pool: RayPool, task: Task, reference: Any) -> None:
        super().__init__()
        self.pool, self.task, self.reference = pool, task, reference

    def result(self, timeout: float | None = None) -> None:
        """Write the chunk's file. Raises PlaitError and StoreError as a local pool does."""
        ray = self.pool.ray
        try:
            fault, data = ray.get(self.reference, timeout=timeout)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PlaitError(f"A worker of Ray failed: {reason}. What is done is kept; run it again.") from None
        if fault:
            raise StoreError(fault) if data is None else PlaitError(fault)
        out = Path(self.task["out"])
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(out)
        except OSError as error:
            raise PlaitError(f"Cannot write {out.parent}: {error.strerror or error}. Free space there.") from error


def checked(task: Task, blobs: list[bytes]) -> tuple[str, bytes | None]:
    """In a worker: (why it failed, the chunk's file). Media are decoded in a process of its own, as on one machine."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**task, "out": str(Path(folder) / "chunk.arrow")}
        if task.get("known") and not Path(task["known"]).is_file():  # on another machine
            task["known"] = ""
        try:
            with LocalPool(1, Path(folder)) as pool:
                pool.run(task, blobs)
        except StoreError as error:
            return str(error), None
        except PlaitError as error:
            return str(error), b""
        return "", Path(task["out"]).read_bytes()
