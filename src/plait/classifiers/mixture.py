"""Several opinions about one input as one calibrated answer: a weighted sum of scores, whose weights are fitted on
validation records so that probabilities are honest; and how familiar an input looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PULL = 4.0  # records' worth of belief that all opinions count alike
DOUBT = 4.0  # records that are counted as wrong beside those of validation
FEW = 100  # validation records that are few
FEWEST_TOP = 100  # validation records from which the likeliest class is calibrated on its own
QUANTILES = 201  # of the familiarity of validation records that are kept
UNFAMILIAR = 0.98  # ood_score from which an input is none of the labels
FEWEST_FAMILIAR = 20  # validation records below which none is


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
    slope: float = 1.0  # of the log-odds of the likeliest class, and what is added: see `fit_top`
    offset: float = 0.0

    @property
    def used(self) -> list[str]:
        """The opinions that count."""
        return [name for name, weight in self.weights.items() if weight > 0]

    def partial(self, names: list[str]) -> Mixture:
        """The same without the opinions that are not named; the weight of these goes to what is left."""
        total_spread, left = (
            sum(self.weights[name] * self.spreads[name] for name in opinions) for opinions in (self.used, names)
        )
        weights = {name: self.weights[name] * total_spread / max(left, 1e-9) for name in names}
        return Mixture(weights, self.centres, self.spreads, self.quantiles, self.threshold, self.slope, self.offset)

    def log_probabilities(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Opinion -> (N, C), all that count among them, to (N, C)."""
        logs = log_softmax(np.sum([self.weights[name] * scores[name] for name in self.used], axis=0))
        return logs if (self.slope, self.offset) == (1.0, 0.0) else _with_top(logs, self.slope, self.offset)

    def fit_top(self, scores: dict[str, np.ndarray], truth: np.ndarray) -> None:
        """Make the probability of the likeliest class honest on validation records, by the log-odds of being right.

        One factor for all scores cannot: with many classes it either leaves too much to the unlikely ones, or too
        little. Where there are few records nothing is changed.
        """
        logs = self.log_probabilities(scores)
        if len(truth) >= FEWEST_TOP and logs.shape[1] > 2:
            self.slope, self.offset = _top_calibration(np.exp(logs.max(1)), logs.argmax(1) == truth)

    def familiarity(self, scores: dict[str, np.ndarray], novelty: Sequence[np.ndarray] = ()) -> np.ndarray:
        """(N,), around 0 for what is like validation records, the larger the more familiar: how sure the opinions are,
        less how unlike training records the input lies, view by view (`classifiers.novelty`)."""
        total = sum(self.weights[name] * self.spreads[name] for name in self.used)
        sure = sum(self.weights[name] / total * (scores[name].max(1) - self.centres[name]) for name in self.used)
        return np.asarray(sure - sum(novelty, np.zeros(1)))

    def ood_scores(self, scores: dict[str, np.ndarray], novelty: Sequence[np.ndarray] = ()) -> np.ndarray:
        """(N,) in [0, 1): the share of validation records that look more familiar, the input counted as one of them.
        Of n records no input can have more than n / (n + 1)."""
        familiar = self.familiarity(scores, novelty)
        return 1 - (1 + np.searchsorted(self.quantiles, familiar, side="right")) / (1 + len(self.quantiles))

    def fit_quantiles(self, scores: dict[str, np.ndarray], novelty: Sequence[np.ndarray] = ()) -> None:
        """Note how familiar validation records look. Of few records the threshold is what they can show: less familiar
        than all of them. Fewer than FEWEST_FAMILIAR show nothing."""
        familiar = self.familiarity(scores, novelty)
        if len(familiar) >= FEWEST_FAMILIAR:
            self.threshold = min(UNFAMILIAR, len(familiar) / (len(familiar) + 1) - 1e-9)
        self.quantiles = np.quantile(familiar, np.linspace(0, 1, min(QUANTILES, len(familiar)))).tolist()


def softened(truth: np.ndarray, classes: int) -> np.ndarray:
    """The right classes (N,) as targets (N, C) that leave room for doubt: as if DOUBT more records had been wrong. So
    opinions that are right on all of few records are not believed without limit."""
    doubt = DOUBT / (len(truth) + DOUBT) if classes > 1 else 0.0
    targets = np.full((len(truth), classes), doubt / max(classes - 1, 1))
    targets[np.arange(len(truth)), truth] = 1 - doubt
    return targets


