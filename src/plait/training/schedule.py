"""The learning rate at each step."""

from __future__ import annotations

import math


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rise = max(int(steps * warmup), 1)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def restart_scale(first: int, last: int) -> float:
    """What the peak of a schedule over the steps `first` to `last` is multiplied by: 1 for a run's first part and for
    one that is as long as all before it; less for a shorter one, where a high rate would undo more than it learns."""
    return min(2 * (last - first) / max(last, 1), 1.0)
