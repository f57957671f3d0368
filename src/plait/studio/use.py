"""What a trained model can do with what falls into the page. One model is held at a time; it works in one thread."""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plait.core.errors import PlaitError
from plait.modalities.descriptor import MediaError
from plait.modalities.media import MEDIA, Checker, sniff
from plait.server.page_parts import PAGE_PARTS, LinesPart
from plait.studio.handover import Form, offered

NEAREST = 6  # records shown beside an answer
FOUND = 24  # records that a search shows
INDEXED = 2000  # records that are compared with
EXCERPT = 300  # characters of a record's text that are shown
REPLY = 400  # tokens of a reply, at most
TEXT_LIMIT = 20_000  # characters of a text that is read


@dataclass(frozen=True)
class Near:
    """A record that is like an input.

    Attributes:
        id: The record's.
        column: The column that was compared.
        kind: "image", "audio", "video" or "text".
        text: The beginning of a text.
        similarity: At most 1.
    """

    id: str
    column: str
    kind: str
    text: str
    similarity: float


@dataclass(frozen=True)
class Answer:
    """All that a model says about an input.

    Attributes:
        kind: "image", "audio" or "text".
        labels: (label, probability), the likeliest first.
        none_of_these: The model thinks that none of its labels fits.
        text: A caption, a transcript or a reply.
        nearest: The records of the dataset that are most alike.
        preview: The input as the model saw it, a `data:` URL, for images.
    """

    kind: str
    labels: list[tuple[str, float]] = field(default_factory=list)
    none_of_these: bool = False
    text: str = ""
    nearest: list[Near] = field(default_factory=list)
    preview: str = ""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        records: The most alike first.
        searched, total: How many records were compared, and how many the dataset has.
    """

    records: list[Near]
    searched: int
    total: int


@dataclass(frozen=True)
class Embedded:
    """Records of a dataset as vectors.

    Attributes:
        vectors: (N, E).
        records: N of them.
        total: How many records the dataset has.
    """

    vectors: np.ndarray
    records: list[Near]
    total: int

    def nearest(self, vector: np.ndarray, count: int) -> list[Near]:
        """The records whose vectors are most like one, (E,)."""
        if not self.records:
            return []
        alike = self.vectors @ vector
        order = np.argsort(-alike, kind="stable")[:count]
        return [replace(self.records[i], similarity=float(alike[i])) for i in order]


@dataclass(frozen=True)
class Why:
    """What speaks for an answer.

    Attributes:
        answer: The answer.
        image: The input with what speaks for it marked red and what speaks against it blue, a `data:` URL; "" for text.
        words: Of a text, with the class of their mark.
        beaten: (random maps that this one does better than, random maps), None where it was not compared.
        warnings: What to know about it.
    """

    answer: str
    image: str
    words: list[tuple[str, str]]
    beaten: tuple[int, int] | None
    warnings: list[str]


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: "user" or "assistant".
        parts: Texts, and the bytes of files.
    """

    role: str
    parts: list[str | bytes]


def read_messages(value: Any) -> list[Message]:
    """A conversation in OpenAI's form, media as base64. Raises PlaitError for anything else."""
    try:
        messages = [Message(one["role"], _read_parts(one["content"])) for one in value]
    except (KeyError, TypeError, ValueError, binascii.Error):
        messages = []
    if not messages or messages[-1].role != "user" or {one.role for one in messages} - {"user", "assistant"}:
        raise PlaitError(
            "A conversation is a list of messages, each with a role and a content, the last one the user's. A content "
            "is a text, or a list of parts: text, image_url, input_audio."
        )
    return messages


def _read_parts(content: Any) -> list[str | bytes]:
    if isinstance(content, str):
        return [content]
    parts: list[str | bytes] = []
    for part in content:
        if part["type"] == "text":
            parts.append(str(part["text"]))
        elif part["type"] == "image_url":
            parts.append(base64.b64decode(part["image_url"]["url"].partition(",")[2], validate=True))
        elif part["type"] == "input_audio":
            parts.append(base64.b64decode(part["input_audio"]["data"], validate=True))
        else:
            raise ValueError
    return parts


