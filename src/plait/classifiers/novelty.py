"""How unlike all that was learnt an input is, by where it lies among training records.

By dense features (simple ones, or what a network's heads read): the distance to the nearest class in the space in which
training records vary, whitened by how records of one class vary there (Lee and others, 2018), how much of the input
lies outside that space, and the distance to the nearest record by direction in the whitened space (after Sun and
others, 2022). The three are standardised on validation records, so that they can be added; the last one counts as much
as the other two together. Words that were never heard are told by it: what they share with each class, they share with
no record of it. Texts need none of it: the largest score of a linear model on n-grams tells more (CLINC150: .950,
beside .905 by the nearest class's mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DIMENSIONS = 64  # of the space in which training records vary, at most
SHRINKAGE = 0.05  # of the variance of a class towards the same in all directions
MOST = 8000  # records that it is fitted on
KEPT = 2000  # records that an input is compared with
WEIGHTS = np.array([0.5, 0.5, 1.0])  # of the nearest class, of what lies outside, of the nearest record
CLIP = 30.0  # standard deviations beyond which nothing is told apart


@dataclass
class Novelty:
    """One view of an input. `arrays` are what was fitted; `centre` and `spread` (3,) those of its measures on
    validation records."""

    arrays: dict[str, np.ndarray]
    centre: np.ndarray
    spread: np.ndarray

    def __call__(self, features: Any) -> np.ndarray:
        """(N,), the larger the more unlike; about 0 for what is like validation records."""
        return self.standardised(self.measures(features))

    def standardised(self, measured: np.ndarray) -> np.ndarray:
        """Measures (N, 3) as one, (N,)."""
        standard: np.ndarray = ((measured - self.centre) / self.spread).clip(-CLIP, CLIP) @ WEIGHTS
        return standard

    def measures(self, features: Any) -> np.ndarray:
        """(N, 3): the distance to the nearest class, what lies outside, the distance to the nearest record, as
        logarithms."""
        centred = np.asarray(features, np.float32) - self.arrays["mean"]
        inside = centred @ self.arrays["basis"]
        white = inside @ self.arrays["whitening"]
        square = (white**2).sum(1)[:, None] - 2 * white @ self.arrays["centres"].T
        distance = (square + (self.arrays["centres"] ** 2).sum(1)).min(1).clip(1e-9)
        outside = ((centred**2).sum(1) - (inside**2).sum(1)).clip(1e-9)
        alike = (_directions(white) @ self.arrays["records"].T).max(1)
        return np.log(np.stack([distance, outside, (1 - alike).clip(1e-3)], 1))


def fit_novelty(features: np.ndarray, classes: np.ndarray, held: np.ndarray) -> Novelty:
    """Fit on training records (N, F) with their classes (N,); standardise on held-out ones."""
    step = max(-(-len(classes) // MOST), 1)
    arrays = _subspace(np.asarray(features, np.float32)[::step], classes[::step])
    made = Novelty(arrays, np.zeros(3), np.ones(3))
    measured = made.measures(held)
    made.centre, made.spread = measured.mean(0), measured.std(0) + 1e-3
    return made


def novelty_by_folds(features: np.ndarray, classes: np.ndarray, fold: np.ndarray) -> tuple[Novelty, np.ndarray]:
    """Fit on all records; standardise on what is measured of each (N,) by the records of the other folds. Returns how
    unlike these each of them looks, too."""
    measured = np.zeros((len(classes), 3))
    for number in np.unique(fold):
        here = fold == number
        rest = _subspace(np.asarray(features[~here], np.float32), classes[~here])
        measured[here] = Novelty(rest, np.zeros(3), np.ones(3)).measures(features[here])
    made = Novelty(_subspace(np.asarray(features, np.float32), classes), measured.mean(0), measured.std(0) + 1e-3)
    return made, made.standardised(measured)


def _subspace(features: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    mean = features.mean(0)
    centred = features - mean
    size = int(min(DIMENSIONS, centred.shape[1], max(len(centred) // 4, 2)))
    values, vectors = np.linalg.eigh((centred.T @ centred / len(centred)).astype(np.float64))
    basis = vectors[:, np.argsort(-values)[:size]].astype(np.float32)
    inside = centred @ basis
    names, place = np.unique(classes, return_inverse=True)
    means = np.stack([inside[place == number].mean(0) for number in range(len(names))])
    within = np.cov((inside - means[place]).T).reshape(size, size)
    within += np.eye(size) * (SHRINKAGE * np.trace(within) / size + 1e-6)
    values, vectors = np.linalg.eigh(within)
    whitening = (vectors / np.sqrt(values)).astype(np.float32)
    step = max(-(-len(features) // KEPT), 1)
    return {
        "mean": mean, "basis": basis, "whitening": whitening, "centres": (means @ whitening).astype(np.float32),
        "records": _directions(inside[::step] @ whitening),
    }  # fmt: skip


def _directions(white: np.ndarray) -> np.ndarray:
    """Rows (N, D) of unit length."""
    directions: np.ndarray = white / np.linalg.norm(white, axis=1, keepdims=True).clip(1e-9)
    return directions.astype(np.float32)
