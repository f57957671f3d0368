"""Conversations as sequences of which the assistant's turns alone are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np

from plait.core.errors import PlaitError
from plait.data import conversations as chat
from plait.modalities.base import MediaModality, Vocabulary
from plait.modalities.text import Text
from plait.model.chat_template import ROLES, Template, column_of
from plait.model.multimodal import IGNORE, Sequence

Part = list[int] | str  # the ids of a text, or the column of a medium


@dataclass
class EncodedTurn:
    """One turn. A `role` of None says that a chat template has put its marks among the ids already."""

    role: str | None
    parts: list[Part]
    written: bool  # by the assistant, and thus learned


class ConversationEncoder:
    """Turns conversations, as a dataset keeps them, into turns of ids that fit a context."""

    def __init__(self, text: Text, vocabulary: Vocabulary, context: int, size: Callable[[int, str], int]) -> None:
        """`size` tells how many tokens the medium of a record in a column takes."""
        self.text, self.context, self.size = text, context, size
        self.template = Template(text) if not vocabulary.turns else None
        self.shortened = 0  # conversations whose oldest turns, or the ends of whose texts, do not fit

    def conversations(self, first: int, values: ListOf[str | None]) -> Iterator[list[EncodedTurn] | None]:
        """The turns of consecutive records from number `first` on, None where one has none: the oldest left out where
        they do not fit. Texts are tokenised together, by all cores. Raises PlaitError for media that a model whose
        conversations follow a template cannot take."""
        said = [None if value is None else chat.turns(value) for value in values]
        if self.template is not None:
            for turns in said:
                yield None if turns is None else self._templated([(turn.role, turn) for turn in turns])
            return
        texts = dict.fromkeys(
            content for turns in said for turn in turns or [] for kind, content in turn.parts if kind == "text"
        )
        ids = dict(zip(texts, self.text.encode_batch(list(texts)), strict=True))
        for place, turns in enumerate(said):
            yield None if turns is None else self._fitted(first + place, turns, ids)

    def _fitted(self, record: int, turns: ListOf[chat.Turn], ids_of: Mapping[str, list[int]]) -> list[EncodedTurn]:
        """The turns of a record, of whose texts the ids are known."""
        max_tokens, cut = self.context // 2 - 8, False
        kept = []
        for turn in turns:
            parts: list[Part] = []
            for kind, content in turn.parts:
                ids = ids_of[content] if kind == "text" else []
                cut |= len(ids) > max_tokens
                parts.append(ids[:max_tokens] if kind == "text" else content)
            role = ROLES[turn.role]
            if parts:
                kept.append(EncodedTurn(role, parts, role == "assistant"))
        first = 1 if kept and kept[0].role == "system" else 0
        while len(kept) > first + 2 and self._length(record, kept) > self.context:
            del kept[first]
            cut = True
        self.shortened += cut
        return kept if self._length(record, kept) <= self.context else []

    def _templated(self, turns: list[tuple[str, chat.Turn]]) -> list[EncodedTurn]:
        assert self.template is not None
        if any(kind != "text" for _, turn in turns for kind, _ in turn.parts):
            raise PlaitError("The chat template of init_from takes text only. Leave images and audio clips out.")
        messages = [{"role": role, "content": "\n".join(content for _, content in turn.parts)} for role, turn in turns]
        first = 1 if messages and messages[0]["role"] == "system" else 0
        pieces = self.template.script(messages)
        cut = False
        while sum(len(ids) for _, ids in pieces) > self.context and len(messages) > first + 2:
            del messages[first]
            pieces, cut = self.template.script(messages), True
        self.shortened += cut
        if sum(len(ids) for _, ids in pieces) > self.context:
            return []
        return [EncodedTurn(None, [ids], written) for written, ids in pieces]

    def _length(self, record: int, turns: list[EncodedTurn]) -> int:
        return sum(
            2 + sum(len(part) if isinstance(part, list) else self.size(record, part) for part in turn.parts)
            for turn in turns
        )


def sequences(
    turns: list[EncodedTurn],
    vocabulary: Vocabulary,
    media: dict[str, MediaModality],
    samples: Mapping[str, np.ndarray],
    codes: Mapping[str, np.ndarray],
    alone: bool = False,
) -> Iterator[Sequence]:
    """What a model learns of a conversation: a sequence that predicts the assistant's texts and where they end, and one
    for each medium of the assistant's, which is written once and read in what follows.

    `samples` and `codes` are the record's media by column, `codes` of those that can be written; with `alone` media are
    written without what was said before, for guidance.
    """
    main = Sequence()
    for turn in turns:
        if turn.role is not None:
            main.read_ids([vocabulary.opener(turn.role)])
        for part in turn.parts:
            if isinstance(part, str):
                modality = media[vocabulary.columns[part]]
                opener = vocabulary.opener(column_of(vocabulary, modality.name))
                written = codes.get(part) if turn.written else None
                if written is not None:
                    fork = Sequence() if alone else _copy(main)
                    closer = [vocabulary.closer(modality.name)] if modality.variable_length else []
                    ids = (written + vocabulary.id_ranges[modality.name][0]).tolist()
                    yield fork.read_ids([opener]).write([*ids, *closer, vocabulary.end])
                main.read_media(modality, opener, samples[part], vocabulary.pad)
            elif turn.written:
                main.write(part)
                if turn.role is not None:
                    main.targets[-1] = vocabulary.end
            else:
                main.read_ids(part, "text" if turn.role is not None else None)
        if turn.role is not None:
            main.read_ids([vocabulary.end])
    if any(target != IGNORE for target in main.targets):
        yield main


def _copy(sequence: Sequence) -> Sequence:
    """What was read so far, without its targets."""
    return Sequence(list(sequence.ids), [IGNORE] * len(sequence), list(sequence.media), list(sequence.spans))
