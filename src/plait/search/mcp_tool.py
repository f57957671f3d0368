"""Search as a tool of the Model Context Protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from plait.core.errors import PlaitError
from plait.modalities.media import MEDIA
from plait.server.mcp import Count, Data, File, McpTool, Text, Toolbox, audio_content, image_content


def _search(box: Toolbox) -> Callable[..., list[Any]]:
    def search(
        text: Text = None, file: File = None, data: Data = None, k: Count = 5,
        index: Annotated[str | None, Field(description="Which index, where there are several.")] = None,
    ) -> list[Any]:  # fmt: skip
        """What of an index is nearest to a text, image or audio clip, best first: a line each, and its preview."""
        name = index or next(iter(box.indexes))
        if name not in box.indexes:
            raise PlaitError(f"There is no index '{name[:80]}'. Use {', '.join(box.indexes)}.")
        value = box.value(text, file, data)
        content: list[Any] = []
        for hit in box.run(lambda: box.indexes[name].search(value, k)):
            columns = ", ".join(f"{column}: {shown}" for column, shown in hit.columns.items())
            similarity = "" if hit.similarity != hit.similarity else f" similarity {hit.similarity:.3f}"  # nan: words
            content.append(f"{hit.id} ({hit.kind}){similarity} {hit.text or columns}".strip())
            if hit.preview is not None:
                shown = image_content if MEDIA[hit.kind].element == "img" else audio_content
                content.append(shown(hit.preview))
        return content or ["Nothing was found."]

    return search


SEARCH = McpTool("search", lambda box: bool(box.indexes), _search, structured=False)
