"""Parts of the studio's Use page that features add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plait.core.features import ExtensionPoint


@dataclass(frozen=True)
class LinesPart:
    """A box for lines of text, and a list of lines as the answer.

    Attributes:
        verb: The verb that a model must have.
        title: The heading, by language ("en", "zh").
        question: What to write into the box, by language.
        answer: (model, lines) -> lines.
    """

    verb: str
    title: Mapping[str, str]
    question: Mapping[str, str]
    answer: Callable[[Any, list[str]], list[str]]


PAGE_PARTS: ExtensionPoint[LinesPart] = ExtensionPoint("page_part")
