"""What the tabs of the page do: each asks the server's own routes, as any client would, with the visitor's key."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio

from plait.server.middleware import AccessMiddleware, Message
from plait.server.page_html import (
    add_button,
    bar_html,
    explained_html,
    history_html,
    item_html,
    part_of,
    plain_html,
    read_history,
    read_messages,
    talk_html,
    wrong,
)
from plait.server.service import Service

REPLY = 256  # tokens of a reply
NOTHING = "<p>Nothing was found.</p>"


class AnswerError(Exception):
    """A route's refusal; the message is for the visitor."""


class Tabs:
    """The handlers of the page's buttons, which return HTML."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.guard: AccessMiddleware | None = None  # set once it stands before the page

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

    async def chat(
        self, name: str, text: str, medium: str, kind: str, column: str, keep: bool, told: str, visitor: gradio.Request
    ) -> AsyncIterator[tuple[str, str, str, str]]:
        """(conversation as HTML, as JSON, what is left of the text and of the medium)."""
        messages = read_messages(told)
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        parts += [part_of(medium)] if medium else []
        if not parts:
            yield talk_html(messages) + wrong("Write something, or give an image or an audio clip."), told, text, medium
            return
        model = self.service.models[name].model if name in self.service.models else None
        ours = model.plait_model if model is not None else None
        room = REPLY if ours is None else min(REPLY, ours.engine.max_length // 2)
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
        if "audio" in reply:  # as the API wants an audio clip that was made in an earlier turn
            kept["content"] = kept["content"] or "(an audio clip)"
        messages = [*messages, asked, kept]
        shown = [*messages[:-1], reply]
        yield talk_html(shown), json.dumps(messages), "", ""

    async def recognise(self, name: str, medium: str, labels: str, column: str, visitor: gradio.Request) -> str:
        if not medium:
            return wrong("Choose, draw or record something first.")
        wanted = [label.strip() for label in labels.split(",") if label.strip()]
        model = self.service.models[name].model if name in self.service.models else None
        known = model is not None and any(model.labels.get(c) for c in ([column] if column else model.labels))
        try:
            if wanted or known or model is None or model.plait_model is None:
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
        images = (f'<img src="data:image/png;base64,{one["b64_json"]}" alt="{escape(text)}">' for one in found)
        return f'<div class="plait-row">{"".join(images)}</div>'

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
            return wrong("Write something, or give an image or an audio clip.")
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
        return f'<div class="plait-row">{"".join(cards)}</div>' if cards else NOTHING

    async def look_up(self, name: str, text: str, visitor: gradio.Request) -> str:
        """Items to begin a history with."""
        try:
            found = json.loads(await self.ask("/v1/plait/items", {"model": name, "text": text}, visitor))["data"]
        except AnswerError as error:
            return wrong(str(error))
        return f'<div class="plait-examples">{"".join(add_button(one) for one in found)}</div>' if found else NOTHING

    async def recommend(
        self, name: str, told: str, where: str, diversity: float, k: float, why: bool, visitor: gradio.Request
    ) -> tuple[str, str]:
        """(the history, what comes next)."""
        history = read_history(told)
        if not history:
            return "", "<p>Choose something above: what comes next is recommended, and a click lets it join.</p>"
        body = {"model": name, "history": [id_ for id_, _ in history], "where": where.strip(), "k": int(k),
                "diversity": float(diversity), "why": bool(why), "preview": True}  # fmt: skip
        return history_html(history), await self._items("/v1/plait/recommend", body, visitor)

    async def similar(self, name: str, told: str, where: str, k: float, visitor: gradio.Request) -> str:
        liked = read_history(told)
        if not liked:
            return ""
        body = {"model": name, "item": liked[0][0], "where": where.strip(), "k": int(k), "preview": True}
        found = await self._items("/v1/plait/similar", body, visitor)
        return f"<p>Like <b>{plain_html(liked[0][1])}</b>:</p>{found}"

    async def _items(self, path: str, body: dict[str, Any], visitor: gradio.Request) -> str:
        try:
            found = json.loads(await self.ask(path, body, visitor))["data"]
        except AnswerError as error:
            return wrong(str(error))
        share = path.endswith("recommend")
        return f'<div class="plait-row">{"".join(item_html(one, share) for one in found)}</div>'

    async def explain(
        self, name: str, medium: str, text: str, answer: str, column: str, method: str, visitor: gradio.Request
    ) -> str:
        parts = ([part_of(medium)] if medium else []) + ([{"type": "text", "text": text}] if text else [])
        if not parts:
            return wrong("Give an image, an audio clip or some words first.")
        body = {"model": name, "input": parts, "answer": answer.strip(), "column": column, "method": method,
                "image": bool(medium)}  # fmt: skip
        try:
            return explained_html(json.loads(await self.ask("/v1/plait/explain", body, visitor)))
        except AnswerError as error:
            return wrong(str(error))


def _seed(text: str) -> int | None:
    if not text.strip():
        return None
    if not re.fullmatch(r"\s*\d{1,18}\s*", text):
        raise AnswerError("A seed is a whole number.")
    return int(text)
