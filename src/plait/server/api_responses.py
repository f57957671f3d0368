"""`/v1/responses`, without state: text and images in, text or calls of tools out; texts can be held to a schema.

Files, background work and what is stored are not here: `previous_response_id` is refused, the others are fields without
an effect.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field
from starlette.responses import Response

from plait.inference.tools import CallPiece, TextPiece, ToolCall
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import STREAM, make_router, service_of
from plait.server.api_text import StreamedReply, chat_turns, text_reply
from plait.server.limits import ApiError
from plait.server.service import EventStream, Lead, Served
from plait.server.tools import ReplyReader, tool_use
from plait.server.worker import PendingRequest

router = make_router()


class TextFormat(s.Inner):
    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(default_factory=dict)


class TextSettings(s.Inner):
    format: TextFormat | None = None


def _as_messages(value: Any) -> Any:
    """Input items as messages: calls and their results are items of their own here. What has no role is left out, as
    reasoning is."""
    if not isinstance(value, list):
        return value
    messages: list[Any] = []
    for item in value:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "function_call":
            call = {"id": item.get("call_id") or "", "function": {k: item.get(k) for k in ("name", "arguments")}}
            if messages and isinstance(messages[-1], dict) and "tool_calls" in messages[-1]:
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind in (None, "message"):
            messages.append(item)
    return messages


Messages = Annotated[Annotated[list[s.Message], Field(min_length=1, max_length=256)], BeforeValidator(_as_messages)]


class ResponsesRequest(s.SamplingBody):
    input: s.Text | Messages
    instructions: s.Text | None = None
    max_output_tokens: s.Tokens = None
    text: TextSettings | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    tools: s.Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


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
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    if body.previous_response_id:
        raise ApiError(400, "Nothing is stored here. Send the whole conversation as input.", "previous_response_id")
    use = tool_use(service, served, request_context, body.tools, body.tool_choice, body.parallel_tool_calls)
    messages = [s.Message(role="system", content=body.instructions)] if body.instructions else []
    messages += [s.Message(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = await chat_turns(service, served, messages, service.deadline(request_context))
    prompt, engine_request = await text_reply(
        service, served, request_context, turns, body, _as_writing(body), use, body.max_output_tokens
    )
    answer = _ResponseReply(served, body, ReplyReader(use, Lead(prompt.strip)))
    if body.stream:
        pending = served.worker.submit([engine_request], service.deadline(request_context))
        return EventStream(answer.events(pending, request_context), pending, done=False)
    sample = (await service.written(served, [engine_request], request_context))[0][0]
    answer.reader.add(sample.text or "", last=True)
    return JSONResponse(answer.response(sample.finish, request_context))


def _as_writing(body: ResponsesRequest) -> s.Writing:
    """The request's format in the shape of chat completions."""
    form = body.text.format if body.text else None
    if form is None:
        return s.Writing()
    schema = {"schema": form.schema_} if form.type == "json_schema" else None
    return s.Writing.model_validate({"response_format": {"type": form.type, "json_schema": schema}})


class _ResponseReply(StreamedReply):
    """One of OpenAI's responses on its way."""

    def __init__(self, served: Served, body: ResponsesRequest, reader: ReplyReader) -> None:
        self.served, self.body, self.reader = served, body, reader
        self.id, self.item = "resp_" + secrets.token_hex(16), "msg_" + secrets.token_hex(16)
        self.created = int(time.time())
        self.number = -1
        self.places: dict[str, int] = {}  # of items that have begun, by their ids: where each stands in the output

    def _shell(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self.body
        tools = [{"type": "function", **tool.function.model_dump()} for tool in body.tools or [] if tool.function]
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.served.name,
            "output": output, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": body.temperature, "top_p": body.top_p,
            "tool_choice": body.tool_choice or "auto", "tools": tools, "metadata": {},
            "text": {"format": {"type": "text"}}, "truncation": "disabled", "usage": usage,
        }  # fmt: skip

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _call(self, call: ToolCall, arguments: str, status: str) -> dict[str, Any]:
        return {"id": call.id.replace("call_", "fc_"), "type": "function_call", "call_id": call.id, "name": call.name,
                "arguments": arguments, "status": status}  # fmt: skip

    def response(self, finish: str, request_context: RequestContext) -> dict[str, Any]:
        """The response when it is complete."""
        input_tokens, output_tokens = request_context.prompt_tokens, request_context.completion_tokens
        usage = {"input_tokens": input_tokens, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                 "output_tokens": output_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                 "total_tokens": input_tokens + output_tokens}  # fmt: skip
        status, reader = "incomplete" if finish == "length" else "completed", self.reader
        output = [self._message(reader.text, status)] if reader.text or not reader.calls else []
        output += [self._call(call, call.arguments, status) for call in reader.calls]
        return self._shell(status, output, usage)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": f"response.{name}", "sequence_number": self.number, **fields}

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """That an item is there, once."""
        if item["id"] in self.places:
            return []
        place = self.places[item["id"]] = len(self.places)
        events = [self._event("output_item.added", output_index=place, item=item)]
        if item["type"] == "message":
            events.append(self._event("content_part.added", part=self._part(""), **self._place(item["id"], True)))
        return events

    def _place(self, item: str, part: bool = False) -> dict[str, Any]:
        return {"item_id": item, "output_index": self.places[item], **({"content_index": 0} if part else {})}

    def piece_events(self, piece: TextPiece | CallPiece) -> list[dict[str, Any]]:
        """The events of one piece of the reply."""
        if isinstance(piece, TextPiece):
            events = self._begin(self._message(None, "in_progress"))
            place = self._place(self.item, True)
            return [*events, self._event("output_text.delta", delta=piece.text, logprobs=[], **place)]
        item = self._call(self.reader.calls[piece.index], "", "in_progress")
        events = self._begin(item)
        if piece.arguments:
            place = self._place(item["id"])
            events.append(self._event("function_call_arguments.delta", delta=piece.arguments, **place))
        return events

    def _end(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """That an item is complete."""
        events = self._begin({**item, "status": "in_progress"})
        if item["type"] == "message":
            text, place = item["content"][0]["text"], self._place(item["id"], True)
            events.append(self._event("output_text.done", text=text, logprobs=[], **place))
            events.append(self._event("content_part.done", part=self._part(text), **place))
        else:
            call = {"name": item["name"], "arguments": item["arguments"], **self._place(item["id"])}
            events.append(self._event("function_call_arguments.done", **call))
        return [*events, self._event("output_item.done", output_index=self.places[item["id"]], item=item)]

    def opening(self, pending: list[PendingRequest]) -> list[Any]:
        started = [
            self._event(name, response=self._shell("in_progress", [], None)) for name in ("created", "in_progress")
        ]
        return started if self.reader.use else started + self._begin(self._message(None, "in_progress"))

    def closing(self, finish: str, request_context: RequestContext) -> list[Any]:
        response = self.response(finish, request_context)
        ends = [event for item in response["output"] for event in self._end(item)]
        return [*ends, self._event(response["status"], response=response)]
