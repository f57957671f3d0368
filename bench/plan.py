"""What `plait plan` foresees of this machine beside what training then takes: peak memory and seconds a step.

Each measurement is a process of its own, which takes the trainer's own steps; a forecast is made before and after it,
so that a machine whose speed drifts hits both. `python bench/plan.py`; some 3 minutes on one thread.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from plait.core.device import choose_device, keep_memory, threads
from plait.modalities.base import Vocabulary
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig
from plait.planning.machines import peak_memory, probed_seconds, sample_batch
from plait.training.batches import Step
from plait.training.distributed import Group, Network
from plait.training.losses import LossModule, step_losses
from plait.training.optimizer import make_optimizer

STEPS = 7


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int

    def config(self) -> ModelConfig:
        backbone = TransformerConfig(
            width=self.width, layers=self.layers, heads=self.heads, kv_heads=self.heads,
            head_width=self.width // self.heads, hidden=round(self.width * 8 / 3 / 16) * 16, max_length=self.length,
        )  # fmt: skip
        vocabulary = Vocabulary(text=self.vocabulary, columns={}, levels={}, closers=[])
        return ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=True)


SHAPES = {
    "9M, held out": Shape(3, 448, 7, 4096, 3, 448),  # had no part in the choice of HEAP
    "14M": Shape(6, 384, 6, 8192, 8, 256),
    "34M": Shape(8, 512, 8, 16384, 4, 256),
    "124M": Shape(12, 768, 12, 50304, 1, 512),
}


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def trainer_step(config: ModelConfig, batch: int, length: int) -> Any:
    device = choose_device("cpu", training=True)
    model = Multimodal(config).train()
    network = Network(LossModule(model, device), model.backbone, Group(), "ddp", device)
    optimizer = make_optimizer([model], 1e-4, 0.1, (0.9, 0.95))
    step = Step([sample_batch(model, batch, length)], [np.zeros(0, np.int64)], np.zeros(0, np.int64))

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        step_losses(network, [step], None, Group(), True, {})  # type: ignore[arg-type]  # no contrast, no split
        network.clip_grad_norm(1.0)
        optimizer.step()

    return work


def measure(name: str) -> dict[str, float]:
    """Peak memory above what the program takes by itself, and the median step."""
    keep_memory()
    shape = SHAPES[name]
    small = trainer_step(Shape(1, 32, 1, 256, 2, 16).config(), 2, 16)
    small()
    before = resident()
    work = trainer_step(shape.config(), shape.batch, shape.length)
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"program": before, "peak": peak, "seconds": median(times[2:])}


def foresee(name: str) -> dict[str, float]:
    keep_memory()
    shape, device = SHAPES[name], choose_device("cpu", training=True)
    config = shape.config()
    return {
        "peak": peak_memory(config, shape.batch, shape.length, device),
        "seconds": probed_seconds(config, shape.batch, shape.length, device),
    }


def main() -> None:
    print("| size | peak GB: foreseen | measured | off by | step s: foreseen | measured | off by |")
    print("| --- |" + " ---: |" * 6)
    for name in SHAPES:
        results = []
        for part in ("foresee", "measure", "foresee"):
            command = [sys.executable, __file__, part, name]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        before, measured, after = results
        peak, seconds = before["peak"], mean((before["seconds"], after["seconds"]))
        print(
            f"| {name} | {peak / 1e9:.3f} | {measured['peak'] / 1e9:.3f} | {peak / measured['peak'] - 1:+.1%} "
            f"| {seconds:.3f} | {measured['seconds']:.3f} | {seconds / measured['seconds'] - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(threads())
    if len(sys.argv) == 3:
        print(json.dumps({"measure": measure, "foresee": foresee}[sys.argv[1]](sys.argv[2])))
    else:
        main()
