"""An input in units that can be taken away, and what a method asks of a model about it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from plait.core.errors import PlaitError
from plait.modalities.base import cells
from plait.modalities.text import words

Value = str | np.ndarray | None  # a part with some of its units, or gone as a whole


class Sampled(Protocol):
    """What a modality knows of its samples; see `plait.modalities.base.MediaModality`."""

    @property
    def occluded(self) -> Sequence[tuple[int, int]]: ...

    def grid(self, sample: np.ndarray) -> tuple[int, int]: ...

    def removed(self, sample: np.ndarray) -> np.ndarray: ...

    def spot(self, sample: np.ndarray, row: int, column: int) -> str: ...

    def marked(self, sample: np.ndarray, weights: np.ndarray | None) -> PILImage.Image: ...


@dataclass
class Words:
    """A text; its units are words, which are left out."""

    text: str
    name: str = "text"
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.text = unicodedata.normalize("NFC", self.text)
        self.words = words(self.text)
        if not self.text.strip():
            raise PlaitError("The text is empty: there is nothing to remove. Give one with a word or more.")

    @property
    def count(self) -> int:
        """How many words there are."""
        return len(self.words)

    def kept(self, keep: np.ndarray) -> str:
        """The text with only the words where keep (count,) is true."""
        text = "".join(word for word, stays in zip(self.words, keep, strict=True) if stays)
        return text if keep[0] else text.lstrip()

    def occluders(self) -> np.ndarray:
        """Which units are taken away together, (M, count) bool: each word alone."""
        return np.eye(self.count, dtype=bool)

    def spot(self, unit: int) -> str:
        return self.words[unit].strip()

    def owners(self, stops: list[int]) -> np.ndarray:
        """The word that each token belongs to, given where in the text it ends (T,)."""
        ends = np.cumsum([len(word) for word in self.words])
        return np.searchsorted(ends, np.maximum(np.array(stops) - 1, 0), side="right").clip(max=self.count - 1)


@dataclass
class Grid:
    """An image or an audio clip; its units are regions of a grid, which become what the modality says is nothing."""

    sample: np.ndarray
    modality: Sampled
    name: str  # the modality's
    column: str = ""
    shape: tuple[int, int] = field(init=False)
    cells: np.ndarray = field(init=False)  # (sample's first two dimensions) the unit of each place
    baseline: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.modality.grid(self.sample)
        self.cells = cells((self.sample.shape[0], self.sample.shape[1]), self.shape)
        self.baseline = self.modality.removed(self.sample)
        if np.array_equal(self.baseline, self.sample):
            raise PlaitError(f"The {self.name} is the same all over: there is nothing to remove. Give another.")

    @property
    def count(self) -> int:
        """How many regions there are."""
        return self.shape[0] * self.shape[1]

    def kept(self, keep: np.ndarray) -> np.ndarray:
        """The sample with only the regions where keep (count,) is true."""
        there = keep[self.cells].reshape(*self.cells.shape, *(1,) * (self.sample.ndim - 2))
        return np.where(there, self.sample, self.baseline)

    def occluders(self) -> np.ndarray:
        """Which units are taken away together, (M, count) bool: each window of regions of the modality's sizes, so that
        a cause on the border of regions goes as a whole; windows reach over the edges, so that all regions count
        alike."""
        row, column = np.divmod(np.arange(self.count), self.shape[1])
        windows = [
            (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
            for height, width in self.modality.occluded
            for top in range(1 - height, self.shape[0])
            for left in range(1 - width, self.shape[1])
        ]
        return np.unique(np.array(windows), axis=0)

    def spot(self, unit: int) -> str:
        return self.modality.spot(self.sample, *divmod(unit, self.shape[1]))

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Values (sample's shape) added up by region, (count,)."""
        flat = values.reshape(*self.cells.shape, -1).sum(-1)
        return np.bincount(self.cells.ravel(), flat.ravel(), self.count)

    def marked(self, weights: np.ndarray) -> PILImage.Image:
        """The sample as an image, marked by weights (count,) in [-1, 1]."""
        return self.modality.marked(self.sample, weights[self.cells])

    def unmarked(self) -> PILImage.Image:
        """The sample as an image, as the model reads it."""
        return self.modality.marked(self.sample, None)


Part = Words | Grid


def unmasked(parts: Sequence[Part]) -> list[Value]:
    """The values of parts from which nothing is taken."""
    return [part.text if isinstance(part, Words) else part.sample for part in parts]


@dataclass
class IntegrationPath:
    """From an input with nothing in it to the input itself, as tensors of one row, for gradients."""

    score: Callable[..., Tensor]  # tensors (n, ...) -> (n,)
    inputs: tuple[Tensor, ...]  # (1, ...) each
    baseline: tuple[Tensor, ...]
    by_unit: Callable[[list[np.ndarray]], list[np.ndarray]]  # what each tensor is worth, without n -> (units,) by part


class Question(Protocol):
    """What is asked of a model: its parts, the answer, and the answer's score for what is left of the parts."""

    @property
    def parts(self) -> Sequence[Part]: ...

    @property
    def answer(self) -> str: ...

    @property
    def measure(self) -> str:
        """What scores are: "log-odds" against the other labels, "log-likelihood", or "similarity"."""
        ...

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        """The answer's score, (N,) float64, for each list of values, one a part."""
        ...

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """Scores as what an area is taken of: a probability, or of a log-likelihood the mean one of a token."""
        ...

    def path(self) -> IntegrationPath:
        """Raises PlaitError where there is none."""
        ...

    def layers(self) -> list[dict[str, Any]]:
        """What each layer would say: its number, the answer's probability and rank among all tokens, the likeliest
        tokens. Raises PlaitError where that means nothing."""
        ...


class CodesQuestion(Question, Protocol):
    """A question whose answer is codes of a sample."""

    @property
    def written(self) -> Grid: ...

    def shown(self) -> tuple[tuple[int, int], np.ndarray]:
        """The grid that the codes make, and (codes, cells) where each of them shows."""
        ...

    def by_code(self, inputs: list[list[Value]]) -> np.ndarray:
        """log P of each code, (N, codes)."""
        ...


def log_odds(scores: np.ndarray, place: int) -> np.ndarray:
    """Of one of several answers against all others, (N,), from their log-likelihoods (N, A)."""
    others = np.delete(scores, place, 1)
    top = others.max(1)
    return np.asarray(scores[:, place] - top - np.log(np.exp(others - top[:, None]).sum(1)))
