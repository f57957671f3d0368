"""Tools: how a model's chat template spells calls, the grammar that holds a reply to it, and the calls of a reply.

The template itself is asked: it is rendered with one and with two calls, and what stands around their JSON is how this
model begins, separates and ends them (`<tool_call>` of Qwen and Hermes, `[TOOL_CALLS]` of Mistral, bare JSON of Llama
3). Templates whose calls are no JSON objects are not read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.core.errors import PlaitError
from plait.inference.constrained import closed
from plait.model.chat_template import Message, Template

_WORDS = ("probe_tool", "probe_key", "probe_one", "probe_two")  # that no template holds
_TOOL, _KEY, _ONE, _TWO = _WORDS
# JSON as templates write it, and as little else: a small model could go on with white space for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tool:
    """What a model may call: `parameters` is the JSON schema of its arguments; `strict`, whether every keyword of it
    must be held."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False

    def shown(self) -> dict[str, Any]:
        """As templates take it."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, `arguments` as JSON; `id` is what its result refers to."""

    name: str
    arguments: str
    id: str = ""

    def shown(self) -> dict[str, Any]:
        """As templates take it: arguments as an object, where they are one."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = self.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """How calls are spelt: `begin`, a JSON object, `between` and a further one as often as needed, `end`.

    Attributes:
        begin: Before the first call; empty where a call is told by its JSON alone.
        between: Between two calls; None where a reply holds one call only.
        end: After the last.
        name_key: The key of a call's name.
        arguments_key: The key of its arguments.
    """

    begin: str
    between: str | None
    end: str
    name_key: str
    arguments_key: str

    def head(self, name: str) -> str:
        """A call up to its arguments."""
        return f'{{"{self.name_key}": {json.dumps(name, ensure_ascii=False)}, "{self.arguments_key}": '


def read_format(template: Template) -> ToolFormat | None:
    """How a template spells calls; None where it knows no tools, or spells calls otherwise than in JSON."""
    tools = [Tool(_TOOL, "", {"type": "object", "properties": {_KEY: {"type": "string"}}}).shown()]
    question: list[Message] = [{"role": "user", "content": "a question"}]

    def reply(*values: str) -> str:
        """What the template writes for a reply with so many calls, without what ends every reply."""
        calls = [ToolCall(_TOOL, json.dumps({_KEY: value}), f"call0000{i}").shown() for i, value in enumerate(values)]
        answer: Message = {"role": "assistant", "content": "" if calls else _ONE}
        if calls:
            answer["tool_calls"] = calls
        return template.render([*question, answer], False, tools)

    try:
        before = template.render(question, True, tools)
        if _TOOL not in before:
            return None
        plain, one = reply(), reply(_ONE)
    except PlaitError:
        return None
    try:
        two = reply(_ONE, _TWO)
    except PlaitError:  # one call a reply
        two = ""
    tail = plain.rpartition(_ONE)[2]

    def cut(text: str) -> str:
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        return text[same:].removesuffix(tail)

    first = _call_in(cut(one), _ONE)
    if first is None:
        return None
    start, stop, name_key, arguments_key = first
    begin, end, between = cut(one)[:start], cut(one)[stop:], None
    second = _call_in(cut(two), _TWO) if two else None
    both = _call_in(cut(two), _ONE) if two else None
    if second is not None and both is not None and both[1] <= second[0]:
        between = cut(two)[both[1] : second[0]]
    return ToolFormat(begin.lstrip(), between, end.rstrip(), name_key, arguments_key)


def _call_in(text: str, value: str) -> tuple[int, int, str, str] | None:
    """Where the JSON of the call with an argument begins and ends, and its two keys."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            call, stop = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        names = [key for key, inner in call.items() if inner == _TOOL]
        arguments = [key for key, inner in call.items() if inner == {_KEY: value}]
        if names and arguments:
            return match.start(), stop, names[0], arguments[0]
    return None


# --- the grammar --------------------------------------------------------------------------------------------------


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    special: dict[str, int],
    *,
    required: bool,
    parallel: bool,
    schema: dict[str, Any] | None = None,
) -> str | None:
    """A grammar, in llguidance's notation, of replies that call tools.

    Args:
        special: The ids of special tokens by their spelling, which no text of the grammar can stand for.
        required: Whether the reply must be a call; else it may be text.
        parallel: Whether there may be several calls.
        schema: What a text must be; free if None.

    Returns:
        None where a free text cannot be told from a call before it is complete, so that nothing holds the reply.
    """
    if not required and schema is None and not form.begin:
        return None
    calls = "call"
    if parallel and form.between is not None:
        calls = f"call ({_spelt(form.between, special)} call)*"
    body = f"{calls} {_spelt(form.end, special)}"
    rules = []
    if required:
        start = f"{_spelt(form.begin, special)} {body}"
    elif schema is not None:
        start = f"answer | {_spelt(form.begin, special)} {body}"
        rules.append(f"answer: {_json(closed(schema), lenient=False)}")
    else:
        trigger, rest = _trigger(form.begin, special)
        start = f"TEXT | begin {_spelt(rest, special)} {body}"
        rules.append("TEXT: /(.|\\n)*/")
        rules.append(f"begin: TEXT {trigger}" if trigger.startswith("<") else f"begin[lazy]: TEXT {trigger}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        rules.append(f'call_{i}: {json.dumps(form.head(tool.name))} {_json(_closed(tool), not tool.strict)} "}}"')
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, ""])


