"""Conversations: the tokens of their turns, or the chat template that an imported model brings.

Of our own a turn is `<|user|>`, what was said, and the end; a reply begins after `<|assistant|>`. These are tokens of
the vocabulary that no text can spell. Images and audio clips stand in their place, as in any sequence.
"""

from __future__ import annotations

import secrets
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
Message = tuple[str, str]  # role, text


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

    def ids(self, messages: ListOf[Message], reply: bool = True) -> list[int]:
        """The ids of a conversation, with `reply` up to where the next reply begins. Where a text spells a special
        token, it is cut out of the template and encoded apart, as characters. Raises PlaitError where the template
        refuses the conversation."""
        said = [text for _, text in messages]
        if not any(name in text for text in said for name in self.tokenizer.all_special_tokens):
            return self._ids(self._render(messages, reply))
        marks = [f"[{secrets.token_hex(8)}-{i}]" for i in range(len(said))]
        roles = [role for role, _ in messages]
        rest, ids = self._render(list(zip(roles, marks, strict=True)), reply), list[int]()
        for mark, text in zip(marks, said, strict=True):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise PlaitError("This model's chat template leaves out a message or repeats it; write it anew.")
            ids += self._ids(before) + self.text.encode(text)
        return ids + self._ids(rest)

    def script(self, messages: ListOf[Message]) -> list[tuple[bool, list[int]]]:
        """A conversation as pieces of ids, each with whether the assistant wrote it: its replies and what ends them.
        Where the template shows earlier turns otherwise once a reply is there, the last reply alone is written."""
        pieces: list[tuple[bool, list[int]]] = []
        done: list[int] = []
        for place, (role, _) in enumerate(messages):
            if role != "assistant":
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

    def _render(self, messages: ListOf[Message], reply: bool) -> str:
        shown = [{"role": role, "content": text} for role, text in messages]
        try:
            return str(self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=reply))
        except Exception as error:  # the template's own complaints, and what it does to odd conversations
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise PlaitError(f"This model's chat template refuses the conversation: {reason}.") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
