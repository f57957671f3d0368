"""One step of the 14M backbone at position 64, and a prompt of 512: kernels beside PyTorch, in each precision.

    PLAIT_ISA=avx2 OMP_NUM_THREADS=1 python bench/step.py
    python bench/step.py --storages fp32 bf16 --rounds 15

Ours in fp32 is the reference of every row; a ratio above 1 says that fp32 is faster than that row.
"""

from __future__ import annotations

import argparse
from typing import Any

import plait  # noqa: F401  # isort: skip (before torch, which PLAIT_ISA may cap)

import numpy as np
import torch
from measure import OURS, ROUNDS, Contender, Table, compare
from training import SHAPES, make_model

from plait.core.device import Device, choose_device, threads
from plait.inference.decoder import Decoder, Ways
from plait.kernels.choice import KERNEL, PYTORCH
from plait.kernels.quantisation import STORAGES

POSITION, PROMPT, BATCHES = 64, 512, (1, 8, 32)


def step_of(decoder: Decoder, rows: int) -> Any:
    """A call that reads one more position in each row; gives how many."""
    cache = decoder.cache(rows, POSITION + 1)
    x = torch.randn(rows, decoder.config.width).to(decoder.device.dtype)

    def work() -> float:
        with torch.inference_mode():
            cache.lengths.fill_(POSITION)
            decoder.step(x, cache, np.full(rows, POSITION))
        return float(rows)

    return work


def prompt_of(decoder: Decoder) -> Any:
    """A call that reads a prompt; gives its length."""
    x = torch.randn(1, PROMPT, decoder.config.width).to(decoder.device.dtype)

    def work() -> float:
        with torch.inference_mode():
            decoder(x)
        return float(PROMPT)

    return work


def tables(storages: list[str], **timing: Any) -> list[Table]:
    """One a batch size, and one of prompts."""
    torch.manual_seed(0)
    backbone = make_model(SHAPES["14M"], "Qwen3", tied=False, length=PROMPT + 1).eval().backbone
    made = {f"ours, {name}": Decoder(backbone, _device(name), Ways.all(KERNEL)) for name in ["fp32", *storages]}
    made["PyTorch, fp32"] = Decoder(backbone, _device("fp32"), Ways.all(PYTORCH))

    def contenders(call: Any) -> list[Contender]:
        first = next(iter(made))
        return [Contender(name, call(one), "" if name == first else first, OURS) for name, one in made.items()]

    found = [
        compare(f"A step of 14M, batch {rows}", "tokens/s", contenders(lambda one, n=rows: step_of(one, n)), **timing)
        for rows in BATCHES
    ]
    return [*found, compare(f"14M, a prompt of {PROMPT}", "tokens/s", contenders(prompt_of), **timing)]


def _device(storage: str) -> Device:
    return choose_device("cpu", storage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", choices=STORAGES[1:], default=list(STORAGES[1:]))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a sample")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    tables([name for name in options.storages if name != "fp32"], rounds=options.rounds, seconds=options.seconds)


if __name__ == "__main__":
    main()
