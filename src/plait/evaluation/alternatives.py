"""The simple alternatives that a model is measured beside: as a good practitioner makes them, and quick."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from plait.classifiers.classifier import Classifier, Features
from plait.classifiers.linear import fit_linear
from plait.classifiers.mixture import Mixture
from plait.modalities.media import MEDIA

MOST = 5000  # records that an alternative is fitted on where the run has none
MEDIA_STRENGTH, TEXT_STRENGTH = 3e-3, 0.3  # of the linear SVM, on dense features and on n-grams
ORDER = 6  # characters that an n-gram model looks back
LONGEST = 2_000_000  # bytes that it learns from


def alternative_name(kind: str) -> str:
    """What the simple alternative for inputs of a kind is called, for people."""
    return MEDIA[kind].simple_model if kind in MEDIA else "word and character n-grams and a linear SVM"


def fit_alternative(
    kind: str, inputs: Sequence[object], classes: np.ndarray, labels: list[str], bands: int
) -> Classifier:
    """Simple features and a linear SVM, on inputs (texts or samples) with their classes."""
    features = Features.fit(kind, inputs, bands)
    strength = MEDIA_STRENGTH if kind in MEDIA else TEXT_STRENGTH
    linear = fit_linear(features(inputs), classes, len(labels), strength, False)
    return Classifier("", "", labels, features, linear, Mixture({}, {}, {}, []))


class GramModel:
    """Bytes predicted from up to ORDER bytes before, interpolated by Witten and Bell (1991)."""

    def __init__(self, text: bytes) -> None:
        data = np.frombuffer(text[-LONGEST:], np.uint8).astype(np.uint64)
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # keys, followers, kinds of followers
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []  # keys of context and byte, counts
        for order in range(ORDER + 1):
            context, pair = _keys(data, order)
            pairs, first, counts = np.unique(pair, return_index=True, return_counts=True)
            owners, place = np.unique(context[first], return_inverse=True)
            kinds = np.bincount(place)
            total = np.bincount(place, counts)
            self.contexts.append((owners, total, kinds))
            self.pairs.append((pairs, counts))

    def nats(self, text: bytes) -> float:
        """-log P of a text, in all."""
        data = np.frombuffer(text, np.uint8).astype(np.uint64)
        chance = np.full(len(data), 1 / 256)
        for order in range(min(ORDER, len(data) - 1) + 1):
            context, pair = _keys(data, order)
            total, kinds = (_look_up(context, self.contexts[order][0], values) for values in self.contexts[order][1:])
            count = _look_up(pair, *self.pairs[order])
            lower = chance[order:]
            known = total > 0
            chance[order:] = np.where(known, (count + kinds * lower) / np.maximum(total + kinds, 1), lower)
        return float(-np.log(chance).sum())


def _keys(data: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """For each byte from place `order` on: a key of the bytes before it, and of these and itself. At most seven bytes,
    so that keys are exact."""
    size = len(data) - order
    context = np.full(size, 1, np.uint64)  # a leading one tells lengths apart
    for k in range(order):
        context = (context << np.uint64(8)) | data[k : k + size]
    return context, (context << np.uint64(8)) | data[order:]


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key, 0 where it is not known."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def paired_error(first: np.ndarray, second: np.ndarray) -> float:
    """The standard error of the mean difference of two figures on the same records."""
    difference = first.astype(float) - second.astype(float)
    return float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
