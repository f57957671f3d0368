"""Machines: a small table of what data sheets promise, and this one, as it measures itself."""

from __future__ import annotations

import difflib
import platform
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.core.device import Device, choose_device, keep_memory
from plait.core.errors import PlaitError
from plait.core.system import available_memory
from plait.model import lora
from plait.model.cross_entropy import negative_log_likelihood
from plait.model.multimodal import IGNORE, Batch, ModelConfig, Multimodal, Sequence, collate
from plait.training.batches import Step
from plait.training.losses import LossModule
from plait.training.optimizer import make_optimizer

USABLE = 0.95  # of a device's memory: the rest is the driver's, the libraries' and lost between tensors
OVERHEAD = 1.5  # energy of hosts, network and cooling beside a device's own: 1 W of device is 1.5 W on the bill

HEAP = 1.2  # memory of the process over its tensors at most, on a CPU whose heap keeps what is freed (bench/plan.py)


@dataclass(frozen=True)
class Machine:
    """One device. Data sheets: dense products without sparsity, GB of 1e9 bytes."""

    name: str
    flops: float  # FLOP/s of 16-bit products at most
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory; 0 where not known
    watts: float  # at most; 0 where not known


MACHINES = {
    "v100": Machine("V100 SXM 32 GB", 125e12, 32e9, 0.9e12, 300),  # fp16: it has no bf16
    "t4": Machine("T4", 65e12, 16e9, 0.32e12, 70),  # fp16 likewise
    "a100-40": Machine("A100 SXM 40 GB", 312e12, 40e9, 1.555e12, 400),
    "a100": Machine("A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 400),
    "l4": Machine("L4", 121e12, 24e9, 0.3e12, 72),
    "rtx4090": Machine("RTX 4090", 165e12, 24e9, 1.008e12, 450),
    "h100": Machine("H100 SXM", 989e12, 80e9, 3.35e12, 700),
    "h200": Machine("H200 SXM", 989e12, 141e9, 4.8e12, 700),
    "mi300x": Machine("MI300X", 1307e12, 192e9, 5.3e12, 750),
    "b200": Machine("B200", 2250e12, 180e9, 8e12, 1000),
}


def machine(name: str) -> Machine:
    """A row of the table, or this machine for "here". Raises PlaitError with the nearest names where there is none."""
    if name == "here":
        return this_machine()
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    near = difflib.get_close_matches(name.lower(), MACHINES, n=2, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known are here, {', '.join(MACHINES)}."
    raise PlaitError(f"There is no machine '{name}'. {hint}")


def this_machine() -> Machine:
    """What is free here, and the best rate of a few square products in the precision of training."""
    device = choose_device(training=True)
    if device.kind == "cuda":
        name, free = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[0])
    else:
        name, free = (
            f"this machine ({platform.machine()}, {torch.get_num_threads()} threads)",
            float(available_memory()),
        )
    side = 1024 if device.kind == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device.torch).to(device.dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)
        if device.kind == "cuda":
            torch.cuda.synchronize()

    multiply()
    rates = []
    for _ in range(9):
        begun = time.perf_counter()
        multiply()
        rates.append(2 * side**3 / (time.perf_counter() - begun))
    return Machine(name, max(rates), free, 0, 0)


# --- a step here ------------------------------------------------------------------------------------------------


def sample_batch(model: Multimodal, batch: int, length: int) -> Batch:
    """`batch` sequences of `length` tokens, all text of which is to be predicted. Where the model reads media, each
    sequence begins with one, of each modality in turn, as long as one may be."""
    media, vocabulary = model.media, model.vocabulary
    samples = {name: modality.blank() for name, modality in media.items()}
    sequences = []
    for row in range(batch):
        sequence = Sequence().read_ids([0])
        if samples:
            name = list(samples)[row % len(samples)]
            if media[name].token_count(len(samples[name])) + 4 < length:
                sequence = Sequence().read_media(media[name], vocabulary.opener(name), samples[name], vocabulary.pad)
        sequences.append(sequence.write([row % 7 for _ in range(length - len(sequence))]))
    return collate(sequences, media, vocabulary.pad)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that exist, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return output

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_memory(
    config: ModelConfig,
    batch: int,
    length: int,
    device: Device,
    activation_checkpointing: bool = False,
    rank: int | None = None,
) -> float:
    """Bytes that a training step takes of this machine, above what the program takes by itself. With a `rank`, of
    low-rank updates alone."""
    return traced_peak(config, batch, length, device, activation_checkpointing, rank) * (
        HEAP if device.kind == "cpu" else 1.0
    )


