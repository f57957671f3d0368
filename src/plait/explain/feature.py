"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="explain",
    commands="plait.explain.commands",
    panel="Understand a model",
    adds={
        "explainer": "plait.explain.answers:explain_answer",
        "routes": "plait.explain.routes:router",
    },
)
