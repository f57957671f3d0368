"""Training as it ships: our step in one process, that of transformers in another, sampled in turn.

    OMP_NUM_THREADS=1 python bench/as_shipped.py --sizes 14M 0.8M

Ours is what `plait train` does of itself in a run of text of ten minutes or more: glibc keeps freed memory, and blocks
are native or, where those cannot be had but a C++ compiler can, compiled by torch. The peer is a plain loop as most
write it: autocast, eager, fused AdamW, gradients clipped at 1, and the allocator as it is.
"""

from __future__ import annotations

import argparse
import multiprocessing
from multiprocessing.connection import Connection

from plait.core import isa  # noqa: F401  isort: skip (before torch, which it may cap)

import torch
from measure import OURS, Contender, Row, Table, clock, timed
from training import FAMILIES, SHAPES, as_transformers, losses, make_model, step_of, text_checkpoint

from plait.core.device import choose_device, compiler, keep_memory, threads
from plait.kernels import training as native
from plait.training.optimizer import make_optimizer

SECONDS = 2.0  # a sample lasts about so long


def side(pipe: Connection, ours: bool, size: str, family: str) -> None:
    """One contender: tells when it is ready, then answers each message with a rate, until there is none."""
    torch.set_num_threads(threads())
    if ours:
        keep_memory()
    device = choose_device("cpu", training=True)
    shape = SHAPES[size]
    model = make_model(shape, family)
    loss, their_loss, tokens = losses(shape, device)
    if ours:
        if native.library() is None and compiler() is not None:
            model.backbone.compile_blocks()
        work = step_of(make_optimizer([model], 1e-4, 0.1, (0.9, 0.95)), model, lambda: loss(model), tokens)
    else:
        peer = as_transformers(text_checkpoint(model)).train()
        work = step_of(make_optimizer([peer], 1e-4, 0.1, (0.9, 0.95)), peer, lambda: their_loss(peer), tokens)
    contender = Contender("", work, matmul=OURS if ours else "highest")
    for _ in range(3):
        work()
    begun = clock("cpu")
    timed(contender, 1, "cpu")
    calls = max(round(SECONDS / (clock("cpu") - begun)), 1)
    pipe.send(None)
    while pipe.recv():
        pipe.send(timed(contender, calls, "cpu"))


def table(size: str, family: str, rounds: int) -> Table:
    context = multiprocessing.get_context("spawn")
    device = choose_device("cpu", training=True)
    blocks, precision = native.backend_name(device), str(device.dtype).removeprefix("torch.")
    rows = [Row("ours", note=f"blocks: {blocks}"), Row(f"transformers {family}, eager")]
    pipes, processes = [], []
    for ours in (True, False):
        mine, other = context.Pipe()
        process = context.Process(target=side, args=(other, ours, size, family))
        process.start()
        mine.recv()
        pipes.append(mine)
        processes.append(process)
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            pipes[which].send(True)
            rows[which].rates.append(pipes[which].recv())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    rows[1].ratios = [a / b for a, b in zip(rows[0].rates, rows[1].rates, strict=True)]
    found = Table(f"Training {size}, each as it ships, {precision}", "tokens/s", rows)
    print(found.markdown(), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["14M", "0.8M"])
    parser.add_argument("--family", choices=FAMILIES, default="Qwen3")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for size in options.sizes:
        table(size, options.family, options.rounds)


if __name__ == "__main__":
    main()
