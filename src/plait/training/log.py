"""What a run writes down as it goes: `log.jsonl`, and on request the records of every step."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.core.objective import loss_column


class Log:
    """`log.jsonl`, one object a line. With `records`, also `records.jsonl`: the loss and the record ids of each step.
    Begins after `step` and the step that was `validated` last: later rows, which a run wrote after its last checkpoint,
    are taken back; the run will write them again. Without `writes`, for all processes but one, nothing is written."""

    def __init__(self, folder: Path, step: int, validated: int = 0, records: bool = False, writes: bool = True) -> None:
        self.rows = _from(folder / "log.jsonl", step, validated) if writes else None
        self.records = _from(folder / "records.jsonl", step, validated) if records and writes else None

    def write(
        self, step: int, split: str, losses: dict[str, float], rate: float = 0.0, lr: float = 0.0, waited: float = 0.0
    ) -> None:
        """A row; of training steps with tokens a second, the learning rate and the share of time spent waiting."""
        row: dict[str, Any] = {"step": step, "split": split, "time": time.time()}
        row |= {loss_column(name): round(value, 5) for name, value in losses.items()}
        if rate:
            row |= {"tokens_per_second": round(rate), "learning_rate": lr, "waited": round(waited, 4)}
        if self.rows is not None:
            _append(self.rows, row)

    def write_records(self, step: int, loss: float, ids: list[str]) -> None:
        """A line with a step's loss and the ids of its records."""
        if self.records is not None:
            _append(self.records, {"step": step, "loss": loss, "records": ids})

    def sync(self) -> None:
        """Make sure that what was written survives a loss of power."""
        for file in (self.rows, self.records):
            if file is not None:
                os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self.rows, self.records):
            if file is not None:
                file.close()


def _from(path: Path, step: int, validated: int) -> IO[str]:
    """A file of rows, open to append, without those after a step and a last one that a kill cut."""
    kept = []
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                last = validated if row.get("split", "train") != "train" else step
                if line.endswith("\n") and row["step"] <= last:
                    kept.append(line)
        write_atomic(path, "".join(kept))
    try:
        return path.open("a", encoding="utf-8", newline="\n")
    except OSError as error:
        raise PlaitError(f"Cannot write {path}: {error.strerror}. Free space or choose another folder.") from error


def _append(file: IO[str], row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise PlaitError(f"Cannot write {file.name}: {error.strerror}. Free space, then go on with the run.") from error
