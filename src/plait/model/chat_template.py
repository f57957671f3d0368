"""Conversations: the tokens of their turns, or the chat template that an imported model brings.

Of our own a turn is `<|user|>`, what was said, and the end; a reply begins after `<|assistant|>`. These are tokens of
the vocabulary that no text can spell. Images and audio clips stand in their place, as in any sequence.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from typing import Any

from tokenizers import Tokenizer

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text

TURNS = ("system", "user", "assistant", "tool")
ROLES = {**{name: name for name in TURNS}, "developer": "system", "function": "tool"}  # of messages -> whose turn
# What our turns are in Jinja, for those who read an exported model.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + {'developer': 'system', 'function': 'tool'}.get(message['role'], "
    "message['role']) + '|>' + message['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As transformers' templates take them: role, content, and where there are some tool_calls, tool_call_id, name.
Message = dict[str, Any]


def column_of(vocabulary: Vocabulary, modality: str) -> str:
    """The column as which a conversation's media of a modality are read and written: the first one."""
    return next(column for column, kind in vocabulary.columns.items() if kind == modality)


class Template:
    """The chat template of an imported tokenizer, rendered by transformers."""

    def __init__(self, text: Text, tokenizer: Any = None) -> None:
        """`tokenizer` is transformers' where it has been loaded. Raises PlaitError where transformers is missing."""
        self.text = text
        if tokenizer is None:
            transformers = import_extra("transformers", "huggingface", "A chat template")
            names = {name: value for name, value in text.settings.items() if name.endswith("_token")}
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(text.tokenizer.to_str()), split_special_tokens=False, **names
            )
            tokenizer.chat_template = text.chat_template
        self.tokenizer = tokenizer
        added = text.tokenizer.get_added_tokens_decoder().values()
        self.special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}

    def ids(
        self, messages: ListOf[Message], reply: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The ids of a conversation, with `reply` up to where the next reply begins; `tools` are those that may be
        called. Where a text spells a special token, it is cut out of the template and encoded apart, as characters.
        Raises PlaitError where the template refuses the conversation."""
        special = sorted(self.special, key=len, reverse=True)
        if not any(name in text for text in _texts([messages, tools]) for name in special):
            return self._ids(self.render(messages, reply, tools))
        spelt: dict[str, str] = {}  # what stands in a place -> the text that belongs there

        def mark(text: str) -> str:
            place = f"[{secrets.token_hex(8)}]"
            spelt[place] = text
            return place

        def marked(value: Any) -> Any:
            """A part of a call or a tool: within JSON the special tokens alone are cut out."""
            if isinstance(value, str):
                return re.sub("|".join(map(re.escape, special)), lambda match: mark(match[0]), value)
            if isinstance(value, dict):
                return {marked(key): marked(inner) for key, inner in value.items()}
            return [marked(inner) for inner in value] if isinstance(value, list) else value

        marked_messages = []
        for message in messages:
            rest = {key: value for key, value in message.items() if key not in ("role", "content")}
            marked_messages.append({"role": message["role"], "content": mark(message["content"]), **marked(rest)})
        contents = list(spelt)
        text, ids = self.render(marked_messages, reply, marked(tools)), list[int]()
        if any(place not in text for place in contents if spelt[place]):
            raise PlaitError("This model's chat template leaves out a message. Write the conversation otherwise.")
        for piece in re.split(f"({'|'.join(map(re.escape, spelt))})", text):
            ids += self.text.encode(spelt[piece]) if piece in spelt else self._ids(piece)
        return ids

    def script(self, messages: ListOf[Message]) -> list[tuple[bool, list[int]]]:
        """A conversation as pieces of ids, each with whether the assistant wrote it: its replies and what ends them.
        Where the template shows earlier turns otherwise once a reply is there, the last reply alone is written."""
        pieces: list[tuple[bool, list[int]]] = []
        done: list[int] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.ids(messages[:place]), self.ids(messages[: place + 1], reply=False)
            if after[: len(before)] != before:
                continue
            if before[: len(done)] != done:
                pieces, done = [], []
            reply = after[len(before) :]
            end = self.tokenizer.eos_token_id
            stop = reply.index(end) + 1 if end in reply else len(reply)
            pieces += [(False, before[len(done) :]), (True, reply[:stop])]
            done = before + reply[:stop]
        return pieces

    def render(self, messages: ListOf[Message], reply: bool, tools: list[dict[str, Any]] | None = None) -> str:
        """The text of a conversation. Raises PlaitError where the template refuses it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools or None, tokenize=False, add_generation_prompt=reply
                )
            )
        except Exception as error:  # the template's own complaints, and what it does to odd conversations
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise PlaitError(f"This model's chat template refuses the conversation: {reason}.") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []


def _texts(value: Any) -> Iterator[str]:
    """Every text in a structure, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
