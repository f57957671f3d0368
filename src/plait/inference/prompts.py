"""Conversations as prompts: by the chat template that a model brings, or as a plain transcript."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.inference.model import PlaitModel
from plait.inference.tools import Tool, ToolCall, ToolFormat, read_format
from plait.modalities.text import Text
from plait.model.chat_template import ROLES, Message, Template
from plait.model.multimodal import Sequence

NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool",
         "function": "Tool"}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is one of NAMES; parts are inputs as `Model` takes them. An assistant may have called
    tools; a tool's turn is the result of the call with the id `call_id`."""

    role: str
    parts: list[Any]
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


@dataclass(frozen=True)
class Prompt:
    """A context to write after. `stop` are strings that end a reply; `strip`, whether it begins with a stray space."""

    context: Sequence
    stop: tuple[str, ...] = ()
    strip: bool = False


class Chat:
    """Turns conversations into prompts of one model."""

    def __init__(self, model: PlaitModel, folder: Path | None = None) -> None:
        """`folder` holds the checkpoint, where it is not the one that the model was loaded from: a chat template there
        is used. Raises PlaitError where it needs transformers and they are not installed."""
        folder = folder or model.folder
        self.model = model
        self.template: Template | None = None
        self.stop: tuple[str, ...] = ()
        own = bool(model.vocabulary.turns)
        text = model.checkpoint.text
        if folder is not None and not own and (tokenizer := _template(folder, text)) is not None:
            self.template = Template(text, tokenizer)
            self.stop = _ends(folder, tokenizer, model.vocabulary.end_id)

    @property
    def column(self) -> str | None:
        """Where a reply is written by default: nowhere in particular in a model of conversations or of text alone, else
        in the first text column."""
        if self.model.vocabulary.turns or not self.model.checkpoint.model.media:
            return None
        return self.model.column(None, "text", "write text")

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How replies call tools; None where the model's template knows none, or spells calls in a way of its own."""
        return read_format(self.template) if self.template is not None else None

    def prompt(self, turns: list[Turn], column: str | None = None, tools: ListOf[Tool] = ()) -> Prompt:
        """The conversation up to the next reply; `column` names where it is to be written, None continues the text.
        `tools` are shown by a template that knows them.

        A model that was trained on conversations knows the tokens of their turns; an imported one may bring a template.
        A lone message of another model that reads media is read as it is: it knows records, not conversations.
        Otherwise the transcript is "User: ...", "Assistant: ..." line by line.
        """
        if self.model.vocabulary.turns:
            return Prompt(self._turns(turns, column))
        if self.template is not None:
            return Prompt(self._templated(turns, column, tools), self.stop)
        if len(turns) == 1 and self.model.checkpoint.model.media:
            return Prompt(self.model.context(turns[0].parts, column))
        parts: list[Any] = []
        for turn in turns:
            for part in (f"{NAMES[turn.role]}: ", *turn.parts, "\n"):
                if isinstance(part, str) and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                else:
                    parts.append(part)
        parts = [*parts[:-1], parts[-1] + "Assistant:"]
        return Prompt(self.model.context(parts, column), ("\nUser:",), strip=True)

    def _turns(self, turns: list[Turn], column: str | None) -> Sequence:
        """By the tokens of the model's own turns."""
        vocabulary, sequence = self.model.vocabulary, Sequence()
        for turn in turns:
            content = self.model.context(turn.parts)
            sequence.read_ids([vocabulary.opener(ROLES[turn.role])]).extend(content).read_ids([vocabulary.end])
        sequence.read_ids([vocabulary.opener("assistant")])
        return sequence if column is None else sequence.read_ids([vocabulary.opener(column)])

    def _templated(self, turns: list[Turn], column: str | None, tools: ListOf[Tool]) -> Sequence:
        assert self.template is not None
        if any(not isinstance(part, str) for turn in turns for part in turn.parts):
            raise PlaitError("This model's chat template takes text only. Leave images and audio clips out.")
        names = {call.id: call.name for turn in turns for call in turn.calls}
        messages: list[Message] = []
        for turn in turns:
            message: Message = {"role": ROLES[turn.role], "content": "\n".join(turn.parts)}
            if turn.calls:
                message["tool_calls"] = [{**call.shown(), "id": _short(call.id)} for call in turn.calls]
            if turn.call_id:
                message |= {"tool_call_id": _short(turn.call_id), "name": names.get(turn.call_id, "")}
            messages.append(message)
        ids = self.template.ids(messages, tools=[tool.shown() for tool in tools])
        sequence = Sequence().read_ids(ids, "text")
        return sequence if column is None else sequence.read_ids([self.model.vocabulary.opener(column)])


def _short(call: str) -> str:
    """A call's id as every template takes it: Mistral's know nine letters and digits only."""
    return hashlib.sha256(call.encode()).hexdigest()[:9]


def _template(folder: Path, text: Text) -> Any:
    """The tokenizer of a folder that brings a chat template, as transformers loads it; None where there is none. Of
    low-rank updates and GGUF files it is in `text` alone."""
    if not (folder / "tokenizer.json").is_file():
        return Template(text).tokenizer if text.chat_template is not None else None
    settings = folder / "tokenizer_config.json"
    known = settings.is_file() and read_json(settings).get("chat_template")
    if not known and not (folder / "chat_template.jinja").is_file():
        return None
    transformers = import_extra("transformers", "huggingface", f"The chat template of {folder}")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, split_special_tokens=False
        )
    except Exception as error:  # its loaders raise nearly every class on damaged files
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise PlaitError(f"{folder}: the tokenizer's settings cannot be read: {reason}. Fetch it again.") from error
    return tokenizer if tokenizer.chat_template else None


def _ends(folder: Path, tokenizer: Any, known: int | None) -> tuple[str, ...]:
    """The spellings of further ids that end a reply: the engine knows one."""
    ends = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            end = read_json(folder / name).get("eos_token_id")
            ends += end if isinstance(end, list) else [end]
    ids = sorted({id for id in ends if isinstance(id, int) and id != known})
    return tuple(name for name in tokenizer.convert_ids_to_tokens(ids) if name)
