"""The one type of model: what every model answers, whoever computes it, and what it can do.

Two kinds of models stand behind it: those that run in Plait's engine (`plait.inference.model`) and those that
transformers runs (`plait.hf.pretrained`). A caller asks for a capability, never for a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack, overload

import numpy as np
from PIL import Image as PILImage

from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.inference.results import Estimate, Predictions
from plait.inference.sampling import Options
from plait.modalities.inputs import inputs_of

if TYPE_CHECKING:
    from plait.inference.decisions import Decision, Question
    from plait.inference.model import PlaitModel


class Verb(StrEnum):
    """What models can do. Features have verbs of their own beside these."""

    GENERATE = "generate"
    CLASSIFY = "classify"
    DESCRIBE = "describe"
    TRANSCRIBE = "transcribe"
    DRAW = "draw"
    SPEAK = "speak"
    EMBED = "embed"


class Explainer(Protocol):
    """How answers are explained; a feature adds it. Arguments are those of `Model.explain`."""

    def __call__(
        self, model: Model, value: Any, answer: Any, *, to: str, column: str | None, labels: list[str] | None,
        template: str | None, method: str, steps: int | None, seed: int,
    ) -> Any: ...  # fmt: skip


EXPLAINERS: ExtensionPoint[Explainer] = ExtensionPoint("explainer")


class Model:
    """A model at work on a device.

    An input is a text, the path of a media file (a str or a Path), its bytes, a PIL image, an array of pixels (H, W) or
    (H, W, C), a tensor (C, H, W), or (waveform, rate). A verb that the model lacks raises PlaitError and names those
    that it has.

    Attributes:
        name: What messages call it.
        folder: The checkpoint's folder that it was loaded from, if any.
        device: Where it runs, and in which precision.
    """

    name: str = "This model"
    folder: Path | None = None
    device: Device
    embed_batch: int = 16  # inputs that `embed` is best given at a time

    # --- capabilities -----------------------------------------------------------------------------------------------

    @property
    def verbs(self) -> list[str]:
        """What this model can do: `Verb`s, and those of features."""
        raise NotImplementedError

    @property
    def offered_verbs(self) -> list[str]:
        """The verbs to offer to people and programs: those whose answers mean something."""
        return self.verbs

    @property
    def plait_model(self) -> PlaitModel | None:
        """This model where it runs in Plait's engine, which knows columns, sequences and requests; else None."""
        return None

    @property
    def columns(self) -> dict[str, str]:
        """Column -> modality, in the data's order; none for a model that knows no columns."""
        return {}

    @property
    def labels(self) -> dict[str, list[str]]:
        """Text column -> its few distinct values; none for a model that knows no columns."""
        return {}

    @property
    def modalities(self) -> set[str]:
        """The modalities that it embeds or reads."""
        return {"text", "image"}

    def require(self, verb: str) -> None:
        """Raise PlaitError where the model lacks a verb."""
        if verb not in self.verbs:
            raise self._lacks(verb)

    def window_count(self, value: Any) -> int:
        """How many windows an input is read in; 1 where the model reads it at once, or cuts it itself."""
        return 1

    def prepared(self, kind: str, value: Any) -> Any:
        """A decoded medium of a modality in the form in which this model takes it; small where it can be."""
        return value

    def moments(self, kind: str, value: Any) -> list[tuple[float | None, float | None, Any]]:
        """A decoded medium as the parts that a search tells apart: from when to when, in seconds (None: the whole), and
        what `embed_inputs` takes."""
        return [(None, None, self.prepared(kind, value))]

    # --- verbs ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        *,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        n: int | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """What follows a prompt; a list where several results are asked for. `max_length` counts the prompt's tokens
        too."""
        raise self._lacks(Verb.GENERATE)

    @overload
    def classify(
        self, value: list[Any], labels: list[str] | None = None, column: str | None = None, top: int | None = 5,
        **options: Any,
    ) -> list[Predictions]: ...  # fmt: skip

    @overload
    def classify(
        self, value: Any, labels: list[str] | None = None, column: str | None = None, top: int | None = 5,
        **options: Any,
    ) -> Predictions: ...  # fmt: skip

    def classify(
        self, value: Any, labels: list[str] | None = None, column: str | None = None, top: int | None = 5,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The likeliest labels of an input, each with its probability, likeliest first.

        Args:
            value: An input. A str that names a file is that file; a folder stands for the files in it, a list for a
                batch, and both are answered by a list.
            labels: What to choose between; the values that the column had in training if left out.
            column: The text column to answer in; the first that has labels if left out.
            top: How many labels to give; all if None.
            options: Of this model alone: `template`, for models that compare images with texts.

        Raises PlaitError where a file does not exist or cannot be read, and where there are no labels.
        """
        inputs = inputs_of(value)
        answers = self.classify_inputs(inputs.values, labels, column, top, **options)
        return answers if inputs.several else answers[0]

    def classify_inputs(
        self, inputs: list[Any], labels: list[str] | None = None, column: str | None = None, top: int | None = 5,
    ) -> list[Predictions]:  # fmt: skip
        """`classify` for inputs as they are: a str is a text, whatever it looks like."""
        raise self._lacks(Verb.CLASSIFY)

    def estimate(self, value: Any, column: str | None = None) -> Any:
        """The number that a column holds for an input, with its error bars; a list for a list or a folder."""
        raise PlaitError(f"{self.name} predicts no numbers. A run does whose data have a column of numbers.")

    def estimate_inputs(self, inputs: list[Any], column: str | None = None) -> list[Estimate]:
        """`estimate` for inputs as they are: a str is a text, whatever it looks like."""
        raise PlaitError(f"{self.name} predicts no numbers. A run does whose data have a column of numbers.")

    @property
    def answer_labels(self) -> dict[str, list[str]]:
        """Column -> labels, of the columns with one label a record and of those with several."""
        return self.labels

    def level_probabilities(self, value: Any, column: str, levels: Sequence[float]) -> list[float]:
        """How likely each of some numbers is the nearest to the one that a column holds for an input."""
        raise PlaitError(f"{self.name} predicts no numbers. A run does whose data have a column of numbers.")

    @property
    def several(self) -> list[str]:
        """The columns in which a record has several labels."""
        return []

    @property
    def numbers(self) -> list[str]:
        """The columns of numbers that it predicts."""
        return []

    def classify_together(
        self, value: Any, labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> Predictions:
        """The likeliest labels of an input as it is, or of a list of inputs that are read in order as one."""
        values = value if isinstance(value, list) else [value]
        if len(values) != 1:
            raise PlaitError(f"{self.name} classifies one input at a time. Send one part.")
        return self.classify_inputs(values, labels, column, top)[0]

    def decide(self, value: Any, questions: Sequence[Question]) -> list[Decision]:
        """Answers to typed questions about an input (`plait.inference.decisions`), each with probabilities or refused;
        a list of inputs is read in order."""
        from plait.inference.decisions import decide

        return decide(self, value, questions)

    def describe(self, image: Any, column: str | None = None, *, max_new_tokens: int | None = None) -> str:
        """What the model writes about an image: a PIL image, an array, bytes, or a file's path."""
        raise self._lacks(Verb.DESCRIBE)

    def transcribe(
        self,
        audio: Any,
        column: str | None = None,
        *,
        language: str | None = None,
        task: str = "transcribe",
        max_new_tokens: int | None = None,
    ) -> str:
        """The words of an audio clip: (waveform, rate), bytes, or a file's path; `language` for a model that knows
        several, and for one that translates into English the `task` "translate"."""
        raise self._lacks(Verb.TRANSCRIBE)

    def segments(
        self, audio: Any, language: str | None = None, task: str = "transcribe", words: bool = False
    ) -> list[Any]:
        """What is said when in an audio clip: `start`, `end` in seconds, `text`, and with `words` each word's times.
        For models that tell times."""
        raise PlaitError(f"{self.name} does not tell times. Use a Whisper, or leave --times out.")

    def draw(
        self,
        text: str,
        n: int = 1,
        best_of: int | None = None,
        column: str | None = None,
        *,
        guidance: float | None = None,
        seed: int = 0,
    ) -> list[PILImage.Image]:
        """n images of what a text says."""
        raise self._lacks(Verb.DRAW)

    def speak(
        self,
        text: str,
        n: int = 1,
        best_of: int | None = None,
        column: str | None = None,
        *,
        guidance: float | None = None,
        seed: int = 0,
    ) -> list[tuple[np.ndarray, int]]:
        """n audio clips, (waveform, rate), of what a text says."""
        raise self._lacks(Verb.SPEAK)

    def embed(self, inputs: Any, prompt: str | None = None) -> np.ndarray:
        """The embedding of an input, (E,) float32, of unit length.

        Args:
            inputs: An input, as `classify` takes it. A list, or a folder, has the embeddings (N, E) of its inputs.
            prompt: One of the prompts that some text encoders have, as "query".

        Raises PlaitError where a file does not exist or cannot be read.
        """
        parsed = inputs_of(inputs)
        vectors = self.embed_inputs(parsed.values, prompt)
        return vectors if parsed.several else vectors[0]

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The embeddings (N, E) of inputs as they are: a str is a text, whatever it looks like."""
        raise self._lacks(Verb.EMBED)

    def explain(
        self,
        value: Any,
        answer: Any = None,
        *,
        to: str = "text",
        column: str | None = None,
        labels: list[str] | None = None,
        template: str | None = None,
        method: str = "occlusion",
        steps: int | None = None,
        seed: int = 0,
    ) -> Any:
        """How much each part of an input, or of a list of them read in order, moved an answer.

        Args:
            value: An input, or a list of inputs.
            answer: A text: a label, against the column's others or `labels`, or a text by its likelihood; after a text
                of a model without columns, what follows as it is spelt. With `to` a modality or column of media it is
                such a medium, and explained is which of the prompt's words it depends on where. None: the model's own.
            to: "text", or what is made of a prompt.
            column: The column of the answer.
            labels: The answers to choose between.
            template: A sentence with {} for a label, for models that compare images with texts.
            method: occlusion, integrated-gradients or logit-lens.
            steps: Of integrated gradients; None for as many as it takes.
            seed: Of what is drawn.

        Returns:
            A `plait.explain.methods.Explanation`.
        """
        return EXPLAINERS.one()(
            self,
            value,
            answer,
            to=to,
            column=column,
            labels=labels,
            template=template,
            method=method,
            steps=steps,
            seed=seed,
        )

    def _lacks(self, verb: str) -> PlaitError:
        return PlaitError(f"{self.name} cannot {verb}; it can {' and '.join(self.verbs)}. Use another model for that.")
