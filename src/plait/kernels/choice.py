"""Which of several ways of computing the same is the fastest here, found by timing them for some milliseconds.

What was found is kept in the user's cache, one file a question, and shown by `plait doctor`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from plait.core import isa
from plait.core.files import cache_folder

KERNEL, PYTORCH = "kernel", "PyTorch"
SECONDS, ROUNDS = 0.03, 3  # that a way is timed for at one shape, and how often it takes its turn at least
TIE = 1.03  # how much faster PyTorch must be to be taken: less is noise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What decides the answer. `what` names it for people; the rest is what else could change it."""

    what: str
    kernel: str  # the compiled file
    level: str
    threads: int
    processor: str
    torch: str

    @property
    def key(self) -> str:
        """What answers are kept under."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Choice:
    """Seconds that each way took at each shape; the kernel is taken where PyTorch is not clearly faster."""

    what: str
    seconds: dict[str, dict[str, float]]  # shape -> way -> seconds
    processor: str = ""
    threads: int = 0
    level: str = ""

    def way(self, shape: str) -> str:
        """The kernel, or PyTorch where that is clearly faster at a shape."""
        times = self.seconds[shape]
        return PYTORCH if times[KERNEL] > TIE * times[PYTORCH] else KERNEL

    def ratio(self, shape: str) -> float:
        """How many times as fast the kernel is as PyTorch."""
        return self.seconds[shape][PYTORCH] / self.seconds[shape][KERNEL]

    def words(self) -> str:
        """The answer, for people."""
        shapes = ", ".join(f"{shape} {self.way(shape)} ({self.ratio(shape):.2f})" for shape in self.seconds)
        return f"{self.what}, {self.level}, {self.threads} threads: {shapes}; kernel / PyTorch in brackets"


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def question(what: str, kernel: str) -> Question:
    """The question as it stands on this machine; `kernel` names the compiled file."""
    level = isa.level()
    return Question(
        what, kernel, level.name if level else "none", torch.get_num_threads(), processor(), torch.__version__
    )


def choose(question: Question, ways: Callable[[], Mapping[str, Mapping[str, Callable[[], object]]]]) -> Choice:
    """The answer from the cache, else by timing what `ways` gives: shape -> way -> a call to time."""
    path = choice_folder() / f"{question.key}.json"
    known = _read(path)
    if known is None:
        seconds = {shape: _timed(calls) for shape, calls in ways().items()}
        known = Choice(question.what, seconds, question.processor, question.threads, question.level)
        _write(path, known)
        log.info("Measured: %s", known.words())
    return known


def known_choices() -> list[Choice]:
    """All answers in the cache that belong to this processor, the newest first."""
    newest_first = sorted(choice_folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    choices = (_read(path) for path in newest_first)
    return [choice for choice in choices if choice is not None and choice.processor == processor()]


def _timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least time of each call, taken in turns; of the processor where one thread works, else of the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    begun, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begun < SECONDS * len(calls):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
        rounds += 1
    return best


def choice_folder() -> Path:
    """Where the answers are kept, one file a question."""
    try:
        return cache_folder("choices")
    except RuntimeError:  # no home: measured anew by each process
        return Path(tempfile.gettempdir()) / "plait-choices-none"


def _read(path: Path) -> Choice | None:
    try:
        choice = Choice(**json.loads(path.read_text(encoding="utf-8")))
        return choice if all(choice.ratio(shape) > 0 for shape in choice.seconds) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return None


def _write(path: Path, choice: Choice) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(choice), indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        log.info("The choice could not be kept in %s; the next process measures again.", path.parent)
