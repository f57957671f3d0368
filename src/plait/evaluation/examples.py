"""Records as classifiers are fitted on them: inputs with their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.classifiers.classifier import Features
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.inference.model import PlaitModel

RNG_STREAM = 311  # of the random numbers of `uniform`


@dataclass
class Examples:
    """Inputs (texts, or samples), the class of each, and the numbers of their records."""

    inputs: list[Any]
    classes: np.ndarray
    indices: np.ndarray

    def only(self, places: np.ndarray) -> Examples:
        """Those at these places."""
        return Examples([self.inputs[i] for i in places], self.classes[places], self.indices[places])

    def __add__(self, others: Examples) -> Examples:
        classes, indices = ([getattr(self, name), getattr(others, name)] for name in ("classes", "indices"))
        return Examples(self.inputs + others.inputs, np.concatenate(classes), np.concatenate(indices))

    def __len__(self) -> int:
        return len(self.inputs)


def read_examples(
    model: PlaitModel, dataset: Dataset, source: str, target: str, split: str, most: int, seed: int
) -> Examples:
    """Records of a split that have both columns, at most so many, drawn by the seed."""
    number = {label: place for place, label in enumerate(model.labels[target])}
    answers = dataset.texts(target)
    indices = np.array([i for i in dataset.indices(split) if answers[i] in number], np.int64)
    if len(indices) > most:
        indices = np.sort(indices[np.argsort(uniform(seed, RNG_STREAM, indices), kind="stable")[:most]])
    inputs: list[Any] = []
    classes, present = [], []
    for index, record in zip(indices, dataset.iterate(indices, [source]), strict=True):
        value = record.parts.get(source)
        if value is None:
            continue
        inputs.append(value if isinstance(value, str) else model.modality(source).windows(value)[0])
        classes.append(number[answers[index]])
        present.append(index)
    return Examples(inputs, np.array(classes, np.int64), np.array(present, np.int64))


def feature_rows(features: Features, examples: Examples, mirrored: bool) -> tuple[Any, np.ndarray]:
    """Features and classes to fit on; where mirrored images mean the same, these too."""
    rows = features(examples.inputs)
    if not mirrored:
        return rows, examples.classes
    other = features([value[:, ::-1] for value in examples.inputs])
    return np.concatenate([rows, other]), np.concatenate([examples.classes] * 2)
