"""Whether a model's weights fit into memory, told before they are read."""

from __future__ import annotations

from pathlib import Path

from plait.core.errors import PlaitError
from plait.core.system import available_memory

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 8.5 / 8, "int5": 5.5 / 8, "int4": 5.0 / 8}  # a weight
BESIDE = 1.1  # what a model takes above its weights: tensors on their way, caches


def check_memory(parameters: int, precision: str, where: Path, others: bool = True) -> None:
    """Raise PlaitError where so many weights in a precision are more than what is free, with the precision that would
    fit where there are others."""
    free = available_memory()
    needed = {name: parameters * size * BESIDE for name, size in BYTES.items()}
    if needed[precision] <= free:
        return
    if not others:
        raise PlaitError(
            f"{where} has {parameters / 1e9:.2f} billion weights, which take {needed[precision] / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free. Free some memory, or take a smaller model."
        )
    fitting = [name for name in BYTES if needed[name] <= free]
    if fitting:
        remedy = f"With --precision {fitting[0]} it takes {needed[fitting[0]] / 1e9:.1f} GB."
    else:
        remedy = f"Even int4 takes {needed['int4'] / 1e9:.1f} GB: free some memory, or take a smaller model."
    raise PlaitError(
        f"{where} has {parameters / 1e9:.2f} billion weights, which take {needed[precision] / 1e9:.1f} GB in "
        f"{precision}; {free / 1e9:.1f} GB are free. {remedy}"
    )
