"""The model as its users meet it: generate, classify, embed, describe, transcribe, draw and speak."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import torch
from PIL import Image as PILImage

from plait.core.device import choose_device
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import read_json
from plait.data.record import Record
from plait.inference.answering import Answering
from plait.inference.base import Model, Verb
from plait.inference.constrained import ConstraintCompiler, ConstraintError, TextConstraint
from plait.inference.engine import Engine
from plait.inference.requests import Completion, Request
from plait.inference.results import Segment
from plait.inference.sampling import Options, check_options, make_sampling
from plait.inference.scoring import NO_SPACE
from plait.inference.showcase import Shown, showcase
from plait.modalities.audio_files import decode_audio, silent
from plait.modalities.descriptor import MediaError
from plait.modalities.inputs import medium_of
from plait.modalities.media import read_by
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint, find_checkpoint
from plait.model.lora import Adapter, attach_adapter
from plait.model.multimodal import Sequence

FRAME_SECONDS = 0.01  # of a frame of the log-mel that audio modalities read
ADAPTER_FILE = "adapter_config.json"  # of PEFT
DEFAULT_NEW_TOKENS = 50  # of a continuation, where nothing else bounds it


class ModelSource(Protocol):
    """Where models come from that are no checkpoints of Plait; a feature adds it. Arguments are those of `load`."""

    def __call__(self, name_or_folder: str | Path, device: str = "auto", precision: str = "auto") -> Model: ...


MODEL_SOURCES: ExtensionPoint[ModelSource] = ExtensionPoint("model_source")
# A feature whose part a checkpoint holds may have a class of models with verbs of its own.
MODEL_CLASSES: ExtensionPoint[type[PlaitModel]] = ExtensionPoint("model_class")


def load(
    path: str | Path, device: str = "auto", precision: str = "auto", *, adapter: str | Path | None = None
) -> Model:
    """The model of a run's folder (its best checkpoint, else its last), of a checkpoint's folder, or of a Hugging
    Face name, folder or GGUF file: `hf.architectures` in our backbone, others through transformers.

    `adapter` is a folder of PEFT's or of a LoRA run, whose updates are computed beside the model's weights. Where a
    run's best checkpoint is damaged, a warning names what is wrong and the newest whole one is taken. Raises
    PlaitError where there is none or it is damaged.
    """
    if adapter is None and (file := Path(path).expanduser() / ADAPTER_FILE).is_file():
        path, adapter = _base_of(file), path
    if adapter is not None:
        model = load(path, device, precision)
        return attach_adapters(model, {Path(adapter).name: adapter})[0]
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


def _base_of(file: Path) -> str:
    """The model that PEFT's adapter says it belongs to. Raises PlaitError where it says none."""
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise PlaitError(f"{file} does not say which model it belongs to. Name it: BASE --adapter {file.parent}")
    return name


class AdapterSource(Protocol):
    """Reads adapters from files; a feature adds it."""

    def __call__(self, folder: str | Path, checkpoint: Checkpoint) -> Adapter: ...


ADAPTER_SOURCES: ExtensionPoint[AdapterSource] = ExtensionPoint("adapter_source")


def attach_adapters(model: Model, folders: Mapping[str, str | Path]) -> list[PlaitModel]:
    """A model for each adapter, by name; they share the weights of `model`. Raises PlaitError where a folder holds
    none, or one of another base."""
    if (plait_model := model.plait_model) is None:
        raise PlaitError(
            f"{model.name} runs in transformers, where adapters are not taken. Use one that runs in Plait."
        )
    adapters = {name: ADAPTER_SOURCES.one()(folder, plait_model.checkpoint) for name, folder in folders.items()}
    return [plait_model.attach(name, adapter) for name, adapter in adapters.items()]


def model_of(
    checkpoint: Checkpoint, device: str = "auto", precision: str = "auto", folder: Path | None = None
) -> PlaitModel:
    """The model of a checkpoint, of the class that a feature has for it where there is one."""
    classes = [MODEL_CLASSES.by_feature()[name] for name in checkpoint.parts]
    return (classes[0] if classes else PlaitModel)(checkpoint, device, precision, folder)


