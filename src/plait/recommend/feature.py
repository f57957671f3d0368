"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="recommend",
    commands="plait.recommend.commands",
    panel="Use a model",
)
