"""Memory of training: the peak of one process, above what it took with all libraries loaded, after some steps.

Each contender trains alone in a process of its own, eager, as it ships: ours has the allocator keep what is freed.
Linux only: the peak is the kernel's count of resident memory.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from measure import OURS, Row, Table
from training import SHAPES, losses, make_model, step_of, text_checkpoint

from plait.core.device import choose_device, keep_memory, threads
from plait.hf.export import export_transformers
from plait.training.optimizer import make_optimizer

STEPS = 4


def resident(entry: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(entry))
    return int(line.split()[1]) * 1024


def side(pipe: Connection, name: str, family: str, folder: str | None) -> None:
    """Train ours, or the exported model in a folder; sends the peak in bytes."""
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    torch.set_num_threads(threads())
    shape, device = SHAPES[name], choose_device("cpu", training=True)
    torch.set_float32_matmul_precision("highest" if folder else OURS)
    loss, their_loss, tokens = losses(shape, device)
    a = torch.ones(64, 64, requires_grad=True)
    with device.autocast():
        (a @ a).sum().backward()  # what libraries set up at their first use
    start = resident("VmRSS")
    if folder is None:
        keep_memory()
        model = make_model(shape, family).train()
        work = step_of(make_optimizer([model], 1e-4, 0.1, (0.9, 0.95)), model, lambda: loss(model), tokens)
    else:
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        work = step_of(make_optimizer([peer], 1e-4, 0.1, (0.9, 0.95)), peer, lambda: their_loss(peer), tokens)
    for _ in range(STEPS):
        work()
    pipe.send(resident("VmHWM") - start)


def table(name: str, family: str) -> Table:
    context = multiprocessing.get_context("spawn")
    rows = [Row("ours"), Row(f"transformers {family}")]
    model = make_model(SHAPES[name], family)
    states = 16 * sum(p.numel() for p in model.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        export_transformers(text_checkpoint(model), Path(folder) / "model")
        del model
        for row, source in zip(rows, (None, str(Path(folder) / "model")), strict=True):
            mine, other = context.Pipe()
            process = context.Process(target=side, args=(other, name, family, source))
            process.start()
            other.close()
            row.rates.append(mine.recv() / 1e6)
            process.join()
    rows[1].ratios = [rows[1].rates[0] / rows[0].rates[0]]
    rows[0].note = f"weights, gradients and moments {states:,.0f}; the ratio is theirs / ours"
    precision = str(choose_device("cpu", training=True).dtype).removeprefix("torch.")
    found = Table(f"Memory of training {name}, {family}, {precision}", "MB", rows)
    print(found.markdown(), flush=True)
    return found
