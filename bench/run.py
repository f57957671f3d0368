"""Speed beside other libraries, measured side by side in one run; see docs/benchmarks/speed.md for how to read it.

    python bench/run.py                      # make bench
    python bench/run.py --only training --compile
    python bench/run.py --device cuda
    python bench/run.py --real MODEL_FOLDER MODEL.gguf   # a real model beside transformers and llama.cpp too

Writes runs/bench/bench.md and bench.json; and on a processor with more than AVX2, what it does with AVX2 alone
(PLAIT_ISA=avx2) beside them in runs/bench/avx2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.core import isa  # isort: skip (before torch, which it may cap)

import as_shipped
import attention
import contrast
import generation
import machine
import media
import memory
import mixed
import real_model
import torch
import training
from measure import ROUNDS, SECONDS, Table, shown

from plait.core.device import choose_device, keep_memory, threads

PARTS = ("training", "shipped", "memory", "generation", "mixed", "contrast", "attention", "media")


def tables(options: argparse.Namespace, limits: dict[str, float]) -> Iterator[Table]:
    timing: dict[str, Any] = {"rounds": options.rounds, "seconds": SECONDS}
    names = ["350M", "1.3B"] if options.device == "cuda" else ["0.8M", "14M", *(["124M"] if options.large else [])]
    shapes = [training.SHAPES[name] for name in options.sizes or names]
    if options.quick:
        shapes, timing = [training.QUICK], {"rounds": 2, "seconds": 0.0}
    bandwidth = max(limits["read GB/s"], limits["copy GB/s"]) * 1e9
    if "training" in options.only:
        device = choose_device(options.device, training=True)
        for shape in shapes:
            for family in options.families:
                yield training.pair(
                    shape, family, device, options.compile, machine.peak(options.device, limits), **timing
                )
    if options.device == "cpu" and not options.quick:
        for shape in shapes:
            if "shipped" in options.only:
                yield as_shipped.table(shape.name, "Qwen3", options.rounds)
            if "memory" in options.only:
                yield memory.table(shape.name, "Qwen3")
    if "generation" in options.only:
        bf16 = choose_device(options.device, training=True).dtype is torch.bfloat16
        for shape in shapes:
            for precision in ["fp32"] * (options.device == "cpu") + ["bf16"] * bf16:
                yield from generation.tables(
                    shape, options.device, precision, options.compile, bandwidth, 8 if options.quick else 128, **timing
                )
    if "mixed" in options.only:
        yield mixed.table(options.device, **timing)
    if "contrast" in options.only:
        yield from contrast.run(choose_device(options.device, training=True), **timing)
    if options.device == "cpu":
        if "attention" in options.only:
            yield from attention.run(**timing)
        if "media" in options.only:
            yield from media.run(**timing)
        if options.real:
            folder, gguf = options.real
            yield from real_model.tables(folder, gguf, options.rounds, timing["seconds"])


def report(facts: dict[str, Any], found: list[Table]) -> str:
    """Everything as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Speed\n",
        f"{facts['processor']}, instructions up to {facts['instructions']}; "
        f"{facts['threads']} of {facts['processors']} processors; accelerator: "
        f"{facts['accelerator']}. Load before: {facts['load before']:.2f}. {versions}. "
        f"Environment: {facts['environment'] or 'plain'}.\n",
        "| limit of the machine | before | after |\n| --- | ---: | ---: |",
        *(f"| {n} | {shown(v)} | {shown(facts['limits after'][n])} |" for n, v in facts["limits before"].items()),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(table.markdown() for table in found)


def _plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--sizes", nargs="+", choices=training.SHAPES, help="these sizes in place of the device's own")
    parser.add_argument("--families", nargs="+", choices=training.FAMILIES, default=list(training.FAMILIES))
    parser.add_argument("--large", action="store_true", help="on a processor, the size 124M too")
    parser.add_argument("--real", nargs=2, type=Path, metavar=("FOLDER", "GGUF"), help="a pretrained model too")
    parser.add_argument("--compile", action="store_true", help="compiled contenders too; needs a C++ compiler")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each contender")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs; no figures")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    torch.set_num_threads(threads())
    keep_memory()  # as `plait train` does, here for all contenders
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network
    facts = machine.facts(options.device) | {
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "time": time.time(),
    }
    if facts["load before"] > 0.5:
        print(f"Other programs are running (load {facts['load before']:.1f}): ratios blur, and rates mean little.\n")
    facts["limits before"] = machine.limits(options.device, options.quick)
    found = list(tables(options, facts["limits before"]))
    facts["limits after"] = machine.limits(options.device, options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.md").write_text(report(facts, found), encoding="utf-8")
    (options.out / "bench.json").write_text(json.dumps(facts | {"tables": [asdict(t) for t in found]}, indent=1))
    print(f"Written to {options.out / 'bench.md'} and bench.json.")
    if options.device == "cpu" and not options.quick and isa.cap() is None and len(isa.supported()) > 1:
        capped(options)


def capped(options: argparse.Namespace) -> None:
    """What a processor with AVX2 alone would do: the parts where kernels count, once more in a process of that cap."""
    parts = [part for part in ("training", "shipped", "generation") if part in options.only]
    if not parts:
        return
    least = isa.supported()[0].name
    print(f"\nOnce more with {isa.VARIABLE}={least}.\n", flush=True)
    command = [sys.executable, __file__, "--only", *parts, "--families", "Qwen3", "--rounds", str(options.rounds)]
    if options.sizes:
        command += ["--sizes", *options.sizes]
    if options.real:
        command += ["--real", *map(str, options.real)]
    command += ["-o", str(options.out / least)]
    subprocess.run(command, env={**os.environ, isa.VARIABLE: least}, check=True)


if __name__ == "__main__":
    main()
