"""Recommendation on the studio's Use page: titles in, the likeliest next ones out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.server.page_parts import LinesPart, SnippetCall

EXAMPLES = 12  # titles that are offered


def _applies(model: Any, run: Path) -> bool:
    return "recommend" in model.verbs


def _next_titles(model: Any, run: Path, data: Path, lines: list[str]) -> list[str]:
    recommendations = model.recommend(history=lines or None, k=10)
    return [f"{one.title} · {one.probability:.1%}" for one in recommendations]


def _popular_titles(model: Any, run: Path, data: Path) -> list[str]:
    return [model.catalogue.name(item) for item in model.look_up("", EXAMPLES)]


RECOMMEND = LinesPart(
    name="recommend",
    applies=_applies,
    title={"en": "Recommend", "zh": "推荐"},
    question={"en": "What was seen, one a line", "zh": "看过的，每行一个"},
    answer=_next_titles,
    examples=_popular_titles,
)

SNIPPET = SnippetCall(
    "recommend", 'model.recommend(["A title"], k=10)', "/v1/plait/recommend", {"history": ["ID"], "k": 10}
)
