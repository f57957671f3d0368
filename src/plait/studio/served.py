"""The page of `plait serve --ui`: what the models that are served can do, in a browser.

It is a page of HTML, a script and a style. Whatever a visitor asks for goes from the browser to the server's own routes
under /v1, with the visitor's key: the page has no door of its own to the models.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from plait.inference.base import Verb
from plait.modalities.media import MEDIA, written_by
from plait.server.limits import ApiError
from plait.server.middleware import Receive, Scope, Send, answer
from plait.server.service import Served, Service
from plait.studio.render import FOLDER, LANGUAGES, render
from plait.studio.security import POLICY

REPORT = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'"
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
STATIC = {f"/static/{name}": FOLDER / "static" / name
          for name in ("studio.css", "studio.js", "served.js", "theme.js", "icon.svg")}  # fmt: skip


class ServedPage:
    """An ASGI application before the API's own: it answers the page's paths with GET and hands all others on.

    Args:
        app: The API.
        service: The models that are served.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service
        self.reports = {name: file for name, served in service.models.items() if (file := report_of(served))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        report = path.removeprefix("/report/") if path.startswith("/report/") else None
        if scope["type"] != "http" or not (path == "/" or path in STATIC or report is not None):
            await self.app(scope, receive, send)
        elif scope["method"] != "GET":  # HEAD has become GET on its way here
            await answer(ApiError(405, "The page's paths are read with GET."), send)
        elif path == "/":
            await _send(send, self.html(_language(scope)).encode(), "text/html", POLICY)
        elif report is not None:
            await self._send_report(report, send)
        else:
            file = STATIC[path]
            await _send(send, await asyncio.to_thread(file.read_bytes), KINDS[file.suffix])

    def html(self, language: str) -> str:
        """The page, with what the models can do written into it."""
        models = [_card(served) for served in self.service.models.values()]
        opened = self.service.resources.get("search", {})
        indexes = [{"name": name, "model": model} for name, (_, model) in opened.items()]
        return render("served.html", language, models=models, indexes=indexes, reports=list(self.reports))

    async def _send_report(self, name: str, send: Send) -> None:
        file = self.reports.get(name)
        try:
            data = await asyncio.to_thread(file.read_bytes) if file else b"There is no report."
        except OSError:
            data = b"There is no report."
        await _send(send, data, "text/html", REPORT)


def _card(served: Served) -> dict[str, Any]:
    """What the page's script needs to know of a model."""
    plait_model = served.model.plait_model
    columns = plait_model.columns if plait_model else {}
    texts = [name for name, kind in columns.items() if kind == "text"]
    labels = [label for name in texts for label in plait_model.labels.get(name, [])] if plait_model else []
    chat = served.chat
    can_chat = chat is not None and bool(chat.template or chat.model.vocabulary.turns or not chat.model.columns)
    return {
        "name": served.name, "verbs": served.verbs, "elements": {kind: MEDIA[kind].element for kind in MEDIA},
        "kinds": sorted(set(columns.values())), "texts": texts,
        "voices": [name for name, kind in columns.items() if kind in written_by(Verb.SPEAK)], "labelled": bool(labels),
        "examples": list(dict.fromkeys(labels))[:6], "can_chat": can_chat,
        "room": min(256, plait_model.engine.max_length // 2) if plait_model else 256,
    }  # fmt: skip


def report_of(served: Served) -> Path | None:
    """The report of the run that a model is of, None where there is none."""
    folder = served.model.folder
    places = [folder, *folder.parents[:2], folder.resolve().parent.parent] if folder is not None else []
    run = next((place for place in places if (place / "run.json").is_file()), None)
    return run / "report.html" if run is not None and (run / "report.html").is_file() else None


def _language(scope: Scope) -> str:
    headers = dict(scope["headers"])
    language = headers.get(b"accept-language", b"en")[:2].decode("latin-1").lower()
    return language if language in LANGUAGES else "en"


async def _send(send: Send, body: bytes, kind: str, policy: str | None = None) -> None:
    headers = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"content-security-policy", policy.encode())] if policy else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
