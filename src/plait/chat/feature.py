"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="chat",
    commands="plait.chat.commands",
    panel="Use a model",
    adds={
        "answerer": "plait.chat.routes:answerer_of",
        "page_part": "plait.chat.page_part:REPLY",
        "metric_labels": "plait.chat.metric_labels:LABELS",
        "record_evaluation": "plait.chat.evaluate:evaluate_texts",
        "snippet": "plait.chat.page_part:SNIPPET",
        "routes": "plait.chat.routes:router",
        "trained": "plait.chat.evaluate_replies:describe_replies",
    },
)
