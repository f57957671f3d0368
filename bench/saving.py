"""How long a save holds training up, as a share of the 100 steps between two saves: a model of 14M parameters.

    python bench/saving.py

A save costs training the copying of the tensors, and what the thread that writes takes from the steps beside it. So
steps in peace and steps from a save until it lies on the disk are timed in turn; what these take longer is the stall.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from training import SHAPES, make_model, step_of, text_checkpoint

from plait.core.device import choose_device, threads
from plait.model.multimodal import IGNORE, Batch
from plait.training.batches import Step
from plait.training.checkpointing import Position, Saver
from plait.training.distributed import Group
from plait.training.losses import LossModule
from plait.training.optimizer import make_optimizer

BETWEEN = 100  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="14M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peace", type=int, default=3, help="steps in peace a round")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    shape, device = SHAPES[options.size], choose_device("cpu", training=True)
    model = make_model(shape, "Qwen3").train()
    whole, optimizer = text_checkpoint(model), make_optimizer([model], 1e-4, 0.1, (0.9, 0.95))
    tokens = torch.randint(shape.vocabulary - 2, (shape.batch, shape.length))
    targets = torch.cat([tokens[:, 1:], torch.full((shape.batch, 1), IGNORE)], 1)
    batch = Batch(tokens, targets, torch.full((shape.batch,), shape.length), {}, [])
    step = Step([batch], [np.zeros(0, np.int64)], np.zeros(0, np.int64))
    passes = LossModule(model, device)
    work = step_of(optimizer, model, lambda: passes(step, True, False).sums["text"] / tokens.numel(), tokens.numel())
    peace, calls, shares, written = [], [], [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saver = Saver(Path(folder) / "checkpoints", 2, None, Group())
        for _ in range(2):
            work()
        for number in range(1, options.rounds + 1):
            begun = time.perf_counter()
            for _ in range(options.peace):
                work()
            one = (time.perf_counter() - begun) / options.peace
            begun = time.perf_counter()
            saver.save(whole, optimizer, None, Position(step=number))
            calls.append(time.perf_counter() - begun)
            beside = 0
            while saver.saving:
                work()
                beside += 1
            written.append(time.perf_counter() - begun)
            saver.wait()
            peace.append(one)
            shares.append((written[-1] - beside * one) / (BETWEEN * one))
        size = sum(file.stat().st_size for file in (Path(folder) / "checkpoints" / "last").glob("*"))
    parameters = sum(model.parameter_count().values())
    print(f"{parameters / 1e6:.1f}M parameters, {size / 1e6:.0f} MB a checkpoint, {torch.get_num_threads()} threads")
    print(f"a step {median(peace):.3f} s; a call to save {median(calls):.3f} s; on the disk in {median(written):.2f} s")
    print(
        f"stall: {median(shares):.2%} of {BETWEEN} steps (median of {options.rounds}; "
        f"{min(shares):.2%} to {max(shares):.2%})"
    )


if __name__ == "__main__":
    main()
