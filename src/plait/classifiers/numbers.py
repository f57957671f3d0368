"""Numbers predicted from features, with error bars: ridge regression, linear or by a kernel, whichever is nearer on
validation records; the error bars are what was left over there (split conformal prediction; Lei and others, 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.classifiers.classifier import Features
from plait.classifiers.held_out import WIDTH, fourier_features

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean squared feature, tried in this order
QUANTILES = 201  # of what is left over that are kept
COVERAGE = 0.9  # of the interval that is told
KERNEL = 377  # seed of the kernel's random features


@dataclass
class Numbers:
    """What predicts the column `target` from `source`.

    `weights` (F + 1,) read the features, or where `kernel` their random Fourier features, and a constant. `residuals`
    are quantiles of truth minus prediction on `records` of validation, in equal steps of probability.
    """

    source: str
    target: str
    features: Features
    weights: np.ndarray
    kernel: bool
    residuals: np.ndarray
    low: float  # the interval around a prediction
    high: float
    measured: dict[str, float] = field(default_factory=dict)  # mean absolute error on val: "mean", "ridge", "kernel"
    records: int = 0

    def predict(self, inputs: Sequence[Any]) -> np.ndarray:
        """(N,)."""
        return apply_ridge(expand(self.features(inputs), self.kernel), self.weights)

    def level_probabilities(self, value: float, levels: Sequence[float]) -> np.ndarray:
        """How likely each of some values is the nearest to the truth, given a prediction."""
        distance = np.abs(value + self.residuals[:, None] - np.asarray(levels)[None])
        counts = np.bincount(distance.argmin(1), minlength=len(levels)) + 1 / len(levels)
        return np.asarray(counts / counts.sum())


def expand(features: Any, kernel: bool) -> Any:
    """Features as the regression reads them."""
    return fourier_features(np.asarray(features, np.float32), KERNEL, WIDTH) if kernel else features


def apply_ridge(features: Any, weights: np.ndarray) -> np.ndarray:
    """What weights (F + 1,), the last of which is a constant, predict of features (N, F): (N,)."""
    return np.asarray(features @ weights[:-1] + weights[-1], np.float64)


def fit_ridge(features: Any, values: np.ndarray, ridge: float) -> np.ndarray:
    """Weights (F + 1,) by least squares with a penalty of `ridge` times the records' number on their squares."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=ridge * features.shape[0], solver="auto")
    model.fit(features, values)
    return np.concatenate([np.asarray(model.coef_, np.float64).ravel(), [float(model.intercept_)]])


def fit_numbers(
    source: str, target: str, features: Features, rows: Any, values: np.ndarray, held_rows: Any, held: np.ndarray
) -> Numbers:
    """Fit on records, choose on held-out ones. `rows` are features of the records, `values` (N,) their numbers."""
    by_log: dict[bool, tuple[float, np.ndarray]] = {}
    for kernel in (False,) if features.grams is not None else (False, True):
        inputs, others = expand(rows, kernel), expand(held_rows, kernel)
        for ridge in RIDGES:
            weights = fit_ridge(inputs, values, ridge)
            error = float(np.abs(apply_ridge(others, weights) - held).mean())
            if kernel not in by_log or error < by_log[kernel][0]:
                by_log[kernel] = error, weights
    kernel = min(by_log, key=lambda one: by_log[one][0])
    error, weights = by_log[kernel]
    left = held - apply_ridge(expand(held_rows, kernel), weights)
    measured = {"mean": float(np.abs(held - values.mean()).mean()), "ridge": by_log[False][0]}
    measured |= {"kernel": by_log[True][0]} if True in by_log else {}
    low, high = interval(left, COVERAGE)
    residuals = np.quantile(left, np.linspace(0, 1, QUANTILES))
    return Numbers(source, target, features, weights, kernel, residuals, low, high, measured, len(held))


def interval(left: np.ndarray, coverage: float) -> tuple[float, float]:
    """What to add to a prediction for an interval that holds the truth as often as `coverage`: the quantiles of what
    was left over, taken as far out as a new record beside these (N,) needs."""
    order, n = np.sort(left), len(left)
    tail = (1 - coverage) / 2
    below = int(np.floor((n + 1) * tail)) - 1
    above = int(np.ceil((n + 1) * (1 - tail))) - 1
    return float(order[max(below, 0)]), float(order[min(above, n - 1)])