def traced_peak(
    config: ModelConfig,
    batch: int,
    length: int,
    device: Device,
    activation_checkpointing: bool = False,
    rank: int | None = None,
) -> float:
    """Bytes of tensors at most in a training step of `plait train`, followed operator by operator on tensors without
    memory. Codecs, which are trained before, are not in it."""
    layers = config.backbone.layers
    peaks = {
        n: _traced(_with_layers(config, n), batch, length, device, activation_checkpointing, rank)
        for n in {min(2, layers), min(3, layers)}
    }
    fewest, most = min(peaks), max(peaks)
    return peaks[most] + (layers - most) * (peaks[most] - peaks[fewest])  # every further layer adds as much


def _with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"layers": layers})})


def _to_train(config: ModelConfig, rank: int | None) -> Multimodal:
    """The network, all of which is trained, or only low-rank updates of its backbone."""
    model = Multimodal(config).requires_grad_(rank is None)
    if rank is not None:
        lora.adapt(model.backbone, rank, 2.0 * rank)
    return model


def _traced(
    config: ModelConfig, batch: int, length: int, device: Device, activation_checkpointing: bool, rank: int | None
) -> float:  # fmt: skip
    with torch.device("meta"):
        shapes = _to_train(config, rank)
    sizes = [p.numel() for p in shapes.parameters() if p.requires_grad]
    seen = sample_batch(shapes, batch, length)
    targets = int((seen.targets != IGNORE).sum())
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live, torch.device(device.torch):
        model = _to_train(config, rank)
        model.backbone.set_activation_checkpointing(activation_checkpointing)
        live.most = live.now
        placed = seen.to(device.torch)
        with device.autocast():
            hidden = model(placed).flatten(0, 1)
            # What `token_losses` does, with the places counted here: a tensor without memory cannot say which they are.
            target_ids = placed.targets.flatten()
            count = torch.arange(targets)
            states = hidden[count][count]
            rows = model.output_embedding.of_type("text").to(states.dtype)
            loss = negative_log_likelihood(states, rows, target_ids[:targets]).sum()
        loss.backward()
        peak = live.most
    return float(peak + 8 * sum(sizes))  # and the optimizer's two moments


def training_step(
    config: ModelConfig,
    batch: int,
    length: int,
    device: Device,
    activation_checkpointing: bool = False,
    rank: int | None = None,
) -> Callable[[], None]:
    """A training step as `plait train` takes it, to be called again and again."""
    model = _to_train(config, rank).to(device.torch).train()
    model.backbone.set_activation_checkpointing(activation_checkpointing)
    step = Step([sample_batch(model, batch, length)], [np.zeros(0, np.int64)], np.zeros(0, np.int64))
    loss_module, optimizer = LossModule(model, device), make_optimizer([model], 1e-4, 0.1, (0.9, 0.95))

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = loss_module(step, True, False)
        (sum(output.sums.values()) / (batch * length) + output.zero_anchor).backward()
        float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0))
        optimizer.step()

    return work


def probed_seconds(
    config: ModelConfig,
    batch: int,
    length: int,
    device: Device,
    activation_checkpointing: bool = False,
    rank: int | None = None,
    seconds: float = 6.0,
) -> float:
    """Seconds of a training step here, from the steps of two networks of few layers that take turns."""
    keep_memory()  # as `plait train` does
    layers = config.backbone.layers
    few, more = min(1, layers), min(3, layers)
    works = {
        n: training_step(_with_layers(config, n), batch, length, device, activation_checkpointing, rank)
        for n in {few, more}
    }
    times: dict[int, list[float]] = {n: [] for n in works}
    for work in works.values():
        work()
    begun = time.perf_counter()
    while len(times[few]) < 3 or (len(times[few]) < 15 and time.perf_counter() - begun < seconds):
        for n, work in works.items():
            start = time.perf_counter()
            work()
            times[n].append(time.perf_counter() - start)
    typical = {n: median(values) for n, values in times.items()}
    if more == few:
        return typical[few]
    return typical[few] + (layers - few) * max(typical[more] - typical[few], 0.0) / (more - few)
