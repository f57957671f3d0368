"""Runs as children that can be killed, and what an unbroken run leaves; for `soak.py` and `soak_saves.py`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

import plait.reports.report  # children of a fork have what was loaded here
import plait.training.trainer
from conftest import RECIPE, write_world
from plait import cli, console

STEPS, EPOCH, EVERY, VALIDATIONS = 60 if "--short" in sys.argv else 200, 20, 10, 8
BATCH = 4
TRAINING = {
    "steps": STEPS, "codec_steps": 5, "batch_size": BATCH, "save_every": EVERY, "validations": VALIDATIONS,
    "patience": 100, "ema": 0.9, "label_smoothing": 0.05, "log_records": True, "precision": "fp32",
}  # fmt: skip
MODEL = {**yaml.safe_load(RECIPE)["model"], "backbone": {"width": 32, "layers": 1, "heads": 2, "dropout": 0.1}}


# --- children ---------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A forked process at work, and what it says."""

    pid: int
    said: Path

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, negative for a signal."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"process {self.pid} did not end in {seconds} s: {self.said.read_text()}")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def fork(work: Callable[[], object], said: Path) -> Child:
    """Do `work` in a child whose output goes to a file."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, said)
    code = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        console.out.file, console.err.file = sys.stdout, sys.stderr
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def plait(*arguments: object) -> Callable[[], None]:
    """The real command line, as work for a child."""

    def work() -> None:
        sys.argv = ["plait", *map(str, arguments)]
        cli.main()

    return work


# --- runs -------------------------------------------------------------------------------------------------------


class Place:
    """A folder with a data set, a recipe, and the run that nothing happened to."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe = root, root / "recipe.yaml"
        root.mkdir(parents=True, exist_ok=True)
        write_world(root / "files", 64)
        for workers in (0, 1, 2):
            self.run_command(plait("prepare", root / "files", "-o", root / f"data{workers}", "--workers", workers))
        self.recipe.write_text(yaml.safe_dump({"model": MODEL, "training": TRAINING}, allow_unicode=True))
        begun = time.monotonic()
        self.run_command(self.train("whole"))
        self.seconds = time.monotonic() - begun
        self.truth = fingerprint(root / "whole")

    def train(self, name: str | Path, workers: int = 0) -> Callable[[], None]:
        return plait("train", self.root / f"data{workers}", "-o", self.root / name, "--recipe", self.recipe)

    def start(self, name: str, workers: int = 0) -> Child:
        return fork(self.train(name, workers), self.said(name))

    def said(self, name: str) -> Path:
        return self.root / f"{name}.txt"

    def run_command(self, work: Callable[[], object]) -> None:
        said = self.root / "said.txt"
        if code := fork(work, said).wait():
            raise RuntimeError(f"exit code {code}: {said.read_text()}")

    def finish(self, name: str, workers: int = 0) -> int:
        """Go on to the end; the step that it went on from. Raises AssertionError where the end is another."""
        before = len(self.said(name).read_text()) if self.said(name).exists() else 0
        child = self.start(name, workers)
        code = child.wait()
        text = self.said(name).read_text()[before:]
        assert code == 0, text
        assert fingerprint(self.root / name) == self.truth, f"{name} ended unlike the unbroken run"
        match = re.search(r"going on from step (\d+)", text)
        return int(match[1]) if match else 0

    def clear(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)
        self.said(name).unlink(missing_ok=True)


def fingerprint(run: Path) -> dict[str, str]:
    """What has to be equal: loss bits and record ids of all steps, the log apart from its times, weights, optimizer."""
    found = {"records.jsonl": _sha(run / "records.jsonl")}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second", "waited")} for row in rows]
    found["log.jsonl"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    for link in ("best", "last"):
        for file in sorted((run / "checkpoints" / link).resolve().glob("*")):
            found[f"{link}/{file.name}"] = _sha(file)
    return found


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_done(run: Path) -> int:
    """How many steps a run has written down."""
    path = run / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(condition: Callable[[], object], child: Child, seconds: float = 120) -> bool:
    """Wait for a moment in a child's life; False where it ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if Path(f"/proc/{child.pid}/stat").read_text().split(") ")[1][0] == "Z":
            return False
        time.sleep(0.001)
    raise TimeoutError("the moment never came")
