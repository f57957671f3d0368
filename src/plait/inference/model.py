"""The model as its users meet it: generate, classify, embed, describe, transcribe, draw and speak."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import torch
from PIL import Image as PILImage

from plait.classifiers.classifier import Classifier
from plait.core.device import choose_device
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import read_json
from plait.data.record import Record
from plait.inference import scoring
from plait.inference.base import Model, Verb
from plait.inference.constrained import ConstraintCompiler, ConstraintError, TextConstraint
from plait.inference.engine import Completion, Engine, Request
from plait.inference.inputs import Reading
from plait.inference.opinions import opinion_scores
from plait.inference.results import Prediction, Predictions
from plait.inference.sampling import Options, make_sampling
from plait.inference.showcase import Shown, showcase
from plait.modalities.inputs import medium_of
from plait.modalities.media import read_by
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint, find_checkpoint
from plait.model.multimodal import Sequence

DEFAULT_NEW_TOKENS = 50  # of a continuation, where nothing else bounds it


class ModelSource(Protocol):
    """Where models come from that are no checkpoints of Plait; a feature adds it. Arguments are those of `load`."""

    def __call__(self, name_or_folder: str | Path, device: str = "auto", precision: str = "auto") -> Model: ...


MODEL_SOURCES: ExtensionPoint[ModelSource] = ExtensionPoint("model_source")
# A feature whose part a checkpoint holds may have a class of models with verbs of its own.
MODEL_CLASSES: ExtensionPoint[type[PlaitModel]] = ExtensionPoint("model_class")


def load(path: str | Path, device: str = "auto", precision: str = "auto") -> Model:
    """The model of a run's folder (its best checkpoint, else its last), of a checkpoint's folder, or of a Hugging
    Face name, folder or GGUF file: `hf.architectures` in our backbone, others through transformers.

    Where a run's best checkpoint is damaged, a warning names what is wrong and the newest whole one is taken. Raises
    PlaitError where there is none or it is damaged.
    """
    folder = find_checkpoint(path)
    choose_device(device, precision)  # which says what is wrong before anything is read
    if folder is not None and folder != Path(path).expanduser() and (wrong := checkpoints.verify(folder)):
        step, _ = checkpoints.newest_whole(folder.parent)
        if step:
            newest = checkpoints.series(folder.parent)[step]
            warnings.warn(f"{'; '.join(wrong)}. Taking {newest} in its place.", stacklevel=2)
            folder = newest
    if folder is not None and read_json(folder / "config.json").get("model_type") == "plait":
        return model_of(checkpoints.load(folder), device, precision, folder)
    return MODEL_SOURCES.one()(folder or path, device, precision)


def model_of(
    checkpoint: Checkpoint, device: str = "auto", precision: str = "auto", folder: Path | None = None
) -> PlaitModel:
    """The model of a checkpoint, of the class that a feature has for it where there is one."""
    classes = [MODEL_CLASSES.by_feature()[name] for name in checkpoint.parts]
    return (classes[0] if classes else PlaitModel)(checkpoint, device, precision, folder)


class PlaitModel(Reading, Model):
    """A checkpoint at work in Plait's engine. Inputs are those of `Model`, or (column, an input, a fitted sample or a
    list of windows) where the column matters."""

    embed_batch = 256

    def __init__(
        self, checkpoint: Checkpoint, device: str = "auto", precision: str = "auto", folder: Path | None = None
    ) -> None:
        self.checkpoint, self.folder = checkpoint, folder  # the folder it was loaded from
        self.device = choose_device(device, precision)
        checkpoint.model.eval().to(self.device.torch)
        if self.device.weights is not None:
            checkpoint.model.pack(self.device.weights)
        self.vocabulary = checkpoint.model.vocabulary

    @property
    def plait_model(self) -> PlaitModel:
        return self

    def showcase(self, records: list[Record]) -> list[Shown]:
        """What it makes of a few records, for somebody who watches it learn; see `inference.showcase`."""
        return showcase(self, records)

    def prepared(self, kind: str, value: Any) -> Any:
        """The samples that a decoded medium is fitted to: smaller than it, as a rule."""
        column = self.column(None, kind, f"read {kind}")
        return column, self.modality(column).windows(value)

    def moments(self, kind: str, value: Any) -> list[tuple[float | None, float | None, Any]]:
        column = self.column(None, kind, f"read {kind}")
        cut = getattr(self.modality(column), "moments", None)
        if cut is None:
            return [(None, None, self.prepared(kind, value))]
        return [(one.start, one.stop, (column, [one.sample])) for one in cut(value)]

    @cached_property
    def engine(self) -> Engine:
        """The engine behind all verbs; made at first use, it keeps the weights' state of that moment."""
        return Engine(self.checkpoint, self.device)

    @cached_property
    def constraints(self) -> ConstraintCompiler:
        """What compiles schemas and grammars for this model's ids; made at first use. Raises PlaitError where
        llguidance is missing."""
        span = self.engine.spans["text"]
        return ConstraintCompiler(self.checkpoint.text, span.end, span.more_ends)

    def constraint(
        self,
        *,
        schema: Any = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
    ) -> TextConstraint | None:
        """What a text must be, compiled; None where nothing is asked for. Raises ConstraintError."""
        asked = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        asked = {name: value for name, value in asked.items() if value is not None}
        if not asked:
            return None
        if len(asked) > 1:
            raise ConstraintError(f"A text has one constraint, not {' and '.join(asked)}. Leave all but one out.")
        ((name, value),) = asked.items()
        compiled: TextConstraint = getattr(self.constraints, name)(value)
        return compiled

    # --- generation -------------------------------------------------------------------------------------------

    def request(self, context: Sequence, token_type: str, n: int = 1, **options: Unpack[Options]) -> Request:
        """A request of the engine, with the checkpoint's defaults where an option is not given."""
        self.require(Verb.GENERATE)
        defaults = self.checkpoint.generation
        sampling = make_sampling(options, defaults, token_type, n)
        guidance, stop = options.get("guidance"), options.get("stop")
        if guidance is None:
            guidance = defaults.guidance.get(token_type, 1.0)
        if not 0 <= guidance < math.inf:
            raise PlaitError(f"guidance must be 0 or more, not {guidance}; 1 is none.")
        return Request(
            context=context,
            token_type=token_type,
            sampling=sampling,
            n=n,
            max_new_tokens=options.get("max_new_tokens"),
            guidance=guidance,
            seed=options.get("seed", 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            constraint=options.get("constraint") if token_type == "text" else None,
        )

    def requests(
        self, contexts: Iterable[Sequence], column: str, n: int = 1, **options: Unpack[Options]
    ) -> list[Request]:
        """What `write` asks the engine for, a request a context."""
        if column not in self.columns:
            raise PlaitError(f"There is no column '{column}'. The columns are {', '.join(self.columns) or 'none'}.")
        token_type = self.columns[column]
        if name := next((n for n in (token_type, column) if n in self.checkpoint.model.config.read_only), None):
            raise PlaitError(
                f"This model reads {name} but was trained with training.weights.{name}: 0, so it cannot write it. "
                f"It can {', '.join(self.verbs)}."
            )
        requests = [self.request(self._opened(context, column), token_type, n, **options) for context in contexts]
        for i, request in enumerate(requests):
            request.first_sample = i * n
        return requests

    def write(
        self, contexts: Iterable[Sequence], column: str, *, n: int = 1, **options: Unpack[Options]
    ) -> list[list[Any]]:
        """For each context, n results in a column: str for text, else decoded samples (arrays).

        The opener is added where the context does not end with it. Result k of context i is a function of the seed,
        i, k and the context, whatever else is written beside it.
        """
        results = self.engine.run(self.requests(contexts, column, n, **options))
        if self.columns[column] == "text":
            return [[written.text for written in result.samples] for result in results]
        decoded = iter(self.decode(column, [written for result in results for written in result.samples]))
        return [[next(decoded) for _ in result.samples] for result in results]

    def reply(self, contexts: Iterable[Sequence], **options: Unpack[Options]) -> list[str]:
        """What follows each context as text, up to its end; in a conversation, the reply."""
        results = self.engine.run([self.request(context, "text", **options) for context in contexts])
        return [result.samples[0].text or "" for result in results]

    def decode(self, column: str, written: list[Completion]) -> list[np.ndarray]:
        """Codes to samples, through the codec."""
        modality = self.modality(column)
        start = self.vocabulary.id_ranges[modality.name][0]
        samples: list[np.ndarray] = [np.empty(0)] * len(written)
        lengths: dict[int, list[int]] = {}
        for i, one in enumerate(written):
            lengths.setdefault(len(one.ids), []).append(i)
        with torch.inference_mode():
            for alike in lengths.values():
                for part in (alike[at : at + 256] for at in range(0, len(alike), 256)):
                    codes = torch.tensor([written[i].ids for i in part], device=self.device.torch) - start
                    for i, sample in zip(part, modality.codec.decode(codes).cpu().numpy(), strict=True):
                        samples[i] = sample
        return samples

    def generate(
        self,
        prompt: Any,
        *,
        to: str = "text",
        max_length: int | None = None,
        num_return_sequences: int = 1,
        n: int | None = None,
        schema: Any = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """What follows a prompt: an input, or a list of them that are read in order.

        `to` is a modality or a column. A prompt of text alone with `to="text"` is continued, and prompt and
        continuation come back as a str; else the first column of that modality, or the named one, is written: a str,
        a PIL image or (waveform, rate). With `n` (or `num_return_sequences`) above 1, a list of so many.
        `max_length` counts the prompt's tokens too; a continuation has at most 50 new ones unless told otherwise.
        A text can be held to a JSON `schema` (a dictionary or a pydantic model), a `regex`, a `choice` of texts or a
        `grammar` (Lark or GBNF); then only what was written is returned, as a str. `options` are those of
        `plait.inference.sampling.Options`.
        """
        count = num_return_sequences if n is None else n
        held = self.constraint(schema=schema, regex=regex, choice=choice, grammar=grammar)
        if held is not None:
            options["constraint"] = held
        max_new_tokens = options.get("max_new_tokens")
        parts = prompt if isinstance(prompt, list) else [prompt]
        continued = to == "text" and all(isinstance(part, str) for part in parts)
        column = None
        if not continued:
            column = to if to in self.columns else self.column(None, self._space(to), f"write {to}")
        context = self.context(parts, column)
        if not len(context):
            context = self.start()
        if max_length is not None:
            if max_length <= len(context):
                raise PlaitError(
                    f"max_length is {max_length}, but the prompt alone takes {len(context)} tokens. Raise it, or use "
                    "max_new_tokens, which does not count the prompt."
                )
            # Both bounds hold where both are given.
            max_new_tokens = min(max_length - len(context), max_new_tokens or max_length)
        if max_new_tokens is None and continued:
            max_new_tokens = DEFAULT_NEW_TOKENS
        options["max_new_tokens"] = max_new_tokens
        if column is None:
            result = self.engine.run([self.request(context, "text", count, **options)])[0]
            before = "".join(parts) if held is None else ""
            found: list[Any] = [before + (written.text or "") for written in result.samples]
        else:
            found = self.write([context], column, n=count, **options)[0]
            if self.columns[column] != "text":
                found = [self.modality(column).to_object(sample) for sample in found]
        return found[0] if count == 1 else found

    def _space(self, to: str) -> str:
        known = set(self.columns.values()) | {"text"}
        if to not in known:
            raise PlaitError(f"This model cannot write '{to}'. It writes {', '.join([*sorted(known), *self.columns])}.")
        return to

    # --- verbs ------------------------------------------------------------------------------------------------

    def describe(self, image: Any, column: str | None = None, **options: Unpack[Options]) -> str:
        """What the model writes about an image in a text column (the first by default)."""
        if not read_by("describe") & self.modalities:
            self.column(None, "image", "describe")
        image = medium_of(image)
        target = self.column(column, "text", "describe")
        return self.write([self.context([image])], target, **options)[0][0]

    def transcribe(
        self,
        audio: Any,
        column: str | None = None,
        *,
        language: str | None = None,
        task: str = "transcribe",
        **options: Unpack[Options],
    ) -> str:
        """The words of an audio clip. A long one is read in windows that overlap by half; see `joined`."""
        if task != "transcribe":
            raise PlaitError(f"This model writes down what it hears, and knows no task '{task}'. Leave it out.")
        if language is not None:
            raise PlaitError(f"{self.name} writes what its columns hold. Leave the language out, or name a column.")
        self.column(None, "audio", "transcribe")
        target = self.column(column, "text", "transcribe")
        audio = medium_of(audio)
        texts = [row[0] for row in self.write(self.alone(audio, self.engine.max_length), target, **options)]
        return joined(texts)

    def draw(
        self, text: str, n: int = 1, best_of: int | None = None, column: str | None = None, **options: Unpack[Options]
    ) -> list[PILImage.Image]:
        """n images of what a text says; of `best_of` drawn, those whose embeddings are nearest to the text's."""
        return self._render(text, self.column(column, "image", "draw"), n, best_of, options)

    def speak(
        self, text: str, n: int = 1, best_of: int | None = None, column: str | None = None, **options: Unpack[Options]
    ) -> list[tuple[np.ndarray, int]]:
        """n audio clips, (waveform, rate), of what a text says; `best_of` as in `draw`."""
        return self._render(text, self.column(column, "audio", "speak"), n, best_of, options)

    def _render(self, text: str, column: str, n: int, best_of: int | None, options: Options) -> list[Any]:
        count = max(n, best_of or n)
        samples = self.write([self.context([text])], column, n=count, **options)[0]
        if count > n:
            vectors = self.embed_inputs([text, *((column, sample) for sample in samples)])
            order = np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")[:n]
            samples = [samples[i] for i in order]
        return [self.modality(column).to_object(sample) for sample in samples]

    def score(self, contexts: list[Sequence], column: str, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """log P(text and its end | context, the column's opener) in nats, (contexts, texts) float64.

        The opener is added where a context does not end with it.
        """
        column = self.column(column, "text", "score")
        ids = self.checkpoint.text.encode_batch(list(texts))
        return scoring.score(self.engine, [self._opened(c, column) for c in contexts], ids, batch_size)

    def classify_inputs(
        self, inputs: list[Any], labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> list[Predictions]:
        """`classify` for inputs as they are.

        Labels default to the values that the column had in training; then the run's classifier answers, whose
        probabilities are calibrated on validation records and which knows what is unfamiliar. Labels of your own are
        ranked by their likelihood as texts. An audio clip longer than a window is read in windows and their
        probabilities averaged.
        """
        return self.classify_sequences(
            [self.alone(value, self.engine.max_length) for value in inputs], labels, column, top
        )

    def classify_together(
        self, value: Any, labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> Predictions:
        """The likeliest labels of an input as it is, or of a list of inputs that are read in order as one."""
        if isinstance(value, list):
            return self.classify_parts([self.context(value)], labels, column, top)
        return self.classify_inputs([value], labels, column, top)[0]

    def classify_parts(
        self, parts: list[Sequence], labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> Predictions:
        """`classify` for an input that is sequences already: one, or its windows."""
        return self.classify_sequences([parts], labels, column, top)[0]

    def classify_sequences(
        self,
        inputs: list[list[Sequence]],
        labels: list[str] | None = None,
        column: str | None = None,
        top: int | None = 5,
    ) -> list[Predictions]:
        """`classify` for inputs that are sequences already: of each one, or its windows."""
        if column is None:
            known = [name for name in self.labels if self.labels[name]]
            column = known[0] if known else None
        column = self.column(column, "text", "classify")
        answers: dict[int, Predictions] = {}
        groups: dict[int, list[int]] = {}  # which classifier answers, counted from 0, or -1 for none -> inputs
        for place, parts in enumerate(inputs):
            found = self._classifier(parts, column) if labels is None else None
            groups.setdefault(-1 if found is None else self.checkpoint.classifiers.index(found), []).append(place)
        for number, places in groups.items():
            some = [inputs[place] for place in places]
            if number >= 0:
                made = self._decide(self.checkpoint.classifiers[number], some, top)
            else:
                made = self._rank(some, self.labels.get(column, []) if labels is None else list(labels), column, top)
            answers |= dict(zip(places, made, strict=True))
        return [answers[place] for place in range(len(inputs))]

    def _rank(self, inputs: list[list[Sequence]], labels: list[str], column: str, top: int | None) -> list[Predictions]:
        """Labels by their likelihood as texts."""
        if not labels:
            raise PlaitError(f"Column '{column}' has no known labels. Name them: labels=[...] or --labels a,b,c.")
        scores = self.score([part for parts in inputs for part in parts], column, labels)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        return [_predictions(mean, labels, top) for mean in _means(chances, inputs)]

    def _classifier(self, parts: list[Sequence], column: str) -> Classifier | None:
        """What was fitted for one input of this kind, alone; None where nothing was."""
        for one in self.checkpoint.classifiers:
            opener = None if one.features.kind == "text" else self.vocabulary.opener(one.source)
            media = [len(part.media) for part in parts]
            if opener is None:
                fits = not any(media) and all(len(part.spans) == 1 for part in parts)
            else:
                fits = all(count == 1 and part.ids[0] == opener for count, part in zip(media, parts, strict=True))
            if one.target == column and fits:
                return one
        return None

    def _decide(self, classifier: Classifier, inputs: list[list[Sequence]], top: int | None) -> list[Predictions]:
        """The classifier's answers to inputs that are one sequence each, or windows."""
        if classifier.features.kind == "text":  # whose windows are one text again
            samples: list[Any] = ["".join(self.checkpoint.text.decode(part.ids) for part in parts) for parts in inputs]
            owners = [parts[:1] for parts in inputs]
        else:
            samples = [part.media[0].sample for parts in inputs for part in parts]
            owners = inputs
        scores = opinion_scores(self, classifier, samples, classifier.mixture.used)
        chances = _means(np.exp(classifier.mixture.log_probabilities(scores)), owners)
        unfamiliar = _means(classifier.mixture.ood_scores(scores), owners)
        return [
            _predictions(mean, classifier.labels, top, float(score), float(score) > classifier.mixture.threshold)
            for mean, score in zip(chances, unfamiliar, strict=True)
        ]

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The place of each input in the one space, (N, E) float32, of unit length.

        Inputs longer than the model reads at once are embedded in windows whose mean counts.
        """
        if prompt is not None:
            raise PlaitError(f"{self.name} has no prompts. Leave the prompt out.")
        return self.embed_parts([self.alone(value, self.engine.max_length) for value in inputs])

    def embed_parts(self, parts: list[list[Sequence]]) -> np.ndarray:
        """`embed` for inputs that are sequences already: each the mean of its own, (N, E)."""
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        vectors = self.embed_sequences([sequence for part in parts for sequence in part])
        sums = np.zeros((len(parts), vectors.shape[1]), np.float32)
        np.add.at(sums, owner, vectors)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)

    def embed_sequences(self, sequences: list[Sequence], batch_size: int = 256) -> np.ndarray:
        """The embedding of the first span of each sequence, (N, E) float32, of unit length."""
        return scoring.embed(self.engine, sequences, batch_size)


def _predictions(
    chances: np.ndarray, labels: list[str], top: int | None, ood_score: float | None = None, unlike: bool = False
) -> Predictions:
    """The likeliest of labels (L,), by their probabilities."""
    order = np.argsort(-chances, kind="stable")[:top]
    return Predictions((Prediction(labels[i], float(chances[i])) for i in order), ood_score, unlike)


def _means(values: np.ndarray, inputs: list[list[Sequence]]) -> list[np.ndarray]:
    """The mean of each input's rows, which lie one after the other."""
    return [rows.mean(0) for rows in np.split(values, np.cumsum([len(parts) for parts in inputs])[:-1])]


def joined(texts: list[str]) -> str:
    """The texts of windows that overlap, as one: what two neighbours agree on is written once."""
    return " ".join(text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1])
