"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="chat",
    commands="plait.chat.commands",
    panel="Use a model",
    adds={
        "page_part": "plait.chat.page_part:REPLY",
        "record_evaluation": "plait.chat.evaluate:evaluate_chats",
    },
)
