"""Several labels a record: a probability for each label on its own, and the threshold from which it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.classifiers.classifier import Features
from plait.classifiers.linear import Linear

STRENGTHS = (0.1, 0.3, 1.0)  # of a linear SVM on n-grams
DENSE_STRENGTHS = (3e-4, 3e-3)  # on other features
MOST_TRIED = 15_000  # training records that the strength is chosen with
PULL = 5.0  # of a label's offset towards none, in squared nats
BELIEF = 20.0  # records with a label by which its threshold goes half by what is seen, half by what is believed


@dataclass
class SeveralLabels:
    """What decides which of `labels` of the column `target` hold, from the column `source`.

    The probability of label k is sigmoid(slope * score_k + offset_k), fitted on validation records; it is said from
    `thresholds[k]` on. `measured` tells what `records` of validation showed.
    """

    source: str
    target: str
    labels: list[str]
    features: Features
    linear: Linear
    slope: float
    offsets: np.ndarray
    thresholds: np.ndarray
    measured: dict[str, float] = field(default_factory=dict)
    records: int = 0

    def probabilities(self, inputs: Sequence[Any]) -> np.ndarray:
        """(N, labels)."""
        scores = self.linear(self.features(inputs))
        return np.asarray(1 / (1 + np.exp(-(scores * self.slope + self.offsets))))


def fit_each(features: Any, truth: np.ndarray, strength: float) -> Linear:
    """A linear SVM a label. `truth` (N, labels) is bool; labels that no record or all have get a fixed score."""
    from sklearn.svm import LinearSVC

    weights = np.zeros((features.shape[1], truth.shape[1]), np.float32)
    bias = np.zeros(truth.shape[1])
    for place, column in enumerate(truth.T):
        if column.all() or not column.any():
            bias[place] = 3.0 if column.any() else -3.0
            continue
        model = LinearSVC(C=strength, max_iter=2000).fit(features, column)
        weights[:, place], bias[place] = model.coef_[0], model.intercept_[0]
    return Linear(weights, bias)


def fit_several(
    features: Any, truth: np.ndarray, held_features: Any, held: np.ndarray, strengths: Sequence[float]
) -> tuple[Linear, float, np.ndarray, np.ndarray, dict[str, float]]:
    """The linear model, slope, offsets (labels,), thresholds (labels,) and what was measured on held-out records."""
    tried = np.arange(len(truth))[:: max(-(-len(truth) // MOST_TRIED), 1)]
    best, chosen = -1.0, strengths[0]
    for strength in strengths if len(strengths) > 1 else ():
        scores = fit_each(features[tried], truth[tried], strength)(held_features)
        slope, offsets = calibrate(scores, held)
        chances = sigmoid(scores * slope + offsets)
        score = macro_f1(held, chances >= thresholds_of(chances, held))
        if score > best:
            best, chosen = score, strength
    linear = fit_each(features, truth, chosen)
    scores = linear(held_features)
    slope, offsets = calibrate(scores, held)
    chances = sigmoid(scores * slope + offsets)
    thresholds = thresholds_of(chances, held)
    measured = {"macro_f1": macro_f1(held, chances >= thresholds), "micro_f1": micro_f1(held, chances >= thresholds)}
    return linear, slope, offsets, thresholds, measured


def calibrate(scores: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The slope of all labels together and the offset of each, by likelihood, offsets drawn towards 0."""
    from scipy.optimize import minimize

    truth = targets.astype(float)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offsets = values[0], values[1:]
        logits = scores * slope + offsets
        off = sigmoid(logits) - truth
        value = np.logaddexp(0, logits).sum() - (logits * truth).sum() + (offsets**2).sum() / (2 * PULL)
        return float(value), np.concatenate([[(off * scores).sum()], off.sum(0) + offsets / PULL])

    fitted = minimize(loss, np.concatenate([[2.0], np.zeros(scores.shape[1])]), jac=True, method="L-BFGS-B").x
    return float(max(fitted[0], 1e-3)), fitted[1:]


def thresholds_of(chances: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The threshold (labels,) of each label by its F1: of few records half by what is seen, half by the calibrated
    probabilities themselves, which are less of a draw."""
    thresholds = np.full(chances.shape[1], 0.5)
    for place in range(chances.shape[1]):
        there = float(targets[:, place].sum())
        belief = there / (there + BELIEF)
        order = np.argsort(-chances[:, place], kind="stable")
        sorted_ = chances[order, place]
        truth = belief * targets[order, place] + (1 - belief) * sorted_
        f1 = 2 * np.cumsum(truth) / (np.arange(1, len(truth) + 1) + max(truth.sum(), 1e-9))
        best = int(f1.argmax())
        below = sorted_[best + 1] if best + 1 < len(sorted_) else sorted_[best]
        thresholds[place] = (sorted_[best] + below) / 2
    return thresholds


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), elementwise."""
    return np.asarray(1 / (1 + np.exp(-values)))


def f1_scores(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 of each label, (labels,); 0 where it is neither there nor said."""
    both = (truth & predicted).sum(0)
    return np.asarray(2 * both / np.maximum(truth.sum(0) + predicted.sum(0), 1))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 of the labels that occur in truth or answers."""
    occurs = (truth | predicted).any(0)
    return float(f1_scores(truth, predicted)[occurs].mean()) if occurs.any() else 0.0


def micro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of all decisions together."""
    return float(2 * (truth & predicted).sum() / max(truth.sum() + predicted.sum(), 1))
