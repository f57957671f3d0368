"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="tuning",
    commands="plait.tuning.commands",
    panel="From files to a model",
)
