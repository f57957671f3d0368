"""Many processes: what they tell each other and how they share a model. Only this file touches torch.distributed.

`torchrun` (or `launch`, which is the same engine) starts the processes and ends all of them when one is lost. Rank 0
prepares and writes; the others wait, then read the same folder. What is promised of a step does not depend on how many
there are: each takes its slice of the same global batch, and `losses` sums over all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.system import end_with_parent, processors
from plait.model.transformer import Transformer

PATIENCE = timedelta(minutes=10)  # that a process waits for another one in a step; a lost one is noticed at once
FAILED = "plait/failed"  # in the store of the processes once one of them has said, or is about to say, what was wrong
Parallel = Literal["ddp", "fsdp"]


# --- the processes ----------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The processes of a run, as one of them sees them; alone, everything here is free of cost."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    turns: int = field(default=0, init=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prepares and writes for all."""
        return self.rank == 0

    def device(self, chosen: Device) -> Device:
        """The one that this process has of the kind that was chosen."""
        if chosen.kind == "mps" and self.size > 1:
            raise PlaitError("Several processes cannot share an MPS device. Use one process, or --device cpu.")
        return Device(f"cuda:{self.local_rank}", chosen.dtype) if chosen.name == "cuda" and self.size > 1 else chosen

    def gather(self, rows: Tensor, sizes: list[int] | None = None) -> Tensor:
        """The rows (n, ...) of all processes, in the order of their ranks, without a gradient. `sizes` are the n of
        each, where they differ."""
        if self.size == 1:
            return rows
        sizes = sizes or [len(rows)] * self.size
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; the same bits on each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is up on any process."""
        return bool(self.all_reduce(torch.tensor(int(flag))))

    def broadcast(self, value: float) -> float:
        """What rank 0 says, on all processes."""
        return float(self.all_reduce(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)))

    def barrier(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does what stands inside, however long it takes; then the others do it, and find the work done.
        Where rank 0 fails, the others end without a word."""
        self.turns += 1
        if self.size == 1:
            yield
            return
        store, key = _store(), f"plait/turn/{self.turns}"
        if not self.is_main:
            while not store.check([key]):
                if store.check([FAILED]):
                    _leave()
                time.sleep(0.05)
            yield
            return
        try:
            yield
        except BaseException:
            store.set(FAILED, "")
            raise
        store.set(key, "")


def _store() -> dist.Store:
    """What the processes read and write even where one of them is gone: it lives in the engine that started them."""
    return dist.distributed_c10d._get_default_store()


