"""Several opinions about one input as one calibrated answer: a weighted sum of scores, whose weights are fitted on
validation records so that probabilities are honest; and how familiar an input looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

PULL = 4.0  # records' worth of belief that all opinions count alike
QUANTILES = 201  # of the familiarity of validation records that are kept
UNFAMILIAR = 0.98  # ood_score from which an input is none of the labels


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """(N, C) to log-probabilities."""
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@dataclass
class Mixture:
    """Weights of opinions, by name, and the familiarity of validation records.

    `weights` multiply the scores of each opinion; their size is the calibration (what a temperature does for one).
    `centres` and `spreads` are of each opinion's largest score on validation records; `quantiles` of the sum of these,
    centred, scaled and weighted by the opinion's share: the familiarity.
    """

    weights: dict[str, float]
    centres: dict[str, float]
    spreads: dict[str, float]
    quantiles: list[float]
    threshold: float = UNFAMILIAR

    @property
    def used(self) -> list[str]:
        """The opinions that count."""
        return [name for name, weight in self.weights.items() if weight > 0]

    def partial(self, names: list[str]) -> Mixture:
        """The same without the opinions that are not named; the weight of these goes to what is left."""
        whole, left = (sum(self.weights[name] * self.spreads[name] for name in some) for some in (self.used, names))
        weights = {name: self.weights[name] * whole / max(left, 1e-9) for name in names}
        return Mixture(weights, self.centres, self.spreads, self.quantiles, self.threshold)

    def log_probabilities(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Opinion -> (N, C), all that count among them, to (N, C)."""
        return log_softmax(np.sum([self.weights[name] * scores[name] for name in self.used], axis=0))

    def familiarity(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """(N,), around 0 for what is like validation records, the larger the more familiar."""
        total = sum(self.weights[name] * self.spreads[name] for name in self.used)
        return sum(self.weights[name] / total * (scores[name].max(1) - self.centres[name]) for name in self.used)

    def ood_scores(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """(N,) in [0, 1]: the share of validation records that look more familiar."""
        return 1 - np.searchsorted(self.quantiles, self.familiarity(scores), side="right") / len(self.quantiles)


def temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    """The factor of scores (N, C) under which the truth (N,) is likeliest."""
    grid = np.geomspace(0.02, 50, 60)
    rows = np.arange(len(truth))
    losses = [-log_softmax(scores * factor)[rows, truth].mean() for factor in grid]
    return float(grid[int(np.argmin(losses))])


def fit_mixture(scores: dict[str, np.ndarray], truth: np.ndarray) -> Mixture:
    """Fit on validation records: opinion -> scores (N, C), and the right class (N,) of each.

    Each opinion is calibrated alone first; then all weights are fitted together by likelihood, drawn by a few
    records' worth towards shares that go by how likely each opinion alone makes the truth. Where they are together not
    more often right than the best opinion alone, that one is taken. An opinion that adds nothing
    gets the weight 0 and need not be asked.
    """
    names, rows = list(scores), np.arange(len(truth))
    stack = np.stack([scores[name] for name in names])
    alone = np.array([temperature(scores[name], truth) for name in names])
    losses = np.array([-log_softmax(stack[i] * alone[i])[rows, truth].mean() for i in range(len(names))])
    trust = np.exp(-(losses - losses.min()))
    prior = trust / trust.sum()

    def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.tensordot(shares * alone, stack, 1))
        off = np.exp(logs)
        off[rows, truth] -= 1
        gradient = (stack * off).sum((1, 2)) * alone + 2 * PULL * (shares - prior)
        return float(-logs[rows, truth].sum() + PULL * ((shares - prior) ** 2).sum()), gradient

    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(names))
    shares = np.where(found.x < 0.02 * found.x.max(), 0.0, found.x)
    best = int(losses.argmin())

    def right(weights: np.ndarray) -> float:
        return float((np.tensordot(weights * alone, stack, 1).argmax(1) == truth).mean())

    single = np.eye(len(names))[best]
    if right(shares) <= right(single):  # the others do not help
        shares = single
    weights = {name: float(share * factor) for name, share, factor in zip(names, shares, alone, strict=True)}
    highest = {name: scores[name].max(1) for name in names}
    mixture = Mixture(
        weights,
        {name: float(value.mean()) for name, value in highest.items()},
        {name: float(value.std()) + 1e-6 for name, value in highest.items()},
        [],
    )
    familiar = mixture.familiarity(scores)
    mixture.quantiles = np.quantile(familiar, np.linspace(0, 1, min(QUANTILES, len(truth)))).tolist()
    return mixture
