"""Recommendation on the studio's Use page: titles in, the likeliest next ones out."""

from __future__ import annotations

from typing import Any

from plait.server.page_parts import LinesPart


def _next_titles(model: Any, lines: list[str]) -> list[str]:
    found = model.recommend(history=lines or None, k=10)
    return [f"{one.title} · {one.probability:.1%}" for one in found]


RECOMMEND = LinesPart(
    verb="recommend",
    title={"en": "Recommend", "zh": "推荐"},
    question={"en": "What was seen, one a line", "zh": "看过的，每行一个"},
    answer=_next_titles,
)
