"""Recommendation as a tool of the Model Context Protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from plait.server.mcp import Count, McpTool, Name, Toolbox, for_verb


def _recommend(box: Toolbox) -> Callable[..., dict[str, Any]]:
    def recommend(
        history: Annotated[list[str], Field(min_length=1, max_length=1000, description="Titles or ids, oldest first.")],
        k: Count = 10, model: Name = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The likeliest next items after a history of items."""
        chosen: Any = box.model(model, "recommend")
        recommendations = box.run(lambda: chosen.recommend(list(history), k=k))
        return {
            "items": [{"id": one.id, "title": one.title, "probability": one.probability} for one in recommendations]
        }

    return recommend


RECOMMEND = McpTool("recommend", for_verb("recommend"), _recommend)