class PlaitModel(Answering, Model):
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
        self.adapter = -1  # that requests are written with

    @property
    def plait_model(self) -> PlaitModel:
        return self

    def attach(self, name: str, adapter: Adapter) -> PlaitModel:
        """The same model, sharing its weights, with an adapter that its requests are written with. All adapters of a
        model are attached before its engine is used."""
        twin = copy.copy(self)
        twin.__dict__.pop("engine", None)
        self.__dict__.pop("engine", None)
        twin.adapter, twin.name = attach_adapter(self.checkpoint.model.backbone, name, adapter), name
        return twin

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
        constraints = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        constraints = {name: value for name, value in constraints.items() if value is not None}
        if not constraints:
            return None
        if len(constraints) > 1:
            raise ConstraintError(f"A text has one constraint, not {' and '.join(constraints)}. Leave all but one out.")
        ((name, value),) = constraints.items()
        compiled: TextConstraint = getattr(self.constraints, name)(value)
        return compiled

    # --- generation -------------------------------------------------------------------------------------------

    def request(self, context: Sequence, token_type: str, n: int = 1, **options: Unpack[Options]) -> Request:
        """A request of the engine, with the checkpoint's defaults where an option is not given."""
        self.require(Verb.GENERATE)
        check_options(options)
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
            adapter=self.adapter,
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
        known = self.checkpoint.generation.max_new_tokens
        if options.get("max_new_tokens") is None and options.get("constraint") is None and column in known:
            options["max_new_tokens"] = known[column]  # a constraint knows itself where a text ends
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

    def continue_text(self, contexts: Iterable[Sequence], **options: Unpack[Options]) -> list[str]:
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
            texts: list[Any] = [before + (written.text or "") for written in result.samples]
        else:
            texts = self.write([context], column, n=count, **options)[0]
            if self.columns[column] != "text":
                texts = [self.modality(column).to_object(sample) for sample in texts]
        return texts[0] if count == 1 else texts

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
        self._check_speech(language, task)
        windows = self.spoken(audio)
        target = self.column(column, "text", "transcribe")
        texts = [row[0] for row in self.write([sequence for _, _, sequence in windows], target, **options)]
        return joined(texts)

    def segments(
        self, audio: Any, language: str | None = None, task: str = "transcribe", words: bool = False
    ) -> list[Segment]:
        """What is said when in an audio clip: the text of each window, from the middle of its overlap with the one
        before to that with the one behind it."""
        if words:
            raise PlaitError(f"{self.name} does not tell when each word is said. Use a Whisper, or leave words out.")
        self._check_speech(language, task)
        windows = self.spoken(audio)
        target = self.column(None, "text", "transcribe")
        texts = [row[0] for row in self.write([sequence for _, _, sequence in windows], target)]
        return joined_segments([Segment(a, b, text) for (a, b, _), text in zip(windows, texts, strict=True)])

    def spoken(self, audio: Any) -> list[tuple[float, float, Sequence]]:
        """The windows of an audio clip in which something can be heard: where each begins and ends, in seconds, without
        the half of its overlaps that belongs to a neighbour, and its sequence."""
        modality = self.modality(self.column(None, "audio", "transcribe"))
        try:
            value = medium_of(audio)
            wave, rate = value if isinstance(value, tuple) else decode_audio(value)
        except MediaError as error:
            raise PlaitError(f"The audio cannot be read: {error}.") from error
        sequences = self.alone((wave, rate), self.engine.max_length)
        length, total = getattr(modality.settings, "frames", 1) * FRAME_SECONDS, len(wave) / rate
        starts = [min(i * length / 2, max(total - length, 0.0)) for i in range(len(sequences))]
        edges = [0.0, *((a + length + b) / 2 for a, b in pairwise(starts)), total]
        segments = []
        for i, (start, sequence) in enumerate(zip(starts, sequences, strict=True)):
            if not silent(np.asarray(wave)[int(start * rate) : int((start + length) * rate) + 1]):
                segments.append((edges[i], edges[i + 1], sequence))
        return segments

    def _check_speech(self, language: str | None, task: str) -> None:
        if task != "transcribe":
            raise PlaitError(f"This model writes down what it hears, and knows no task '{task}'. Leave it out.")
        if language is not None:
            raise PlaitError(f"{self.name} writes what its columns hold. Leave the language out, or name a column.")

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
        if count > n and not self.checkpoint.model.config.embed_dim:
            raise PlaitError(f"best_of compares embeddings. {NO_SPACE}")
        samples = self.write([self.context([text])], column, n=count, **options)[0]
        if count > n:
            vectors = self.embed_inputs([text, *((column, sample) for sample in samples)])
            order = np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")[:n]
            samples = [samples[i] for i in order]
        return [self.modality(column).to_object(sample) for sample in samples]


def joined_segments(segments: list[Segment]) -> list[Segment]:
    """Segments that hold something; neighbours with one text are one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and segment.text == merged[-1].text and merged[-1].end == segment.start:
            merged[-1] = Segment(merged[-1].start, segment.end, segment.text)
        elif segment.text.strip():
            merged.append(segment)
    return merged


def joined(texts: list[str]) -> str:
    """The texts of windows that overlap, as one: what two neighbours agree on is written once."""
    return " ".join(text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1])