class Models:
    """The model that is in use, loaded when it is first asked for and let go when another one is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.checker = Checker(patience=20)
        self._key: tuple[str, float] | None = None
        self._model: Any = None
        self._embedded: Embedded | None = None

    def close(self) -> None:
        self.checker.close()

    def get(self, run: Path) -> Any:
        """The model of a run, loaded again when it has learnt more. Call with the lock held."""
        from plait.inference.model import load

        best = run / "checkpoints" / "best"
        place = best if best.exists() else run / "checkpoints" / "last"
        if not place.exists():
            raise PlaitError("This run has learnt nothing yet.")
        key = str(run), place.resolve().stat().st_mtime
        if self._key != key:
            self._model = self._embedded = None
            self._model, self._key = load(run), key
        return self._model

    def verbs(self, run: Path) -> list[str]:
        """What a run's model is offered for."""
        with self.lock:
            return [str(verb) for verb in self.get(run).offered_verbs]

    def forms(self, run: Path) -> list[Form]:
        """The forms that a run's model can be handed over in."""
        with self.lock:
            return offered(self.get(run), run)

    def kinds(self, run: Path) -> list[str]:
        """What kinds of columns a run's model reads."""
        with self.lock:
            return list(dict(getattr(self.get(run), "columns", {})).values())

    def ask(self, run: Path, data: Path, body: bytes, text: str, brief: bool = False) -> Answer:
        """Everything the model says about a file's bytes, or about a text.

        Args:
            run: The run's folder.
            data: The dataset that it was trained on, for the nearest records.
            body: A file; empty for a text.
            text: A text; empty for a file.
            brief: Labels or words alone, for images that follow one another.
        """
        value, kind = self._input(body, text)
        with self.lock:
            model = self.get(run)
            verbs = set(model.offered_verbs)
            columns = dict(getattr(model, "columns", {}))
            if columns and kind not in columns.values():
                readable = ", ".join(sorted(set(columns.values())))
                raise PlaitError(f"This model does not read {kind}. It reads {readable}.")
            labels: list[tuple[str, float]] = []
            none = False
            if "classify" in verbs and any(getattr(model, "labels", {}).values()):
                prediction = model.classify_inputs([value], top=5)[0]
                labels = [(str(label), float(chance)) for label, chance in prediction]
                none = bool(getattr(prediction, "none_of_these", False))
            words = self._words(model, verbs, kind, value) if not labels else ""
            nearest = self._nearest(model, data, value) if "embed" in verbs and not brief else []
        preview = image_url(_small(value)) if isinstance(value, Image.Image) and not brief else ""
        return Answer(kind, labels, none, words, nearest, preview)

    def find(self, run: Path, data: Path, body: bytes, text: str) -> SearchResult:
        """The records of a dataset that are most like a file, or a text; the arguments are those of `ask`."""
        value = self._input(body, text)[0]
        with self.lock:
            model = self.get(run)
            if "embed" not in model.verbs:
                raise PlaitError(f"This model cannot search. It can {', '.join(model.verbs)}.")
            embedded = self._records(model, data)
            records = embedded.nearest(model.embed_inputs([value])[0], FOUND) if embedded.records else []
        return SearchResult(records, len(embedded.records), embedded.total)

    def why(self, run: Path, value: Any, answers: list[str]) -> list[Why]:
        """Which parts of an input speak for each of some answers; the model's own answer where there is none.

        Args:
            run: The run's folder.
            value: An input, or (column, the bytes of a medium).
            answers: Labels or texts.
        """
        from plait.explain.parts import Words
        from plait.explain.report import as_png

        with self.lock:
            model = self.get(run)
            model_answer: list[str | None] = [None]
            explanations = [model.explain(value, answer) for answer in answers or model_answer]
        shown = []
        for one in explanations:
            words = [part for part in one.parts if isinstance(part, Words)]
            png = "" if words else "data:image/png;base64," + base64.b64encode(as_png(one)).decode()
            marked: list[tuple[str, str]] = []
            for part, weights in zip(one.parts, one.weights, strict=True):
                if isinstance(part, Words):
                    strongest = max(float(np.abs(weights).max(initial=0)), 1e-9)
                    for word, weight in zip(part.words, weights, strict=True):
                        level = round(4 * abs(float(weight)) / strongest)
                        marked.append((word.strip(), f"{'for' if weight > 0 else 'against'}{level}"))
            areas = one.areas
            beaten = (areas.random_maps_beaten, len(areas.random_deletion)) if areas is not None else None
            shown.append(Why(one.answer, png, marked, beaten, list(one.warnings)))
        return shown

    def value_of(self, body: bytes, text: str) -> Any:
        """A file's bytes, or a text, as an input. Raises PlaitError for what is neither."""
        return self._input(body, text)[0]

    def make(self, run: Path, verb: str, text: str, count: int, seed: int) -> list[str]:
        """Images or audio clips of what a text says, as `data:` URLs."""
        with self.lock:
            model = self.get(run)
            if verb not in ("draw", "speak") or verb not in model.verbs:
                raise PlaitError(f"This model cannot {verb}. It can {', '.join(model.verbs)}.")
            outputs = getattr(model, verb)(text, n=count, seed=seed)
        return [image_url(one) if verb == "draw" else wave_url(*one) for one in outputs]

    def chat(self, run: Path, messages: list[Message], seed: int) -> Generator[str]:
        """The next turn of a conversation, piece by piece; closing the iterator ends it.

        Args:
            run: The run's folder.
            messages: The conversation, which ends with a message of the user's.
            seed: Another one gives another reply.
        """
        from plait.chat.session import Chat, Session, Turn

        turns = [Turn(one.role, [self._part(part) for part in one.parts]) for one in messages]
        with self.lock:
            model = self.get(run)
            if "generate" not in model.offered_verbs:
                raise PlaitError(f"This model cannot talk. It can {', '.join(model.offered_verbs)}.")
            session = Session(Chat(model, run))
            session.turns = turns[:-1]
            session.attached = [part for part in turns[-1].parts if not isinstance(part, str)]
            text = "\n".join(part for part in turns[-1].parts if isinstance(part, str))
            yield from session.say(text, max_new_tokens=REPLY, seed=seed)

    def _part(self, part: str | bytes) -> Any:
        """A part of a message as models take it."""
        return part[:TEXT_LIMIT] if isinstance(part, str) else self._input(part, "")[0]

    def parts(self, run: Path) -> list[LinesPart]:
        """What features add to the page for this run's model."""
        with self.lock:
            model = self.get(run)
            return [part for part in PAGE_PARTS.all() if part.applies(model, run)]

    def examples(self, run: Path, data: Path, part: LinesPart) -> list[str]:
        """Lines to try a part of the page with; none where the data have changed beyond that."""
        with self.lock:
            try:
                return part.examples(self.get(run), run, data)
            except PlaitError:
                return []

    def answer_lines(self, run: Path, data: Path, name: str, lines: list[str]) -> list[str]:
        """What a feature's part of the page answers to lines of text."""
        part = next((part for part in self.parts(run) if part.name == name), None)
        if part is None:
            raise PlaitError(f"This model has no use for '{name}'.")
        with self.lock:
            return part.answer(self.get(run), run, data, lines)

    def _input(self, body: bytes, text: str) -> tuple[Any, str]:
        """An input and its kind. Raises PlaitError for what cannot be read."""
        if not body:
            if not text.strip():
                raise PlaitError("Drop a file, or write something.")
            return text[:TEXT_LIMIT], "text"
        sniffed = sniff(body[:64])
        if sniffed is None:
            raise PlaitError("That is no image, audio or video that is read here.")
        kind = sniffed[0]
        try:
            value = self.checker.decode(kind, body)
        except MediaError as error:
            raise PlaitError(f"The file cannot be read: {error}") from error
        return value, kind

    def _words(self, model: Any, verbs: set[str], kind: str, value: Any) -> str:
        if kind in MEDIA and MEDIA[kind].verb in verbs:
            return str(getattr(model, MEDIA[kind].verb)(value))
        if kind == "text" and "generate" in verbs:
            return str(model.generate(value, max_new_tokens=60))
        return ""

    def _nearest(self, model: Any, data: Path, value: Any) -> list[Near]:
        embedded = self._records(model, data)
        return embedded.nearest(model.embed_inputs([value])[0], NEAREST) if embedded.records else []

    def _records(self, model: Any, data: Path) -> Embedded:
        """The first records of training as vectors, computed when they are first asked for."""
        from plait.data.dataset import Dataset

        if not (data / "manifest.json").is_file():
            return Embedded(np.zeros((0, 1), np.float32), [], 0)
        if self._embedded is None:
            dataset = Dataset.open(data)
            column = next((name for name, kind in dataset.columns.items() if kind != "text"), None)
            column = column or next(iter(dataset.columns))
            indices = [int(i) for i in dataset.indices("train")[:INDEXED]]
            kind = dataset.columns[column]
            records = [one for one in dataset.iterate(indices, [column]) if column in one.parts]
            parts = [(column, one.parts[column]) for one in records]
            vectors = model.embed_inputs(parts) if parts else np.zeros((0, 1), np.float32)
            texts = [part[:EXCERPT] if isinstance(part, str) else "" for _, part in parts]
            owners = [Near(one.id, column, kind, text, 0.0) for one, text in zip(records, texts, strict=True)]
            self._embedded = Embedded(vectors, owners, len(dataset))
        return self._embedded


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((320, 320))
    return image


def image_url(image: Image.Image) -> str:
    """An image as a `data:` URL."""
    if max(image.size) < 160:
        factor = max(160 // max(image.size), 1)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wave_url(wave: np.ndarray, rate: int) -> str:
    """Audio as a `data:` URL of a WAV file."""
    from plait.modalities.audio_files import encode_wav

    return "data:audio/wav;base64," + base64.b64encode(encode_wav(wave, rate)).decode()