def temperature(scores: np.ndarray, targets: np.ndarray) -> float:
    """The factor of scores (N, C) under which targets (N, C) are likeliest."""
    grid = np.geomspace(0.02, 50, 60)
    losses = [cross_entropy(scores * factor, targets) for factor in grid]
    return float(grid[int(np.argmin(losses))])


def cross_entropy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over records, in nats."""
    return float(-(targets * log_softmax(scores)).sum(1).mean())


def fit_mixture(scores: dict[str, np.ndarray], truth: np.ndarray) -> Mixture:
    """Fit on validation records: opinion -> scores (N, C), and the right class (N,) of each.

    Each opinion is calibrated alone first; then all weights are fitted together by likelihood, drawn by a few
    records' worth towards shares that go by how likely each opinion alone makes the truth. Where the best opinion
    alone is clearly more often right than all together, that one is taken: by more than one paired standard error, two
    where records are few, since opinions that err apart are worth more together on records that differ from these. An
    opinion that adds nothing gets the weight 0 and need not be asked.
    """
    from scipy.optimize import minimize  # takes as long to import as half of torch

    names = list(scores)
    stack = np.stack([scores[name] for name in names])
    targets = softened(truth, stack.shape[2])
    alone = np.array([temperature(scores[name], targets) for name in names])
    losses = np.array([cross_entropy(stack[i] * alone[i], targets) for i in range(len(names))])
    trust = np.exp(-(losses - losses.min()))
    prior = trust / trust.sum()

    def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.tensordot(shares * alone, stack, 1))
        off = np.exp(logs) - targets
        gradient = (stack * off).sum((1, 2)) * alone + 2 * PULL * (shares - prior)
        return float(-(targets * logs).sum() + PULL * ((shares - prior) ** 2).sum()), gradient

    fitted = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(names))
    shares = np.where(fitted.x < 0.02 * fitted.x.max(), 0.0, fitted.x)
    single = np.eye(len(names))[int(losses.argmin())]
    lead = _right(stack, single * alone, truth) - _right(stack, shares * alone, truth)
    sure = 1 + min(FEW / len(lead), 1.0)  # few records deceive
    if lead.mean() > sure * lead.std() / len(lead) ** 0.5:  # the others do harm
        shares = single
    weights = {name: float(share * factor) for name, share, factor in zip(names, shares, alone, strict=True)}
    highest = {name: scores[name].max(1) for name in names}
    mixture = Mixture(
        weights,
        {name: float(value.mean()) for name, value in highest.items()},
        {name: float(value.std()) + 1e-6 for name, value in highest.items()},
        [],
    )
    mixture.fit_quantiles(scores)
    mixture.fit_top(scores, truth)
    return mixture


def _top_calibration(chances: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the log-odds of the likeliest class, by likelihood, drawn a little towards no change."""
    from scipy.optimize import minimize

    odds, truth = _log_odds(chances), right.astype(float)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = values[0] * odds + values[1]
        off = 1 / (1 + np.exp(-logits)) - truth
        pull = values - np.array([1.0, 0.0])
        value = np.logaddexp(0, logits).sum() - (logits * truth).sum() + PULL * (pull**2).sum() / 2
        return float(value), np.array([(off * odds).sum(), off.sum()]) + PULL * pull

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0.1, 10), (-5, 5)]).x
    return float(slope), float(offset)


def _log_odds(chances: np.ndarray) -> np.ndarray:
    clipped = chances.clip(1e-9, 1 - 1e-9)
    return np.log(clipped) - np.log1p(-clipped)


def _with_top(logs: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """Log-probabilities (N, C) whose likeliest class has another probability, and the others the rest in proportion. It
    stays the likeliest."""
    rows, best = np.arange(len(logs)), logs.argmax(1)
    chances = np.exp(logs)
    top = chances[rows, best].clip(1e-9, 1 - 1e-9)
    others = chances.copy()
    others[rows, best] = 0
    second = others.max(1)
    calibrated = 1 / (1 + np.exp(-(slope * _log_odds(top) + offset)))
    calibrated = np.maximum(calibrated, second / (1 - top + second) * (1 + 1e-9)).clip(1e-9, 1 - 1e-9)
    rescaled = others * ((1 - calibrated) / (1 - top))[:, None]
    rescaled[rows, best] = calibrated
    return np.asarray(np.log(rescaled.clip(1e-300)))


def _right(stack: np.ndarray, weights: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) 1 where the weighed opinions (O, N, C) together are right, else 0."""
    return (np.tensordot(weights, stack, 1).argmax(1) == truth).astype(float)
