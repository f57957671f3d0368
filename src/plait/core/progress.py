"""Progress of long work: bars in terminals and notebooks, a line now and then on a pipe, all by rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 20.0  # between two lines of a stage where there is no terminal

# Called as (stage, done, total or None, note).
ProgressFunction = Callable[[str, int, int | None, str], None]


@dataclass(frozen=True)
class StudyNews:
    """What a study tells while it works. `line` is what has just come to its end."""

    stage: str
    done: int
    total: int
    note: str = ""
    line: str = ""


class ProgressBar:
    """A bar for each stage of long work; use it as a context, and call it.

    Args:
        enabled: True for bars, or lines where there is no terminal; None for bars in terminals and notebooks and
            nothing elsewhere, as suits a library; False for nothing.
        console: where to; standard error if left out.
    """

    def __init__(self, enabled: bool | None = None, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console(stderr=not _in_notebook(), highlight=False)
        self.interactive = (self.console.is_terminal or self.console.is_jupyter) and enabled is not False
        self.lines = bool(enabled) and not self.interactive
        self.bars = Progress(
            TextColumn("{task.description:14}"), BarColumn(30), TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}
        self.shown: dict[str, float] = {}  # stage -> when its last line was printed

    def __enter__(self) -> ProgressBar:
        if self.interactive:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int | None = None, note: str = "") -> None:
        """Show how far a stage is.

        Args:
            stage: its name; each has a bar.
            done: units that are done.
            total: units in all, None where that is not known.
            note: what stands behind the bar.
        """
        if self.interactive:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=total, note="")
            self.bars.update(self.tasks[stage], completed=done, total=total, note=note.replace("[", "\\["))
        elif self.lines and self._is_due(stage, done, total, note):
            self.shown[stage] = time.monotonic()
            self.console.print(_line(stage, done, total, note), markup=False, soft_wrap=True)

    def _is_due(self, stage: str, done: int, total: int | None, note: str) -> bool:
        """Whether a line is printed: at the beginning, now and then, and at the end; what is one thing has no end to
        tell of once its beginning was told."""
        if total == 1 and not note and stage in self.shown:
            return False
        return done == total or time.monotonic() - self.shown.get(stage, 0.0) > LINE_SECONDS

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        if self.interactive or self.lines:
            self.console.print(text, markup=False, soft_wrap=True)


def _line(stage: str, done: int, total: int | None, note: str) -> str:
    """How far a stage is, as a line; what is one thing, or has just begun, is not counted."""
    if total == 1 and note:
        return f"{stage}: {note}"
    if total == 1 or not done:
        return f"{stage} ..." + (f"  {note}" if note else "")
    return f"{stage}: {done}{f'/{total}' if total else ''}{f'  {note}' if note else ''}"


def _in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel; IPython is not imported for that."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return type(running).__name__ in ("ZMQInteractiveShell", "Shell")
