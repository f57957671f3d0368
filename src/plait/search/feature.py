"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="search",
    commands="plait.search.commands",
    panel="Use a model",
    adds={
        "mcp_tool": "plait.search.mcp_tool:SEARCH",
        "routes": "plait.search.routes:router",
        "served_resources": "plait.search.routes:open_indexes",
    },
)
