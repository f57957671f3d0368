"""Runs of several processes, begun and disturbed: for the tests and for `soak_processes.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from conftest import RECIPE
from plait.training.run import Progress

SMALL = {**yaml.safe_load(RECIPE)["model"], "backbone": {"width": 32, "layers": 2, "heads": 2, "context": 96}}


def interrupted_after(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.stage == "model" and progress.done == step:
            raise KeyboardInterrupt

    return report


def write_recipe(folder: Path, **training: object) -> Path:
    settings = {"steps": 40, "codec_steps": 5, "batch_size": 4, "validations": 2, "precision": "fp32",
                "learning_rate": 5e-4, "log_records": True, "full_softmax_prob": 0}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": SMALL, "training": {**settings, **training}}))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    """The steps that a run has written down, of which a kill may have cut the last."""
    file = run / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def begin(
    data: Path,
    run: Path,
    recipe: Path,
    *options: object,
    after: int | None = None,
    processes: int = 2,
    default_threads: bool = False,
) -> subprocess.Popen[str]:
    """Start to train with several processes, and wait until so many steps are done. Each has one thread, unless it is
    to have as many as by default."""
    command = ["train", data, "-o", run, "--recipe", recipe, "--processes", processes, *options]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = subprocess.Popen(
        [sys.executable, "-m", "plait", *map(str, command)],
        env=env if default_threads else {**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while after is not None and started.poll() is None and len(rows(run)) < after:
        time.sleep(0.01)
    return started


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return [int(pid) for pid, parent in pairs if int(parent) == launcher]
