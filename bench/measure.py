"""How everything here is timed: contenders take turns, round by round, so that what else the machine does hits all.

A rate is work a second: of the process's CPU time where it has one thread of a processor, so that other programs take
no part in it, and of wall time elsewhere. A ratio is taken within a round, then its median over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from plait.core import isa
from plait.core.device import product_precision

ROUNDS, SECONDS = 7, 1.0  # samples of each contender, and how long a sample lasts at least
LEVEL = level.name if (level := isa.level()) else "no AVX2"  # the instructions that a processor may use here
OURS = product_precision()  # torch's precision of fp32 products, as plait sets it on this processor


@dataclass
class Contender:
    """`work` does one unit of the task and returns how much that was: tokens, images, seconds of audio."""

    name: str
    work: Callable[[], float]
    against: str = ""  # the contender whose rate is divided by this one's
    matmul: str = "highest"  # torch's precision of fp32 products: "highest" as torch ships
    note: str = ""


@dataclass
class Row:
    name: str
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    share: float | None = None  # of the limit
    note: str = ""


@dataclass
class Table:
    title: str
    unit: str
    rows: list[Row]
    limit: str = ""  # what `share` is a share of
    level: str = LEVEL  # the instruction set, or the accelerator

    def markdown(self) -> str:
        limit = [self.limit] if self.limit else []
        head = ["", self.unit, "least to most", "ours / this", "least to most", *limit, ""]
        lines = [
            f"### {self.title}, {self.level}\n",
            f"| {' | '.join(head)} |",
            "| --- |" + " ---: |" * (len(head) - 2) + " --- |",
        ]
        for row in self.rows:
            cells = [row.name, *spread(row.rates, shown), *spread(row.ratios, "{:.2f}".format)]
            if self.limit:
                cells.append("" if row.share is None else f"{row.share:.0%}")
            lines.append(f"| {' | '.join([*cells, row.note])} |")
        return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: list[float], text: Callable[[float], str]) -> tuple[str, str]:
    """(median, least to most) as cells."""
    return (text(median(values)), f"{text(min(values))} to {text(max(values))}") if values else ("", "")


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(device: str) -> float:
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def timed(contender: Contender, calls: int, device: str) -> float:
    """The rate of one sample."""
    torch.set_float32_matmul_precision(contender.matmul)
    wait(device)
    start = clock(device)
    done = sum(contender.work() for _ in range(calls))
    wait(device)
    return done / (clock(device) - start)


def compare(
    title: str,
    unit: str,
    contenders: Sequence[Contender],
    device: str = "cpu",
    limit: tuple[str, float] = ("", 0.0),
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Table:
    """Time contenders in turn. One that fails keeps its row, with the reason; `limit` is a name and a rate."""
    rows = {c.name: Row(c.name, note=c.note) for c in contenders}
    calls: dict[str, int] = {}
    for contender in contenders:
        try:
            for _ in range(2):  # compilation, caches, the allocator
                contender.work()
            begun = clock(device)
            timed(contender, 1, device)
            calls[contender.name] = max(round(seconds / (clock(device) - begun)), 1)
        except (RuntimeError, ImportError, ValueError) as error:
            rows[contender.name].note = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    running = [c for c in contenders if c.name in calls]
    for turn in range(rounds):
        first = turn % max(len(running), 1)
        for contender in running[first:] + running[:first]:
            rows[contender.name].rates.append(timed(contender, calls[contender.name], device))
    for contender in running:
        row = rows[contender.name]
        if limit[1]:
            row.share = median(row.rates) / limit[1]
        if contender.against in calls:
            row.ratios = [a / b for a, b in zip(rows[contender.against].rates, row.rates, strict=True)]
    table = Table(title, unit, list(rows.values()), limit[0] if limit[1] else "", LEVEL if device == "cpu" else device)
    print(table.markdown(), flush=True)
    return table
