"""Generation by two checkouts in turns: whether a change made it slower.

    python bench/two_trees.py OLD NEW --size 0.8M      # folders of checkouts; PLAIT_ISA caps the instructions

Each checkout runs in a process of its own with its own `src` and `bench`, on the same weights and prompts (greedy, 32
ids read and 128 written). The two take turns, and are begun anew several times, since a process can be 5 % slower than
its like by where its memory lies. A row gives tokens a processor second, and the median and the spread of new / old.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCHES = (1, 8, 32)
READ, WRITE = 32, 128


def work(size: str) -> None:
    """Of each batch size on stdin, write tokens a processor second to stdout; "ready" once the model is made."""
    sys.path.insert(0, str(Path.cwd() / "bench"))
    from plait.core import isa  # noqa: F401, I001 - before torch, which it may cap

    import numpy as np
    import torch
    from training import SHAPES, make_model, text_checkpoint

    from plait.core.device import choose_device, keep_memory
    from plait.inference.engine import Engine, Request
    from plait.model.multimodal import Sequence

    torch.set_num_threads(1)
    keep_memory()
    shape, device = SHAPES[size], choose_device("cpu", "fp32")
    torch.manual_seed(0)
    model = make_model(shape, "Qwen3", tied=False, length=max(shape.length, READ + WRITE)).eval()
    with torch.no_grad():  # the end and padding never win, so that every row is as long
        model.output_embedding.free[model.vocabulary.text :] = 0
    engine = Engine(text_checkpoint(model), device)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = np.random.default_rng(0).integers(0, shape.vocabulary - 2, (int(line), READ))
        requests = [Request(Sequence().read_ids(prompt.tolist()), max_new_tokens=WRITE) for prompt in prompts]
        start, written = time.process_time(), 0
        while time.process_time() - start < 1.0:
            written += sum(len(result.samples[0].ids) for result in engine.run(requests))
        print(written / (time.process_time() - start), flush=True)


class Tree:
    """A checkout at work."""

    def __init__(self, folder: Path, size: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--work", "--size", size],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "src")}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._read() != "ready":
            raise SystemExit(f"{folder} cannot be measured: its process ended.")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def rate(self, rows: int) -> float:
        """Tokens a processor second at a batch of so many rows."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        return float(self._read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="two folders: before and after")
    parser.add_argument("--size", default="0.8M")
    parser.add_argument(
        "--processes", type=int, default=4, help="pairs of processes: where memory lies differs by them"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.size)
        return
    if len(options.trees) != 2:
        parser.error("name two folders")
    pairs: dict[int, list[tuple[float, float]]] = {rows: [] for rows in BATCHES}
    for _ in range(options.processes):
        old, new = (Tree(folder.resolve(), options.size) for folder in options.trees)
        for rows in BATCHES:
            old.rate(rows), new.rate(rows)  # not counted: caches fill
            for number in range(options.rounds):
                first, second = (old, new) if number % 2 == 0 else (new, old)
                rates = first.rate(rows), second.rate(rows)
                pairs[rows].append(rates if first is old else rates[::-1])
        for tree in (old, new):
            tree.process.terminate()
    print("| batch | before, tokens a processor second | after | after / before | least to most |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for rows, measured in pairs.items():
        ratios = [after / before for before, after in measured]
        before, after = (statistics.median(rates) for rates in zip(*measured, strict=True))
        print(
            f"| {rows} | {before:,.0f} | {after:,.0f} | {statistics.median(ratios):.3f} | "
            f"{min(ratios):.3f} to {max(ratios):.3f} |"
        )


if __name__ == "__main__":
    main()
