"""What the routes of the studio share: its state, requests in, pages out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.responses import HTMLResponse

from plait.core.errors import PlaitError
from plait.studio.listing import Previews
from plait.studio.render import LANGUAGES, render
from plait.studio.use import Models
from plait.studio.workspace import Workspace

FORM = 1 << 20  # bytes of what a form or a script sends


class Studio:
    """What the routes share.

    Args:
        workspace: The folder of all projects.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.previews = Previews()
        # Each thread that decodes has a process of its own: a few serve all tiles.
        self.decoding = ThreadPoolExecutor(2, "previews")
        self.models = Models()

    def close(self) -> None:
        self.decoding.shutdown(cancel_futures=True)
        self.previews.close()
        self.models.close()


def language_of(request: Request) -> str:
    language = request.cookies.get("language") or request.headers.get("accept-language", "en")[:2].lower()
    return language if language in LANGUAGES else "en"


def page(template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
    """A page of a template, in the reader's language."""
    text = render(template, language_of(request), tabs=request.app.state.tabs, **values)
    return HTMLResponse(text, status)


async def read_body(request: Request, limit: int = FORM) -> bytes:
    """A request's body. Raises PlaitError where it is longer than `limit` bytes."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise PlaitError(f"That is more than {limit >> 20} MB.")
    return bytes(data)


async def read_values(request: Request, limit: int = FORM) -> dict[str, Any]:
    """The JSON object or the form that a script or a button sent, of at most `limit` bytes."""
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            values = json.loads(await read_body(request, limit))
        except ValueError as error:
            raise PlaitError("The request is no JSON.") from error
        if not isinstance(values, dict):
            raise PlaitError("The request must be a JSON object.")
        return values
    return dict(parse_qsl((await read_body(request, limit)).decode("utf-8", errors="replace"), keep_blank_values=True))


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
