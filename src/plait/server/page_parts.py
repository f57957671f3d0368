"""Parts of the studio's Use and Hand over pages that features add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.features import ExtensionPoint


@dataclass(frozen=True)
class LinesPart:
    """A box for lines of text, and a list of lines as the answer.

    Attributes:
        name: The part's own name, for its address.
        applies: (model, run's folder) -> whether the page shows it.
        title: The heading, by language ("en", "zh").
        question: What to write into the box, by language.
        answer: (model, run's folder, dataset's folder, lines) -> lines.
        examples: (model, run's folder, dataset's folder) -> a few lines to try.
    """

    name: str
    applies: Callable[[Any, Path], bool]
    title: Mapping[str, str]
    question: Mapping[str, str]
    answer: Callable[[Any, Path, Path, list[str]], list[str]]
    examples: Callable[[Any, Path, Path], list[str]]


@dataclass(frozen=True)
class SnippetCall:
    """How a verb is asked for, in the lines to copy of the Hand over page.

    Attributes:
        verb: What it does, as models name it.
        python: A call of `model`; where `applies` is given, of `run`, the run's folder.
        path: Where a server is asked for the same.
        body: What is sent to it, as JSON, beside the model's name.
        applies: run's folder -> whether this is how such a run is asked, whatever its network can do besides.
    """

    verb: str
    python: str
    path: str
    body: Mapping[str, Any]
    applies: Callable[[Path], bool] | None = None


SNIPPETS: ExtensionPoint[SnippetCall] = ExtensionPoint("snippet")
PAGE_PARTS: ExtensionPoint[LinesPart] = ExtensionPoint("page_part")
