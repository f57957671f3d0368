"""The page at `/`: Gradio's layout and queue over the server's own routes.

Whatever a visitor asks for becomes a request to `/v1/...` through the guard, with the visitor's own key: the page has
no door of its own to the models. Media travel as text (`data:` URLs), made by page.js, so that no file is uploaded,
decoded or fetched by the page; of Gradio's routes only those are open that show it and run its queue.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
from collections.abc import AsyncIterator
from html import escape
from pathlib import Path
from typing import Any

from plait.applications.model import Model
from plait.serving.guard import Guard, Message, Receive, Scope, Send, answer
from plait.serving.limits import ApiError, parse_json
from plait.serving.page_html import (
    STYLE,
    bar_html,
    example_button,
    examples_of,
    holds_object,
    part_of,
    plain_html,
    read_messages,
    report_of,
    talk_html,
    word_button,
    wrong,
)
from plait.serving.service import Service

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio
from fastapi import FastAPI

SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
OPEN = {"/", "/page.js", "/theme.css", "/favicon.ico", "/gradio_api/queue/join", "/gradio_api/queue/data"}
FOLDERS = ("/assets/", "/static/", "/report/")
REPLY = 256  # tokens of a reply
PICTURES = 4  # drawn at once: what a request may ask for
POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src data: blob:; connect-src 'self' data:; font-src 'self'; frame-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REPORT = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'"
KINDS = [("pictures", "image"), ("sounds", "audio"), ("texts", "text")]
HOW_TO_FIND = (
    "<p>To find things, make an index and serve it:</p><pre>plait index add my.index FILES --model RUN\n"
    "plait serve RUN --ui --index my.index</pre>"
)


class AnswerError(Exception):
    """A route's refusal; the message is for the visitor."""


