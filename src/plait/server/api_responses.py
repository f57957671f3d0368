"""`/v1/responses`, without state: text and images in, text out, held to a schema where one is asked for.

Tools, files, background work and what is stored are not here: `previous_response_id` is refused, the others are
fields without an effect.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from plait.inference.engine import Request as Wanted
from plait.inference.prompts import Prompt
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import STREAM, Lead, constraint_of, make_router, most_of, of, text_column, wanted_of
from plait.server.api_text import chat_turns
from plait.server.limits import ApiError
from plait.server.service import EventStream, Served, note, read
from plait.server.worker import PendingRequest, follow

router = make_router()


class TextFormat(s.Inner):
    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(default_factory=dict)


class TextSettings(s.Inner):
    format: TextFormat | None = None


class ResponsesRequest(s.Drawing):
    input: s.Text | Annotated[list[s.Message], Field(min_length=1, max_length=256)]
    instructions: s.Text | None = None
    max_output_tokens: s.Tokens = None
    text: TextSettings | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    tool_choice: Any = None


class ResponsesAnswer(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


@router.post("/v1/responses", response_model=ResponsesAnswer, responses={200: {"content": STREAM}}, tags=["text"])
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """The next reply of a conversation, in the shape of OpenAI's Responses API. Nothing is stored."""
    service, request_context = of(request)
    served = service.open(body, request_context)
    model, chat = served.ours, served.chat
    if body.previous_response_id:
        raise ApiError(400, "Nothing is stored here. Send the whole conversation as input.", "previous_response_id")
    if body.tool_choice not in (None, "auto", "none"):
        raise ApiError(400, "No model here calls tools yet. Leave tool_choice out.", "tool_choice")
    if chat is None:
        raise ApiError(400, f"{served.name} has no chat.", "model")
    messages = [s.Message(role="system", content=body.instructions)] if body.instructions else []
    messages += [s.Message(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = await chat_turns(service, served, messages, service.deadline(request_context))
    constraint = await constraint_of(service, served, _as_writing(body))

    def prepare() -> tuple[Prompt, Wanted]:
        column = text_column(model, None)
        prompt = chat.prompt(turns, column)
        found = wanted_of(model, prompt.context, column, body, 1, most=most_of(model, body.max_output_tokens),
                          stop=prompt.stop)  # fmt: skip
        return prompt, replace(found, constraint=constraint)

    size = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
    prompt, wanted = await service.prepared(prepare, size)
    answer = _Answer(served, body)
    if body.stream:
        pending = served.worker.submit([wanted], service.deadline(request_context))
        return EventStream(answer.events(prompt, pending, request_context), pending, done=False)
    sample = (await service.written(served, [wanted], request_context))[0][0]
    return JSONResponse(answer.whole(Lead(prompt.strip)(sample.text or ""), sample.finish, request_context))


def _as_writing(body: ResponsesRequest) -> s.Writing:
    """The request's format in the shape of chat completions."""
    form = body.text.format if body.text else None
    if form is None:
        return s.Writing()
    schema = {"schema": form.schema_} if form.type == "json_schema" else None
    return s.Writing.model_validate({"response_format": {"type": form.type, "json_schema": schema}})


class _Answer:
    """One response on its way."""

    def __init__(self, served: Served, body: ResponsesRequest) -> None:
        self.served, self.body = served, body
        self.id, self.item = "resp_" + secrets.token_hex(16), "msg_" + secrets.token_hex(16)
        self.created = int(time.time())
        self.number = -1

    def _shell(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.served.name,
            "output": output, "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "temperature": body.temperature, "top_p": body.top_p, "tool_choice": "none", "tools": [], "metadata": {},
            "text": {"format": {"type": "text"}}, "truncation": "disabled", "usage": usage,
        }  # fmt: skip

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def whole(self, text: str, finish: str, request_context: RequestContext) -> dict[str, Any]:
        """The response when it is complete."""
        read_, written = request_context.prompt_tokens, request_context.completion_tokens
        usage = {"input_tokens": read_, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                 "output_tokens": written, "output_tokens_details": {"reasoning_tokens": 0},
                 "total_tokens": read_ + written}  # fmt: skip
        status = "incomplete" if finish == "length" else "completed"
        return self._shell(status, [self._message(text, status)], usage)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": f"response.{name}", "sequence_number": self.number, **fields}

    async def events(
        self, prompt: Prompt, pending: list[PendingRequest], request_context: RequestContext
    ) -> AsyncIterator[list[Any]]:
        place: dict[str, Any] = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield [
            self._event("created", response=self._shell("in_progress", [], None)),
            self._event("in_progress", response=self._shell("in_progress", [], None)),
            self._event("output_item.added", output_index=0, item=self._message(None, "in_progress")),
            self._event("content_part.added", part=self._part(""), **place),
        ]
        lead, text, finish = Lead(prompt.strip), "", "stop"
        async for updates in follow(pending):
            note(request_context, updates)
            pieces = [lead(update.text) for _, update in updates]
            finish = next((update.finish for _, update in updates if update.finish), finish)
            text += "".join(pieces)
            if found := [self._event("output_text.delta", delta=one, logprobs=[], **place) for one in pieces if one]:
                yield found
        read(request_context, pending)
        response = self.whole(text, finish, request_context)
        yield [
            self._event("output_text.done", text=text, logprobs=[], **place),
            self._event("content_part.done", part=self._part(text), **place),
            self._event("output_item.done", output_index=0, item=response["output"][0]),
            self._event(response["status"], response=response),
        ]