def _leave() -> NoReturn:
    """End without a word, once another process has had the time to say what was wrong: the first that ends takes the
    others with it."""
    time.sleep(1)
    raise SystemExit(1) from None


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def processes() -> Iterator[Group]:
    """Join the processes that torchrun started, or be alone. A message that all of them have is raised by one. A
    process group that exists already (Ray Train makes one) is used as it is.

    Raises PlaitError where another process was lost.
    """
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if size == 1:
        yield Group()
        return
    group = Group(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(group.local_rank)
    started_here = not dist.is_initialized()
    if started_here:
        end_with_parent()  # the engine that started this process may be killed, which tells nobody
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield group
        group.barrier()
        if started_here:
            dist.destroy_process_group()
    except PlaitError as error:
        store = _store()
        store.set(FAILED, "")
        if store.add("plait/told/" + hashlib.sha256(str(error).encode()).hexdigest(), 1) > 1:
            _leave()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        if _store().check([FAILED]):  # the one that failed says why
            _leave()
        raise PlaitError(
            f"Process {group.rank} of {size} lost another one in the middle of a step. "
            "The same command goes on from the last checkpoint."
        ) from error


def launch(count: int, arguments: list[str]) -> int:
    """Run `plait` with these arguments as so many processes on this machine; returns the exit code.

    The engine is torchrun's: when one process fails the others are ended, and signals are passed on.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say it better
    # A machine's processors are shared out; torchrun by itself gives each process one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(processors() // count, 1)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id=f"plait-{os.getpid()}", start_method="spawn",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "plait", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # What was ended because another failed says nothing; a process that was killed has a negative code.
        return next((code for code in codes if code > 0), 1)
    except SignalException as error:
        return 128 + error.sigval
    return 0


# --- the model --------------------------------------------------------------------------------------------------


class Network:
    """A model's forward and backward passes as the processes share them.

    Replicated (`ddp`), each process holds the whole model and gradients are averaged while the backward pass runs.
    Sharded (`fsdp`), the blocks of the backbone are split over the processes with their gradients and optimizer
    state (FSDP2); what stands around them, a small part, is replicated. Alone, a model is left as it is.
    """

    def __init__(
        self, loss_module: nn.Module, backbone: Transformer | None = None, group: Group | None = None,
        parallel: Parallel = "ddp", device: Device | None = None,
    ) -> None:  # fmt: skip
        self.loss_module: Any = loss_module
        self.group = group or Group()
        self.wrapped: DistributedDataParallel | None = None
        self.sharded = parallel == "fsdp" and self.group.size > 1
        trainable = [p for p in loss_module.parameters() if p.requires_grad]
        if self.sharded and backbone is not None and device is not None:
            for tensor in loss_module.state_dict().values():
                dist.broadcast(tensor, 0)
            policy = MixedPrecisionPolicy()
            if device.dtype is not torch.float32:
                # Autocast decides on the products; the policy halves what is sent, and keeps gradients exact.
                policy = MixedPrecisionPolicy(device.dtype, torch.float32, cast_forward_inputs=False)
            mesh = dist.device_mesh.init_device_mesh(device.torch.type, (self.group.size,))
            around = {p for name, p in backbone.named_parameters() if not name.startswith("blocks.")}
            for block in backbone.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            # The whole as their root, so that one block's weights arrive while another computes.
            fully_shard(backbone, mesh=mesh, mp_policy=policy, ignored_params=around)
            trainable = [p for p in loss_module.parameters() if p.requires_grad]
        elif self.group.size > 1:
            # Weights of convolutions lie channels last in memory, buckets do not: a copy more, which is cheap.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.wrapped = DistributedDataParallel(
                loss_module, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        self.shards = [p for p in trainable if is_shard(p)]
        self.replicated = [p for p in trainable if not is_shard(p)]

    def __call__(self, *arguments: Any, last: bool = True) -> Any:
        """A forward pass. Only the `last` one of a step makes the processes wait for each other's gradients."""
        if self.wrapped is None or not torch.is_grad_enabled():
            return self.loss_module(*arguments)
        with nullcontext() if last else self.wrapped.no_sync():
            return self.wrapped(*arguments)

    def backward(self, share: Tensor, last: bool = True) -> None:
        """Add the gradient of the sum of all processes' shares to the parameters."""
        with self.wrapped.no_sync() if self.wrapped is not None and not last else nullcontext():
            (share * self.group.size).backward()  # both engines average
        if last and self.sharded:
            gradients = [p.grad for p in self.replicated if p.grad is not None]
            flat = self.group.all_reduce(_flatten_dense_tensors(gradients)) / self.group.size
            for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)

    def grad_norm(self) -> Tensor:
        """The norm of all gradients together, of all processes."""
        gradients = [
            [p.grad for p in parameters if p.grad is not None] for parameters in (self.shards, self.replicated)
        ]
        norms = [torch.nn.utils.get_total_norm(parameters) for parameters in gradients if parameters]
        return torch.linalg.vector_norm(torch.stack([full_tensor(norm) for norm in norms]))


def is_shard(tensor: Tensor) -> bool:
    """Whether a process holds only its own rows of a tensor."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all processes, which must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- sharded files ----------------------------------------------------------------------------------------------


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each process writes its shards into one folder, as safetensors files that say which rows they hold
    (torch.distributed.checkpoint). Raises PlaitError where one of them could not."""
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise PlaitError(f"Cannot write {folder}: {causes}. Free space, then go on with the run.") from None


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the safetensors files of a folder, sharded or not, without their values."""
    stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(kind.size, dtype=kind.properties.dtype, device="meta")
        for name, kind in stored.items()
        if isinstance(kind, dcp.TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, or the shards of tensors that this process holds, from the safetensors files of a folder, however
    many processes wrote them. Raises PlaitError where a file does not fit."""
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody else takes part
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except dcp.CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise PlaitError(f"{folder} is not a checkpoint that this run can go on from: {causes}.") from None
