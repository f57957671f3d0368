"""What the figures of conversations and of auto-reply are called in reports."""

from __future__ import annotations

from plait.reports.metric_labels import MetricLabels

LABELS = MetricLabels(
    tasks={"chat": "Conversations", "reply": "Auto-reply: past questions, each without its own pair"},
    meaning={
        "right": ("answered right", "share", "of questions whose reply stands at another question too"),
        "wrong": ("answered wrong", "share", "of the same; the others met silence"),
        "silent": ("silent where nothing answers", "share", "of questions whose reply stands nowhere else"),
    },
    headlines=("right", "wrong", "silent"),
    beside={"reply": ("transcription", "language", "chat")},  # what the network writes, which does not answer
)
