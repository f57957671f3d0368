"""What a model can do, for somebody who watches it learn: a few records asked about, always in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.data.conversations import turns
from plait.data.record import Record
from plait.modalities.recogniser import Recogniser

if TYPE_CHECKING:
    from plait.inference.model import PlaitModel

ASKED = 3  # inputs of each kind
DRAWN = 4  # texts that something is made of
WORDS = 32  # new tokens of a text, at most
BEGINNING = 60  # characters of a text that is continued


@dataclass(frozen=True)
class Shown:
    """One thing asked, and its answer.

    Attributes:
        asked: Words, or the bytes of a media file.
        answer: Words, a PIL image, or (waveform, rate).
        kind: The modality of the answer.
        wanted: The right answer in words, "" where there are many.
        probability: Of the answer, None where there is none.
    """

    asked: str | bytes
    answer: Any
    kind: str
    wanted: str = ""
    probability: float | None = None


def showcase(model: PlaitModel, records: list[Record]) -> list[Shown]:
    """What a model of records makes of some of them: images and audio clips of their texts, words about their media,
    answers to their texts. Labels that an encoder has learnt by itself are left out.

    Args:
        model: Its columns are the records'.
        records: A few dozen, of which the first that fit are taken.
    """
    columns, read_only = model.columns, model.checkpoint.model.config.read_only
    texts = [column for column, kind in columns.items() if kind == "text"]
    media = [column for column, kind in columns.items() if kind in model.checkpoint.model.media]
    writable = [column for column in media if not {column, columns[column]} & set(read_only)]
    written = [column for column in texts if column not in read_only]
    shown_items = [shown for column in writable if texts for shown in _made(model, records, texts[0], column)]
    if media and written:
        shown_items += _written_answers(model, records, media[0], written[0])
    elif not media and written:
        shown_items += _written(model, records, written)
    return shown_items


def _made(model: PlaitModel, records: list[Record], source: str, column: str) -> list[Shown]:
    """Media of a column, of the first few different texts."""
    prompts = list(dict.fromkeys(str(one.parts[source]) for one in records if source in one.parts))[:DRAWN]
    outputs = model.write([model.context([text]) for text in prompts], column, seed=0)
    modality = model.modality(column)
    return [
        Shown(text, modality.to_object(one[0]), model.columns[column])
        for text, one in zip(prompts, outputs, strict=True)
    ]


def _written_answers(model: PlaitModel, records: list[Record], source: str, target: str) -> list[Shown]:
    """What is written about media."""
    if target in model.labels and isinstance(model.modality(source).encoder, Recogniser):
        return []  # the encoder's own answers show
    chosen = [one for one in records if source in one.parts and target in one.parts][:ASKED]
    contexts = [model.context([(source, model.modality(source).windows(one.parts[source])[0])]) for one in chosen]
    answers = model.write(contexts, target, do_sample=False, max_new_tokens=WORDS)
    return [
        Shown(bytes(one.parts[source]), answer[0], "text", str(one.parts[target]))  # type: ignore[arg-type]
        for one, answer in zip(chosen, answers, strict=True)
    ]


def _written(model: PlaitModel, records: list[Record], columns: list[str]) -> list[Shown]:
    """Answers to texts: the other column's, the next turn of a conversation, or how a text goes on."""
    if model.vocabulary.turns:
        return _replies(model, records, columns[0])
    if len(columns) == 1:
        return _continued(model, records, columns[0])
    target = next((column for column in columns if column in model.labels), columns[-1])
    source = next(column for column in columns if column != target)
    chosen = [one for one in records if source in one.parts and target in one.parts][:ASKED]
    prompts = [str(one.parts[source]) for one in chosen]
    truth = [str(one.parts[target]) for one in chosen]
    if target in model.labels:
        predictions = model.classify_inputs(prompts, column=target, top=1)
        return [
            Shown(text, best[0].label, "text", right, best[0].probability)
            for text, best, right in zip(prompts, predictions, truth, strict=True)
        ]
    answers = model.write([model.context([text]) for text in prompts], target, do_sample=False, max_new_tokens=WORDS)
    return [Shown(text, answer[0], "text", right) for text, answer, right in zip(prompts, answers, truth, strict=True)]


def _replies(model: PlaitModel, records: list[Record], column: str) -> list[Shown]:
    """Replies to the first message of conversations."""
    from plait.inference.prompts import Chat, Turn

    messages = []
    for record in records:
        first = next(iter(turns(str(record.parts[column]))), None) if column in record.parts else None
        if first is not None and first.role == "user" and all(kind == "text" for kind, _ in first.parts):
            messages.append(" ".join(text for _, text in first.parts))
    chat, messages = Chat(model), messages[:ASKED]
    prompts = [chat.prompt([Turn("user", [text])]) for text in messages]
    replies = model.reply([prompt.context for prompt in prompts], do_sample=False, max_new_tokens=WORDS)
    return [Shown(text, answer.strip(), "text") for text, answer in zip(messages, replies, strict=True)]


def _continued(model: PlaitModel, records: list[Record], column: str) -> list[Shown]:
    """How the beginnings of texts go on."""
    beginnings = [str(one.parts[column])[:BEGINNING] for one in records if column in one.parts][:ASKED]
    beginnings = [text[: max(len(text) // 2, 1)] if len(text) < BEGINNING else text for text in beginnings]
    opened = [
        model.start().extend(model.context([text])) if model.columns else model.context([text]) for text in beginnings
    ]
    continuations = model.reply(opened, do_sample=False, max_new_tokens=WORDS)
    return [Shown(text, answer, "text") for text, answer in zip(beginnings, continuations, strict=True)]