def _closed(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments: an object of the properties that it names."""
    return dict(closed({"properties": {}, **tool.parameters, "type": "object"}))


def _json(schema: dict[str, Any], lenient: bool) -> str:
    """A rule's part for JSON of a schema; a lenient one passes over keywords that cannot be held."""
    return "%json " + json.dumps({**schema, "x-guidance": {**_SPACING, "lenient": lenient}})


def _trigger(begin: str, special: dict[str, int]) -> tuple[str, str]:
    """What tells that a call begins, as the grammar spells it, and the rest of `begin`."""
    for name, id_ in special.items():
        if begin.startswith(name):
            return f"<[{id_}]>", begin[len(name) :]
    mark = begin.rstrip()
    return json.dumps(mark), begin[len(mark) :]


def _spelt(text: str, special: dict[str, int]) -> str:
    """A text as the grammar spells it, special tokens by their ids."""
    names = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return " ".join(f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces if piece)


# --- the calls of a reply -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPiece:
    """More of what is said."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """More of a call: `name` in its first piece alone, then more of its arguments; `done` in its last."""

    index: int
    name: str | None = None
    arguments: str = ""
    done: bool = False


_FENCE = re.compile(r"^```(?:json)?(?=\s|\{)\s*")  # of Markdown, in which models like to write JSON
_HEAD = 512  # characters within which a call without a mark has told its name


class ReplyParser:
    """Takes a reply piece by piece, and tells what is said from what is called."""

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        """`names` are the tools that there are: nothing else is a call."""
        self.form, self.names = form, set(names)
        self.mark = form.begin.strip()
        key, arguments = re.escape(json.dumps(form.name_key)), re.escape(json.dumps(form.arguments_key))
        self._head = re.compile(rf'\s*\{{\s*{key}\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*{arguments}\s*:\s*(?=\S)')
        self._state = self._text
        self._buffer = ""
        self._calls = 0
        self._said = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def add(self, text: str, last: bool = False) -> list[TextPiece | CallPiece]:
        """What has become certain; with `last` nothing more comes."""
        self._buffer += text
        pieces: list[TextPiece | CallPiece] = []
        while True:
            state, size = self._state, len(self._buffer)
            pieces += state(last)
            if self._state == state and len(self._buffer) == size:
                break
        if last and self._buffer:
            pieces.append(TextPiece(self._buffer))
            self._buffer = ""
        return pieces

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._calls

    def _text(self, last: bool) -> list[TextPiece | CallPiece]:
        """Until a call begins. White space before one belongs to neither."""
        bare = self._bare(last)
        if bare is None:
            return []
        if bare:
            self._state = self._call
            return []
        buffer = self._buffer
        if not self.mark:
            self._buffer = ""
            return self._say(buffer)
        place = buffer.find(self.mark)
        if place >= 0:
            self._buffer, self._state = buffer[place + len(self.mark) :], self._call
            return self._say(buffer[:place].rstrip())
        keep = 0 if last else len(buffer) - len(buffer.rstrip())
        for size in range(min(len(self.mark) - 1, len(buffer)), 0, -1):
            if not last and self.mark.startswith(buffer[-size:]):
                before = buffer[:-size]
                keep = max(keep, size + len(before) - len(before.rstrip()))
                break
        self._buffer = buffer[len(buffer) - keep :]
        return self._say(buffer[: len(buffer) - keep])

    def _bare(self, last: bool) -> bool | None:
        """Whether the reply begins with the JSON of a call without a mark, in a fence or not; None while that is open.

        Some templates spell calls so, and small models leave the mark out.
        """
        begins = self._buffer.lstrip()
        if self._said or self._calls or begins[:1] not in ("", "{", "`"):
            return False
        inside = _FENCE.sub("", begins)
        if (match := self._head.match(inside)) is not None:
            if json.loads(match[1]) not in self.names:
                return False
            self._buffer = inside
            return True
        may_be = not inside or inside.startswith("{") or "```json".startswith(inside)
        return None if may_be and not last and len(begins) < _HEAD else False

    def _say(self, text: str) -> list[TextPiece | CallPiece]:
        self._said |= bool(text)
        return [TextPiece(text)] if text else []

    def _call(self, last: bool) -> list[TextPiece | CallPiece]:
        """Until a call's arguments begin."""
        match = self._head.search(self._buffer)
        if match is None:
            if last and self._calls:
                self._buffer = ""  # what ends the calls
            elif last:
                self._buffer = self.mark + self._buffer
                self._state = self._over
            return []
        self._buffer = self._buffer[match.end() :]
        self._state, self._depth, self._quoted, self._escaped = self._arguments, 0, False, False
        self._calls += 1
        return [CallPiece(self._calls - 1, str(json.loads(match[1])))]

    def _arguments(self, last: bool) -> list[TextPiece | CallPiece]:
        """Until the object of the arguments is closed."""
        for at, letter in enumerate(self._buffer):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._quoted = False
                continue
            self._quoted = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
            if self._depth == 0 and letter in "}]":
                piece, self._buffer = self._buffer[: at + 1], self._buffer[at + 1 :]
                self._state = self._call
                return [CallPiece(self._calls - 1, None, piece, True)]
        piece, self._buffer = self._buffer, ""
        return [CallPiece(self._calls - 1, None, piece)] if piece else []

    def _over(self, last: bool) -> list[TextPiece | CallPiece]:
        return []
