"""The gap between training and validation, and where it opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

OPEN = 0.05  # share of the validation loss beyond which a gap counts as open


@dataclass(frozen=True)
class Gap:
    """What lies between training and validation for one objective."""

    steps: list[int]
    gaps: list[float]  # validation less the mean of training since the validation before, nats
    opened: int | None  # the step from which it stayed above `OPEN` of the validation loss; None where it did not
    lowest: int  # the step of the lowest validation loss


def gap(log: list[dict[str, Any]], name: str) -> Gap | None:
    """The gap of an objective ("loss/text") over a run's log; None where one of the two sides was not logged."""
    rows = [row for row in log if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    train = [(int(row["step"]), float(row[name])) for row in rows if row.get("split") == "train"]
    val = [(int(row["step"]), float(row[name])) for row in rows if row.get("split") == "val"]
    steps, gaps, before = [], [], 0
    kept: list[float] = []
    for step, loss in val:
        seen = [value for at, value in train if before < at <= step]
        if seen:
            steps.append(step)
            gaps.append(loss - float(np.mean(seen)))
            kept.append(loss)
            before = step
    if not steps:
        return None
    wide = [g > OPEN * abs(loss) for g, loss in zip(gaps, kept, strict=True)]
    last_closed = max((i for i, w in enumerate(wide) if not w), default=-1)
    opened = steps[last_closed + 1] if last_closed + 1 < len(steps) else None
    return Gap(steps, gaps, opened, min(val, key=lambda point: point[1])[0])
