"""How far a job is, read from what it wrote: losses, time left, memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from plait.core.objective import losses_of_row
from plait.studio.jobs import Job

PROGRESS = "progress.json"  # of a run


@dataclass(frozen=True)
class Progress:
    """What a training has done.

    Attributes:
        step: Steps of the model so far.
        steps: Steps planned, 0 while that is not known.
        seconds_left: Of training, None while that is not known.
        training: (step, loss) of training, the mean over objectives.
        validation: (step, loss) of validation.
        checkpoint: The newest checkpoint's step, 0 for none.
        memory: Bytes that the job's processes hold.
        note: The last line that the job printed.
        work: The part of the training that is under way: "codec", "encoder" or "model"; "" before the first.
        done: Steps of that part.
        total: Steps of that part, in all.
    """

    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: int = 0
    memory: int = 0
    note: str = ""
    work: str = ""
    done: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """How far the part of the training is that is under way."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


def read_progress(run: Path, job: Job | None = None) -> Progress:
    """The progress of a run's training."""
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    times: list[int] = []
    for row in rows(run / "log.jsonl", {"step"}):
        losses = [value for value in losses_of_row(row).values() if isinstance(value, int | float)]
        if row.get("split") in curves and losses:
            curves[row["split"]].append((int(row["step"]), sum(losses) / len(losses)))
            if row["split"] == "train":
                times.append(int(row["step"]))
    step = times[-1] if times else 0
    state = _state(run)
    return Progress(
        step, _planned(run), state.get("seconds_left"), curves["train"], curves["val"], _newest(run), _memory(job),
        _note(job), state.get("work", ""), state.get("done", 0), state.get("total", 0),
    )  # fmt: skip


def _state(run: Path) -> dict[str, Any]:
    """The state of the part of the training that is under way, as the run wrote it last."""
    try:
        state = json.loads((run / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def rows(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines that have these keys; the last one may be half written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    complete = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the last line while it is being written
            continue
        if isinstance(row, dict) and keys <= row.keys():
            complete.append(row)
    return complete


def _planned(run: Path) -> int:
    try:
        run_record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    revised = [int(row["steps"]) for row in run_record.get("revisions", [])]
    return revised[-1] if revised else int(run_record.get("steps") or 0)


def _newest(run: Path) -> int:
    steps = [path.name.rpartition("-")[2] for path in (run / "checkpoints").glob("*") if not path.is_symlink()]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def _memory(job: Job | None) -> int:
    if job is None or not job.alive:
        return 0
    try:
        process = psutil.Process(job.process)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def _note(job: Job | None) -> str:
    if job is None:
        return ""
    try:
        with job.log.open("rb") as file:
            file.seek(max(job.log.stat().st_size - 2000, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
