"""`/v1/messages`: Anthropic's shape of a conversation, with text, images and tools.

As anthropic 0.9x to 2.x send it; fields that have no effect here (`thinking`, `cache_control`, `betas`) are ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field
from starlette.responses import Response

from plait.inference.prompts import Prompt
from plait.inference.requests import Request as EngineRequest
from plait.inference.tools import CallPiece, TextPiece
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.api import STREAM, make_router, service_of
from plait.server.api_text import StreamedReply, chat_turns, text_reply
from plait.server.limits import ApiError
from plait.server.service import EventStream, Lead, Served, Service
from plait.server.tools import ReplyReader, ToolUse, tool_use
from plait.server.worker import PendingRequest

router = make_router()


def _as_messages(value: Any) -> Any:
    """Anthropic's messages as chat completions have them: calls stand in a message of the assistant's, their results in
    messages of their own, and thinking is left out."""
    messages: list[Any] = []
    for message in value if isinstance(value, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            messages.append(message)
            continue
        calls = [
            {"id": block.get("id") or "", "function": {
                "name": block.get("name"), "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False)}}
            for block in content if block.get("type") == "tool_use"
        ]  # fmt: skip
        messages += [
            {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content") or ""}
            for block in content if block.get("type") == "tool_result"
        ]  # fmt: skip
        left_out = ("tool_use", "tool_result", "thinking", "redacted_thinking")
        parts = [block for block in content if block.get("type") not in left_out]
        if parts or calls:
            messages.append({**message, "content": parts or None, "tool_calls": calls or None})
    return messages if isinstance(value, list) else value


class MessagesRequest(s.SamplingBody):
    messages: Annotated[Annotated[list[s.Message], Field(min_length=1, max_length=256)], BeforeValidator(_as_messages)]
    max_tokens: s.Tokens = None
    system: s.Text | s.Parts | None = None
    stop_sequences: Annotated[list[s.Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    tools: s.Tools | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesAnswer(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: dict[str, Any]


@router.post("/v1/messages", response_model=MessagesAnswer, responses={200: {"content": STREAM}}, tags=["text"])
async def messages(request: Request, body: MessagesRequest) -> Response:
    """The next reply of a conversation, in Anthropic's shape."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    prompt, engine_request, use = await _prepared(service, served, request_context, body, body.max_tokens)
    answer = _MessageReply(served, ReplyReader(use, Lead(prompt.strip)))
    if body.stream:
        pending = served.worker.submit([engine_request], service.deadline(request_context))
        return EventStream(answer.events(pending, request_context), pending, done=False, named=True)
    sample = (await service.written(served, [engine_request], request_context))[0][0]
    answer.reader.add(sample.text or "", last=True)
    return JSONResponse(answer.response(sample.finish, request_context))


@router.post("/v1/messages/count_tokens", tags=["text"])
async def count_tokens(request: Request, body: MessagesRequest) -> Response:
    """How many tokens a conversation takes."""
    service, request_context = service_of(request)
    served = service.open(body, request_context)
    prompt, _, _ = await _prepared(service, served, request_context, body, None)
    return JSONResponse({"input_tokens": len(prompt.context)})


async def _prepared(
    service: Service, served: Served, request_context: RequestContext, body: MessagesRequest, max_tokens: int | None
) -> tuple[Prompt, EngineRequest, ToolUse | None]:
    """The prompt of a conversation, what the engine is asked for, and the tools. Raises ApiError."""
    choice, parallel = _choice(body.tool_choice)
    use = tool_use(service, served, request_context, body.tools, choice, parallel)
    system = [s.Message(role="system", content=body.system)] if body.system else []
    turns = await chat_turns(service, served, [*system, *body.messages], service.deadline(request_context))
    stop = tuple(body.stop_sequences or ())
    prompt, engine_request = await text_reply(
        service, served, request_context, turns, body, s.Writing(), use, max_tokens, stop
    )
    return prompt, engine_request, use


def _choice(choice: dict[str, Any] | None) -> tuple[Any, bool | None]:
    """Anthropic's tool_choice in OpenAI's words, and whether several calls may be made."""
    if choice is None:
        return None, None
    parallel = False if choice.get("disable_parallel_tool_use") is True else None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    openai_choices = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in openai_choices:
        raise ApiError(400, "tool_choice has the type auto, any, none or tool.", "tool_choice")
    return openai_choices[str(kind)], parallel


class _MessageReply(StreamedReply):
    """One of Anthropic's messages on its way."""

    def __init__(self, served: Served, reader: ReplyReader) -> None:
        self.served, self.reader = served, reader
        self.id = "msg_" + secrets.token_hex(12)
        self.open: str | None = None  # the block that has begun and not ended: "text", or a call's id
        self.place = -1

    def _shell(
        self, content: list[dict[str, Any]], reason: str | None, input_tokens: int, output_tokens: int
    ) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.served.name, "content": content,
                "stop_reason": reason, "stop_sequence": None, "usage": _usage(input_tokens, output_tokens)}  # fmt: skip

    def _reason(self, finish: str) -> str:
        if finish == "length":
            return "max_tokens"
        return "tool_use" if self.reader.calls else "end_turn"

    def response(self, finish: str, request_context: RequestContext) -> dict[str, Any]:
        """The message when it is complete."""
        reader = self.reader
        content: list[dict[str, Any]] = [{"type": "text", "text": reader.text}] if reader.text else []
        for call in reader.calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
        input_tokens, output_tokens = request_context.prompt_tokens, request_context.completion_tokens
        return self._shell(content, self._reason(finish), input_tokens, output_tokens)

    def _close(self) -> list[dict[str, Any]]:
        if self.open is None:
            return []
        self.open = None
        return [{"type": "content_block_stop", "index": self.place}]

    def _begin(self, name: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        """That a block is there, once, and that the one before it is complete."""
        if self.open == name:
            return []
        events = self._close()
        self.open, self.place = name, self.place + 1
        return [*events, {"type": "content_block_start", "index": self.place, "content_block": block}]

    def piece_events(self, piece: TextPiece | CallPiece) -> list[dict[str, Any]]:
        if isinstance(piece, TextPiece):
            events = self._begin("text", {"type": "text", "text": ""})
            delta = {"type": "text_delta", "text": piece.text}
        else:
            call = self.reader.calls[piece.index]
            events = self._begin(call.id, {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
        return [*events, {"type": "content_block_delta", "index": self.place, "delta": delta}]

    def opening(self, pending: list[PendingRequest]) -> list[Any]:
        size = sum(len(one.request.context) for one in pending)
        return [{"type": "message_start", "message": self._shell([], None, size, 0)}]

    def closing(self, finish: str, request_context: RequestContext) -> list[Any]:
        delta = {"stop_reason": self._reason(finish), "stop_sequence": None}
        usage = _usage(request_context.prompt_tokens, request_context.completion_tokens)
        return [*self._close(), {"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


def _usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0}  # fmt: skip


def _input(arguments: str) -> Any:
    """The arguments of a call as an object; what was cut in the middle is none."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {}