class Page:
    """An ASGI application before the API's own: it answers the page's paths and hands all others on."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service
        self.guard: Guard | None = None  # set once it stands before this
        self.reports = {name: file for name, served in service.models.items() if (file := report_of(served))}
        self.inner: Any = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        gradio.mount_gradio_app(
            self.inner, _blocks(self), "/", ssr_mode=False, footer_links=[], run_history=False, css=STYLE,
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
        if path not in OPEN and not path.startswith(FOLDERS):
            await self.app(scope, receive, send)
        elif path == "/page.js":
            await _whole(send, SCRIPT.encode(), "text/javascript; charset=utf-8")
        elif path.startswith("/report/"):
            await self._send_report(path.removeprefix("/report/"), send)
        elif path == "/":
            await self._send_page(scope, receive, send)
        elif path == "/gradio_api/queue/join":
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

    # --- the routes, as a client of this server ---------------------------------------------------------------------

    async def post(self, path: str, body: dict[str, Any], visitor: gradio.Request) -> AsyncIterator[bytes]:
        """The answer of a route, piece by piece. Raises AnswerError where it is not 2xx. Left early, the request
        ends as one of any client that leaves."""
        assert self.guard is not None
        data = json.dumps({name: value for name, value in body.items() if value not in (None, "")}).encode()
        # The visitor's own host and key: whoever may not call the route may not call it from here.
        given = {name.lower(): value for name, value in dict(visitor.headers).items()}
        headers = [
            (name.encode(), given[name].encode("latin-1")) for name in ("host", "authorization") if name in given
        ]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": None, "server": None,
        }  # fmt: skip
        messages: asyncio.Queue[Message] = asyncio.Queue()
        left, given_body = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given_body
            if not given_body:
                given_body = True
                return {"type": "http.request", "body": data, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.guard(scope, receive, messages.put))
        try:
            status = (await messages.get())["status"]
            whole = b""
            more = True
            while more:
                message = await messages.get()
                more = message.get("more_body", False)
                if status < 300:
                    yield message.get("body", b"")
                else:
                    whole += message.get("body", b"")
            if status >= 300:
                raise AnswerError(json.loads(whole)["error"]["message"])
        finally:
            left.set()
            await task

    async def ask(self, path: str, body: dict[str, Any], visitor: gradio.Request) -> bytes:
        """The whole answer of a route. Raises AnswerError."""
        return b"".join([piece async for piece in self.post(path, body, visitor)])

    # --- what the tabs do -------------------------------------------------------------------------------------------

    async def chat(
        self, name: str, text: str, medium: str, kind: str, column: str, keep: bool, told: str, visitor: gradio.Request
    ) -> AsyncIterator[tuple[str, str, str, str]]:
        """(conversation as HTML, as JSON, what is left of the text and of the medium)."""
        messages = read_messages(told)
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        parts += [part_of(medium)] if medium else []
        if not parts:
            yield talk_html(messages) + wrong("Write something, or give a picture or a sound."), told, text, medium
            return
        model = self.service.models[name].model if name in self.service.models else None
        room = min(REPLY, model.engine.max_length // 2) if isinstance(model, Model) else REPLY
        if not kind:
            verbs = self.service.models[name].verbs if name in self.service.models else []
            kind = "text" if medium else "image" if "draw" in verbs else "audio" if "speak" in verbs else "text"
        asked = {"role": "user", "content": parts}
        body = {"model": name, "messages": [*(messages if keep else []), asked], "stream": True, "column": column,
                "modalities": [kind], "max_completion_tokens": room}  # fmt: skip
        reply: dict[str, Any] = {"role": "assistant", "content": ""}
        rest = b""
        try:
            async for piece in self.post("/v1/chat/completions", body, visitor):
                *lines, rest = (rest + piece).split(b"\n\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise AnswerError(event["error"]["message"])
                    for choice in event["choices"]:
                        delta = choice["delta"]
                        reply["content"] += delta.get("content") or ""
                        reply |= {key: delta[key] for key in ("images", "audio") if delta.get(key)}
                yield talk_html([*messages, asked, reply]), told, "", ""
        except AnswerError as error:
            yield talk_html([*messages, asked]) + wrong(str(error)), told, "", ""
            return
        kept = {key: value for key, value in reply.items() if key != "audio"}
        if "audio" in reply:  # as the API wants a sound that was made in an earlier turn
            kept["content"] = kept["content"] or "(a sound)"
        messages = [*messages, asked, kept]
        shown = [*messages[:-1], reply]
        yield talk_html(shown), json.dumps(messages), "", ""

    async def recognise(self, name: str, medium: str, labels: str, column: str, visitor: gradio.Request) -> str:
        if not medium:
            return wrong("Choose, draw or record something first.")
        wanted = [label.strip() for label in labels.split(",") if label.strip()]
        model = self.service.models[name].model if name in self.service.models else None
        known = isinstance(model, Model) and any(model.labels.get(c) for c in ([column] if column else model.labels))
        try:
            if wanted or known or not isinstance(model, Model):
                body = {"model": name, "input": [part_of(medium)], "labels": wanted or None, "column": column, "top": 5}
                found = json.loads(await self.ask("/v1/plait/classify", body, visitor))["data"]
                return "".join(bar_html(one["label"], one["probability"]) for one in found)
            body = {"model": name, "messages": [{"role": "user", "content": [part_of(medium)]}], "column": column}
            answer = json.loads(await self.ask("/v1/chat/completions", body, visitor))
            return f"<p>{plain_html(answer['choices'][0]['message']['content'])}</p>"
        except AnswerError as error:
            return wrong(str(error))

    async def draw(self, name: str, text: str, n: float, guidance: float, seed: str, visitor: gradio.Request) -> str:
        try:
            body = {"model": name, "prompt": text, "n": int(n), "guidance": float(guidance), "seed": _seed(seed)}
            found = json.loads(await self.ask("/v1/images/generations", body, visitor))["data"]
        except AnswerError as error:
            return wrong(str(error))
        pictures = (f'<img src="data:image/png;base64,{one["b64_json"]}" alt="{escape(text)}">' for one in found)
        return f'<div class="plait-row">{"".join(pictures)}</div>'

    async def speak(self, name: str, text: str, voice: str, seed: str, visitor: gradio.Request) -> str:
        try:
            body = {
                "model": name,
                "input": text,
                "voice": voice or "default",
                "response_format": "wav",
                "seed": _seed(seed),
            }
            data = await self.ask("/v1/audio/speech", body, visitor)
        except AnswerError as error:
            return wrong(str(error))
        return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(data).decode()}"></audio>'

    async def find(
        self, name: str, text: str, medium: str, kinds: list[str], k: float, index: str, visitor: gradio.Request
    ) -> str:
        if not text and not medium:
            return wrong("Write something, or give a picture or a sound.")
        try:
            body = {"model": name, "input": part_of(medium) if medium else text, "k": int(k), "index": index or None,
                    "where": {"kind": kinds} if kinds else None}  # fmt: skip
            found = json.loads(await self.ask("/v1/plait/search", body, visitor))["data"]
        except AnswerError as error:
            return wrong(str(error))
        cards = []
        for one in found:
            body_ = ""
            if one["preview"]:
                body_ = f'<img src="{one["preview"]}" alt="">'
                if one["kind"] == "audio":
                    body_ = f'<audio controls src="{one["preview"]}"></audio>'
            near = "" if one["similarity"] is None else f"{one['similarity']:.3f}"
            words = plain_html((one["text"] or "")[:200])
            cards.append(
                f"<figure>{body_}<figcaption>{words}<br>{near} · {escape(one['source'])}</figcaption></figure>"
            )
        return f'<div class="plait-row">{"".join(cards)}</div>' if cards else "<p>Nothing was found.</p>"


# --- the layout -------------------------------------------------------------------------------------------------


def _blocks(page: Page) -> Any:
    """The tabs that the models that are served have a use for."""
    served = list(page.service.models.values())
    verbs = {verb for one in served for verb in one.verbs}
    ours = [one.model for one in served if isinstance(one.model, Model)]
    columns = {name: kind for model in ours for name, kind in model.columns.items()}
    texts = [name for name, kind in columns.items() if kind == "text"]
    voices = [name for name, kind in columns.items() if kind == "audio"]
    kinds = {kind for kind in columns.values() if kind != "text"}
    made = {verb: kind for verb, kind in (("draw", "image"), ("speak", "audio")) if verb in verbs}
    words = [text for model in ours for column in texts for text in model.labels.get(column, [])[2:6]]
    media, ink = examples_of(served)
    chats = [one.chat for one in served if one.chat is not None]
    remembers = any(chat.template or chat.model.vocabulary.turns or not chat.model.columns for chat in chats)

    def medium(where: str, draws: bool = True) -> Any:
        """A place to drop, draw or record a medium, the hidden text that holds it, and examples."""
        wanted = [kind for kind in ("image", "audio") if kind in kinds] or ["image", "audio"]
        tools = [*wanted, *(["draw"] if draws and "image" in wanted else [])]
        few = "".join(example_button(where, kind, *one) for kind in wanted for one in enumerate(media.get(kind, []), 1))
        text = gradio.Textbox(elem_id=where, elem_classes="plait-hidden", label="medium")
        _html(f'<div class="plait-media" data-to="{where}" data-tools="{" ".join(tools)}" data-ink="{ink}"></div>')
        if few:
            _html(f'<div class="plait-examples">{few}</div>')
        return text

    def examples(box: Any) -> None:
        few = "".join(word_button(box.elem_id, text) for text in dict.fromkeys(words))
        if few:
            _html(f'<div class="plait-examples">{few}</div>')

    def choice(label: str, values: list[str], first: str, shown: bool = True) -> Any:
        return gradio.Dropdown(
            [(first, ""), *((v, v) for v in values)], value="", label=label, visible=shown and bool(values)
        )

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    with gradio.Blocks(title="Plait", analytics_enabled=False) as blocks:
        names = [one.name for one in served]
        _html(f"<h1 style='margin:.2rem 0'>{escape(' · '.join(names))}</h1>")
        name = gradio.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        with gradio.Tabs():
            with gradio.Tab("Chat"):
                talk, told = _html("", "chat-talk"), gradio.Textbox(elem_classes="plait-hidden", label="told")
                text = gradio.Textbox(
                    label="Say", placeholder="Write, or add a picture or a sound", elem_id="chat-text"
                )
                with gradio.Accordion("A picture or a sound", open=False, visible=bool(kinds)):
                    seen = medium("chat-medium")
                with gradio.Row():
                    # A model of records answers media with words, and words with media.
                    forms = [("auto", ""), ("text", "text")]
                    forms += [(f"a {'picture' if kind == 'image' else 'sound'}", kind) for kind in made.values()]
                    first = "" if made and not remembers else "text"
                    kind = gradio.Radio(forms, value=first, label="Reply in", visible=len(forms) > 2)
                    column = choice("Reply column", texts, "the first", len(texts) > 1)
                    keep = gradio.Checkbox(remembers, label="Remember what was said", visible=True)
                with gradio.Row():
                    go = gradio.Button("Send", variant="primary", elem_id="chat-go")
                    new = gradio.Button("New conversation", elem_id="chat-new")
                examples(text)
                inputs, outputs = [name, text, seen, kind, column, keep, told], [talk, told, text, seen]
                gradio.on([go.click, text.submit], page.chat, inputs, outputs, **private)
                new.click(lambda: ("", "", "", ""), None, outputs, **private)
            if {"classify", "describe", "transcribe"} & verbs:
                with gradio.Tab("Recognise"):
                    seen = medium("recognise-medium")
                    with gradio.Row():
                        labels = gradio.Textbox(
                            label="Labels", placeholder="the model's own, or: cat, dog", elem_id="recognise-labels"
                        )
                        column = choice("Answer column", texts, "the first", len(texts) > 1)
                    go, out = (
                        gradio.Button("Recognise", variant="primary", elem_id="recognise-go"),
                        _html("", "recognise-out"),
                    )
                    go.click(page.recognise, [name, seen, labels, column], out, **private)
            if "draw" in verbs:
                with gradio.Tab("Draw"):
                    text = gradio.Textbox(label="What to draw", elem_id="draw-text")
                    examples(text)
                    with gradio.Row():
                        n = gradio.Slider(1, PICTURES, value=PICTURES, step=1, label="Pictures")
                        guidance = gradio.Slider(1, 5, value=2, step=0.5, label="Guidance")
                        seed = gradio.Textbox(label="Seed", placeholder="any")
                    go, out = gradio.Button("Draw", variant="primary", elem_id="draw-go"), _html("", "draw-out")
                    gradio.on([go.click, text.submit], page.draw, [name, text, n, guidance, seed], out, **private)
            if "speak" in verbs:
                with gradio.Tab("Speak"):
                    text = gradio.Textbox(label="What to say", elem_id="speak-text")
                    examples(text)
                    with gradio.Row():
                        voice = choice("Voice", voices, "the first", len(voices) > 1)
                        seed = gradio.Textbox(label="Seed", placeholder="any")
                    go, out = gradio.Button("Speak", variant="primary", elem_id="speak-go"), _html("", "speak-out")
                    gradio.on([go.click, text.submit], page.speak, [name, text, voice, seed], out, **private)
            with gradio.Tab("Find"):
                if page.service.indexes:
                    text = gradio.Textbox(label="Words, or a picture or sound below", elem_id="find-text")
                    examples(text)
                    seen = medium("find-medium")
                    with gradio.Row():
                        wanted = gradio.CheckboxGroup(KINDS, label="Only", elem_id="find-kinds")
                        k = gradio.Slider(1, 50, value=12, step=1, label="Results")
                        index = choice("Index", list(page.service.indexes), "the first", len(page.service.indexes) > 1)
                    go, out = gradio.Button("Find", variant="primary", elem_id="find-go"), _html("", "find-out")
                    gradio.on([go.click, text.submit], page.find, [name, text, seen, wanted, k, index], out, **private)
                else:
                    _html(HOW_TO_FIND)
            if page.reports:
                with gradio.Tab("Report"):
                    for one in page.reports:
                        title = f"<h3>{escape(one)}</h3>" if len(page.reports) > 1 else ""
                        _html(f'{title}<iframe class="plait-report" sandbox="" src="/report/{escape(one, quote=True)}" '
                              f'title="report of {escape(one, quote=True)}"></iframe>')  # fmt: skip
    limits = page.service.limits
    return blocks.queue(default_concurrency_limit=limits.queue, max_size=limits.queue)


def _html(html: str, where: str | None = None) -> Any:
    """HTML of our own making. Gradio's component of that name compiles templates, which the page's policy forbids."""
    return gradio.Markdown(html, elem_id=where, sanitize_html=False, latex_delimiters=[])


def _seed(text: str) -> int | None:
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*\d{1,18}\s*", text):
        raise AnswerError("A seed is a whole number.")
    return int(text)


async def _whole(send: Send, body: bytes, kind: str, policy: str | None = None, status: int = 200) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"content-security-policy", policy.encode())] if policy else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
