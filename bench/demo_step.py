"""A step of the demo's training: how long one takes, with one thread and with two, and where its time goes.

    PLAIT_ISA=avx2 python bench/demo_step.py runs/demo/data           # a dataset that `plait demo` made
    python bench/demo_step.py runs/demo/data --against ../other/src   # beside another version, in turns
    python bench/demo_step.py runs/demo/data --profile 1              # by operator, with one thread

The step is the trainer's own: losses of all objectives, gradients, weights; its batch was made by the thread that makes
them ahead. By the clock, since that is what a second thread is for: run it on idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import plait  # isort: skip (before torch, which PLAIT_ISA may cap)

import torch

from plait.core.config import load_recipe
from plait.core.device import choose_device, keep_memory, matmul_precision
from plait.core.signals import signals
from plait.data.dataset import Dataset
from plait.training.callbacks import Callbacks
from plait.training.preparation import prepare_run
from plait.training.run import Run
from plait.training.trainer import Trainer

STEPS, ROUNDS = 15, 5  # timed steps of a round, and rounds


def trainer(data: Path, folder: Path, threads: int) -> Trainer:
    """A trainer of the demo's model with so many threads, its codecs hardly trained: what they say does not change what
    a step takes."""
    torch.set_num_threads(threads)
    overrides = {"training": {"task": "draw", "steps": 1000, "codec_steps": 2}}
    recipe = load_recipe(None, overrides)
    run = Run(folder, Dataset.open(data), recipe, lambda progress: None, choose_device("cpu", training=True))
    folder.mkdir()
    run.open()
    with signals() as received:
        return Trainer(run, prepare_run(run, None), received, Callbacks([]))


def seconds_of(one: Trainer, threads: int, start: int) -> float:
    """Of a step, with the threads that it was made for."""
    torch.set_num_threads(threads)
    one._optimize(start)
    begun = time.perf_counter()
    for step in range(start + 1, start + 1 + STEPS):
        one._optimize(step)
    return (time.perf_counter() - begun) / STEPS


def profile(one: Trainer, threads: int) -> None:
    """Operators by the time that they take themselves."""
    for step in range(5):
        one._optimize(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for step in range(5, 5 + STEPS):
            one._optimize(step)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=48))


def rounds(data: Path) -> None:
    """A line of JSON for each round as it is asked for on the standard input: threads -> seconds of a step."""
    with tempfile.TemporaryDirectory() as folder, matmul_precision(choose_device("cpu", training=True)):
        made = {threads: trainer(data, Path(folder) / str(threads), threads) for threads in (1, 2)}
        for number, _ in enumerate(sys.stdin):
            found = {threads: seconds_of(one, threads, 40 * number) for threads, one in made.items()}
            print(json.dumps(found), flush=True)
        for one in made.values():
            one.batches.close()


def compare(data: Path, versions: dict[str, Path]) -> None:
    """Each version in a process of its own, round by round in turns."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, str(data), "--rounds"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(source)},
                )
            )
            for name, source in versions.items()
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for number in range(ROUNDS + 1):
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                print(number, file=worker.stdin, flush=True)
                line = json.loads(worker.stdout.readline())
                if number:  # the first warms up
                    found[name].append(line)
        for worker in workers.values():
            assert worker.stdin
            worker.stdin.close()
    print(f"A step of the demo, {ROUNDS} rounds of {STEPS} steps, medians; load {os.getloadavg()[0]:.1f}\n")
    print("| | one thread, ms | two threads, ms | one / two |\n| --- | ---: | ---: | ---: |")
    for name, lines in found.items():
        one, two = (median(line[threads] for line in lines) * 1000 for threads in "12")
        ratio = median(line["1"] / line["2"] for line in lines)
        print(f"| {name} | {one:.1f} | {two:.1f} | {ratio:.2f} |")
    if len(found) > 1:
        first, *others = found.values()
        for name, lines in zip(list(found)[1:], others, strict=True):
            for threads in "12":
                ratio = median(b[threads] / a[threads] for a, b in zip(first, lines, strict=True))
                print(f"\nours / {name}, {threads} thread(s): {ratio:.2f} times as fast", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the demo's dataset")
    parser.add_argument("--against", type=Path, help="the src folder of another version")
    parser.add_argument("--profile", type=int, metavar="THREADS", help="operators, with so many threads")
    parser.add_argument("--rounds", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_memory()
    if options.rounds:
        rounds(options.data)
    elif options.profile:
        with tempfile.TemporaryDirectory() as folder, matmul_precision(choose_device("cpu", training=True)):
            one = trainer(options.data, Path(folder) / "run", options.profile)
            profile(one, options.profile)
            one.batches.close()
    else:
        versions = {"ours": Path(plait.__file__).parents[1]}
        if options.against:
            versions[str(options.against)] = options.against
        compare(options.data, versions)


if __name__ == "__main__":
    main()
