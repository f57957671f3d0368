"""The page that `plait prepare` leaves: what the dataset holds, with examples to look at and listen to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from plait.core.pages import render
from plait.core.rejects import RejectKind
from plait.data.conversations import turns
from plait.data.dataset import Manifest
from plait.modalities.descriptor import MediaError
from plait.modalities.media import MEDIA, media_type


@dataclass
class Example:
    """A record to show."""

    id: str
    split: str
    parts: dict[str, str | bytes]


@dataclass
class ShownPart:
    """A part of a record as the page shows it: a text, or a medium's bytes."""

    kind: str
    text: str = ""
    data: bytes = b""

    @property
    def element(self) -> str:
        """The HTML element that shows a medium; empty for a text."""
        return MEDIA[self.kind].element if self.kind in MEDIA else ""

    @property
    def media_type(self) -> str:
        """What the bytes are."""
        return media_type(self.data)


def _shown(kind: str, value: str | bytes, chat: bool) -> ShownPart:
    """The text's or conversation's beginning, a thumbnail, or a clip of at most five seconds."""
    if isinstance(value, str):
        text = _conversation(value) if chat else value
        return ShownPart("text", text[:400] + ("…" if len(text) > 400 else ""))
    try:
        return ShownPart(kind, data=MEDIA[kind].page_preview(value))
    except MediaError as error:
        return ShownPart("text", str(error))


def _conversation(value: str) -> str:
    """A conversation, a line a turn."""
    lines = ((turn.role, text if kind == "text" else f"({text})") for turn in turns(value) for kind, text in turn.parts)
    return "\n".join(f"{role}: {text}" for role, text in lines)


def report(manifest: Manifest, examples: list[Example], rejects: Counter[RejectKind], title: str) -> str:
    """The page as HTML: counts, columns, lengths, examples, what was rejected and why. Loads nothing from elsewhere."""
    return render(
        "data/dataset.html",
        title=f"Dataset: {title}",
        summary=manifest.source,
        manifest=manifest,
        counts=[(split, f"{count:,}") for split, count in manifest.counts.items()],
        examples=[_example(example, manifest) for example in examples],
        columns=[_column(column, kind, manifest) for column, kind in manifest.columns.items()],
        duplicates=_duplicates(manifest),
        reasons=[(kind.label, f"{count:,}") for kind, count in rejects.most_common(30)],
    )


def _example(example: Example, manifest: Manifest) -> dict[str, Any]:
    """A record's id, split, and its parts by column, None where it has none."""
    parts = [
        _shown(kind, example.parts[column], column in manifest.chats) if column in example.parts else None
        for column, kind in manifest.columns.items()
    ]
    return {"id": example.id, "split": example.split, "parts": parts}


def _column(column: str, kind: str, manifest: Manifest) -> tuple[str, ...]:
    """A row of the table of columns."""
    lengths = manifest.statistics[column]
    values = lengths.sizes or {}
    if lengths.classes:
        values = dict(sorted(lengths.classes.items(), key=lambda entry: (-entry[1], entry[0]))[:30])
    span = f"{lengths.min:g} / {lengths.mean:g} / {lengths.max:g} {lengths.unit}"
    distinct = f"{lengths.distinct:,}" if lengths.distinct is not None else ""
    frequent = ", ".join(f"{value} ({count:,})" for value, count in values.items())
    return column, kind, f"{lengths.records:,}", span, distinct, frequent


def _duplicates(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Records that two splits share, equal or nearly so."""
    rows = [(pair, "equal", f"{count:,}") for pair, count in manifest.overlap.items()]
    rows += [(pair, "near", f"{count:,}") for pair, count in manifest.near_duplicates.items()]
    if manifest.dropped:
        rows.append(("train", "left out for near-duplicates in val or test", f"{manifest.dropped:,}"))
    return rows
