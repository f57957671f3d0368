"""The page at `/`: Gradio's layout and queue over the server's own routes.

Whatever a visitor asks for becomes a request to `/v1/...` through the guard, with the visitor's own key: the page has
no door of its own to the models. Media travel as text (`data:` URLs), made by page.js, so that no file is uploaded,
decoded or fetched by the page; of Gradio's routes only those are open that show it and run its queue.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI

from plait.server.limits import ApiError, parse_json
from plait.server.middleware import Message, Receive, Scope, Send, answer
from plait.server.page_html import STYLE, holds_object, report_of
from plait.server.page_layout import blocks
from plait.server.page_tabs import Tabs
from plait.server.service import Service

SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
JOIN = "/gradio_api/queue/join"
OPEN = {"/", "/page.js", "/theme.css", "/favicon.ico", JOIN, "/gradio_api/queue/data"}
FOLDERS = ("/assets/", "/static/", "/report/")
POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src data: blob:; connect-src 'self' data:; font-src 'self'; frame-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REPORT = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'"


class Page:
    """An ASGI application before the API's own: it answers the page's paths and hands all others on."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service
        self.tabs = Tabs(service)
        self.reports = {name: file for name, served in service.models.items() if (file := report_of(served))}
        self.inner: Any = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        gradio.mount_gradio_app(
            self.inner, blocks(self.tabs, list(self.reports)), "/", ssr_mode=False, footer_links=[], run_history=False,
            css=STYLE,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
        mounted: Any = self.inner.routes[-1]
        self._mounted = mounted.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with self._mounted.router.lifespan_context(self._mounted):
                blocks = self._mounted.get_blocks()
                blocks.run_startup_events()
                await blocks.run_extra_startup_events()
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        if scope["method"] != ("POST" if path == JOIN else "GET") and (path in OPEN or path.startswith(FOLDERS)):
            # HEAD has become GET on its way here.
            await answer(ApiError(405, "The page's paths are read with GET; its queue takes POST."), send)
        elif path not in OPEN and not path.startswith(FOLDERS):
            await self.app(scope, receive, send)
        elif path == "/page.js":
            await _whole(send, SCRIPT.encode(), "text/javascript; charset=utf-8")
        elif path.startswith("/report/"):
            await self._send_report(path.removeprefix("/report/"), send)
        elif path == "/":
            await self._send_page(scope, receive, send)
        elif path == JOIN:
            await self._join(scope, receive, send)
        else:
            await self.inner(scope, receive, send)

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Only what the page's own fields hold goes on: texts, numbers, lists of them. Gradio would fetch a file that
        an object in their place names."""
        message = await receive()  # the guard gives the body in one piece
        try:
            body = parse_json(message.get("body", b""), self.service.limits)
            if not isinstance(body, dict) or any(holds_object(value) for value in body.values()):
                raise ApiError(400, "The page's fields hold texts and numbers. Use the routes under /v1.")
        except ApiError as error:
            await answer(error, send)
            return
        given = iter([message])

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self.inner(scope, replay, send)

    async def _send_report(self, name: str, send: Send) -> None:
        file = self.reports.get(name)
        try:
            data = await asyncio.to_thread(file.read_bytes) if file else b"There is no report."
        except OSError:
            data = b"There is no report."
        await _whole(send, data, "text/html; charset=utf-8", REPORT)

    async def _send_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gradio's page with a nonce on its own scripts, so that no other script can run in it."""
        parts: list[bytes] = []
        status = 200

        async def collect(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        await self.inner(
            {**scope, "headers": [h for h in scope["headers"] if h[0] != b"accept-encoding"]}, receive, collect
        )
        nonce = secrets.token_urlsafe(16)
        html = b"".join(parts).decode()
        html = re.sub(r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>|<link rel="manifest"[^>]*>', "", html)
        html = html.replace("<script", f'<script nonce="{nonce}"')
        html = html.replace("</head>", f'<script nonce="{nonce}" defer src="/page.js"></script></head>', 1)
        await _whole(send, html.encode(), "text/html; charset=utf-8", POLICY.format(nonce=nonce), status)


async def _whole(send: Send, body: bytes, kind: str, policy: str | None = None, status: int = 200) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"content-security-policy", policy.encode())] if policy else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
