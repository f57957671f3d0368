"""Tools of a request, and the calls in a reply: what chat completions, responses and messages share."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.inference.tools import CallPiece, ReplyParser, TextPiece, Tool, ToolCall, ToolFormat, tool_grammar
from plait.server import schemas as s
from plait.server.access_log import RequestContext
from plait.server.limits import ApiError
from plait.server.service import Lead, Served, Service


@dataclass(frozen=True)
class ToolUse:
    """The tools that a reply may call, or with `required` must; several at once where they may be `parallel`."""

    form: ToolFormat
    tools: tuple[Tool, ...]
    required: bool
    parallel: bool

    def grammar(self, served: Served, schema: dict[str, Any] | None) -> str | None:
        """What holds the reply; texts to a schema, where there is one."""
        added = served.engine_model.checkpoint.text.tokenizer.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        return tool_grammar(
            self.form, self.tools, special, required=self.required, parallel=self.parallel, schema=schema
        )


def tool_use(
    service: Service, served: Served, request_context: RequestContext, specs: Sequence[s.ToolSpec] | None, choice: Any,
    parallel: bool | None,
) -> ToolUse | None:  # fmt: skip
    """The tools of a request; None where there are none, or the model may not or cannot call any. Raises ApiError
    where it must call one that is not there, or cannot."""
    functions = [spec.function for spec in specs or [] if spec.function is not None]
    tools = tuple(Tool(f.name, f.description, f.parameters, f.strict) for f in functions)
    if specs and len(functions) < len(specs):
        service.ignore("tools", request_context)  # those that the client's provider would run
    mode, names = _choice(choice)
    if mode == "none":
        return None
    if names is not None:
        if missing := sorted(names - {tool.name for tool in tools}):
            raise ApiError(400, f"tool_choice names '{missing[0][:64]}', which is none of the tools.", "tool_choice")
        tools = tuple(tool for tool in tools if tool.name in names)
    if not tools:
        if mode == "required":
            raise ApiError(400, "tool_choice asks for a call, but there are no tools. Send tools.", "tool_choice")
        return None
    form = served.chat.tool_format if served.chat is not None else None
    if form is None:
        if mode == "required":
            raise ApiError(
                400, f"{served.name} calls no tools: it has no chat template that shows them and spells calls as JSON. "
                "Leave tool_choice out, or ask for a response_format.", "tool_choice",
            )  # fmt: skip
        service.ignore("tools", request_context)
        return None
    if len({tool.name for tool in tools}) < len(tools):
        raise ApiError(400, "Two tools have the same name. Give each its own.", "tools")
    tool_texts = [json.dumps(tool.shown()) for tool in tools]
    service.check_parts(tool_texts)
    served.check_prompt(tool_texts, "tools")
    named = mode == "required" and names is not None and len(names) == 1  # which asks for one call
    return ToolUse(form, tools, mode == "required", parallel is not False and not named)


def _choice(choice: Any) -> tuple[str, set[str] | None]:
    """("auto", "none" or "required", the tools that may be called or None for all), from OpenAI's spellings."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return choice, None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if choice.get("type") == "function" and isinstance(name, str):
            return "required", {name}
        allowed = choice.get("allowed_tools", choice)
        if choice.get("type") == "allowed_tools" and isinstance(allowed, dict):
            entries = [entry for entry in allowed.get("tools") or [] if isinstance(entry, dict)]
            names = {str((entry.get("function") or entry).get("name")) for entry in entries}
            return "required" if allowed.get("mode") == "required" else "auto", names
    raise ApiError(
        400, 'tool_choice is auto, none, required, or {"type": "function", "function": {"name": ...}}.', "tool_choice"
    )


def calls_of(message: s.Message) -> tuple[ToolCall, ...]:
    """The calls that a message of the assistant's holds."""
    return tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in message.tool_calls or [])


@dataclass
class ReplyReader:
    """One reply on its way, text or calls: pieces as they become certain, and all that came."""

    use: ToolUse | None
    lead: Lead
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parser = ReplyParser(self.use.form, [tool.name for tool in self.use.tools]) if self.use else None

    def add(self, text: str, last: bool = False) -> list[TextPiece | CallPiece]:
        """The next pieces; with `last` nothing more comes."""
        pieces: list[TextPiece | CallPiece]
        if self._parser is None:
            pieces = [TextPiece(text)] if (text := self.lead(text)) else []
        else:
            pieces = self._parser.add(text, last)
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self.text += piece.text
            elif piece.name is not None:
                self.calls.append(ToolCall(piece.name, piece.arguments, "call_" + secrets.token_hex(12)))
            else:
                call = self.calls[piece.index]
                self.calls[piece.index] = ToolCall(call.name, call.arguments + piece.arguments, call.id)
        return pieces

    def finish(self, finish: str) -> str:
        """Why it ended, in OpenAI's words."""
        if finish == "length":
            return "length"
        return "tool_calls" if self.calls else "stop"
