"""Plait: one model that reads and writes text, images and audio from your own files.

import plait
model = plait.load("runs/digits")
model.generate("Hello, how are you?", max_length=50, num_return_sequences=5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plait.core import isa as _isa  # noqa: F401 (first of all: PLAIT_ISA must be set before torch loads)

if TYPE_CHECKING:
    from plait.core.errors import PlaitError
    from plait.inference.model import Model, load
    from plait.search.index import Index

__all__ = ["Index", "Model", "PlaitError", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and `plait --help` should not.
    if name in ("Model", "load"):
        from plait.inference import model

        return getattr(model, name)
    if name == "Index":
        from plait.search.index import Index

        return Index
    if name == "PlaitError":
        from plait.core.errors import PlaitError

        return PlaitError
    raise AttributeError(f"module 'plait' has no attribute '{name}'")
