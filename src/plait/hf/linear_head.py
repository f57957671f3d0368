"""A multinomial logistic regression over features, whose strength and temperature are chosen on records that it has not
seen.

Shapes: N records, V views of each, F features, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plait.classifiers.mixture import cross_entropy, log_softmax, softened, temperature
from plait.core.rng import uniform

STRENGTHS = {"text": (1.0, 3.0, 10.0, 30.0, 100.0), "image": (1e-3, 1e-2, 1e-1), "audio": (1e-3, 1e-2, 1e-1)}
FEW = 20  # records of val below which folds of train say which strength is best
FOLDS = 5
RNG_STREAM = 341  # of the random numbers of `uniform`


@dataclass
class Head:
    """Log-probabilities of labels from features: softmax((x - mean) / scale @ weights + bias), times `heat`, of scores
    averaged over the views of an input. Features are (N, V F)."""

    labels: list[str]
    weights: np.ndarray  # (F, C)
    bias: np.ndarray  # (C,)
    mean: np.ndarray  # (F,)
    scale: np.ndarray  # (F,)
    heat: float
    centres: np.ndarray  # (C, F) mean of each label's records
    familiar: np.ndarray  # of validation records, ascending: how near the nearest centre is

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, C), in nats."""
        return log_softmax(self.heat * self.scores(self.standard(features)))

    def standard(self, features: np.ndarray) -> np.ndarray:
        """(N, V, F), each feature of mean 0 and spread 1 over train."""
        return np.asarray((features.reshape(len(features), -1, len(self.mean)) - self.mean) / self.scale)

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """(N, C) of standardised views (N, V, F)."""
        return np.asarray((rows @ self.weights + self.bias).mean(1), np.float64)

    def unlike(self, features: np.ndarray) -> np.ndarray:
        """(N,), the share of validation records that look more familiar."""
        near = nearness(self.standard(features)[:, 0], self.centres)
        return 1 - np.searchsorted(self.familiar, near) / max(len(self.familiar), 1)


def nearness(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The cosine of each row (N, F) with the nearest centre (C, F)."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (rows, centres)]
    nearest: np.ndarray = (unit[0] @ unit[1].T).max(1)
    return nearest


@dataclass
class Examples:
    """Features of records and the number of each one's label."""

    features: np.ndarray
    classes: np.ndarray


def fit_head(
    labels: list[str], train: Examples, val: Examples, kind: str, names: np.ndarray | None, seed: int, views: int = 1
) -> tuple[Head, dict[str, float], np.ndarray]:
    """A head, how right it is on records that it has not seen, and its log-probabilities (N, C) of these: those of val,
    or where they are few, folds.

    `names` (C, F) are embeddings of the labels' own texts, which count as one more record of each.
    """
    width = train.features.shape[1] // views
    mean, scale = np.zeros(width), np.ones(width)
    if kind != "text":
        flat = train.features.reshape(-1, width)
        mean, scale = flat.mean(0), flat.std(0) + 1e-3
    rows, val_rows = ((part.features.reshape(-1, views, width) - mean) / scale for part in (train, val))

    def fitted(x: np.ndarray, y: np.ndarray, strength: float) -> Head:
        """Of views (N, V, F) and classes (N,)."""
        x, y = x.reshape(-1, width), y.repeat(views)
        if names is not None:
            x, y = np.concatenate((x, names)), np.concatenate((y, np.arange(len(labels))))
        weights, bias = _regression(x, y, len(labels), strength)
        return Head(labels, weights, bias, mean, scale, 1.0, np.zeros((0, 0)), np.zeros(0))

    unseen: dict[float, tuple[np.ndarray, np.ndarray]] = {}  # strength -> scores and truth
    for strength in STRENGTHS[kind]:
        if len(val.classes) >= FEW:
            unseen[strength] = fitted(rows, train.classes, strength).scores(val_rows), val.classes
        else:
            unseen[strength] = _by_folds(fitted, rows, train.classes, strength, len(labels), seed)
    best, heat, measured = _best(unseen, len(labels))
    all_rows, all_classes = rows, train.classes
    if len(val.classes):
        all_rows, all_classes = np.concatenate((rows, val_rows)), np.concatenate((train.classes, val.classes))
    head = fitted(all_rows, all_classes, best)
    head.heat = heat
    one_hot = np.eye(len(labels), dtype=np.float32)[all_classes]
    head.centres = (one_hot.T @ all_rows[:, 0]) / np.maximum(one_hot.sum(0), 1)[:, None]
    head.familiar = np.sort(nearness((val_rows if len(val.classes) >= FEW else rows)[:, 0], head.centres))
    return head, measured | {"strength": best}, log_softmax(heat * unseen[best][0])


def _best(unseen: dict[float, tuple[np.ndarray, np.ndarray]], count: int) -> tuple[float, float, dict[str, float]]:
    """The strength under which unseen labels are likeliest once calibrated, that factor, and what it is worth."""
    trials = []
    for strength, (scores, truth) in unseen.items():
        if not len(truth):
            return 10.0 if 10.0 in unseen else strength, 1.0, {}
        targets = softened(truth, count)
        heat = temperature(scores, targets)
        right = float((scores.argmax(1) == truth).mean())
        trials.append((right, -cross_entropy(scores * heat, targets), strength, heat, len(truth)))
    right, likelihood, strength, heat, records = max(trials)
    return strength, heat, {"accuracy": right, "records": records, "nats": -likelihood}


def _by_folds(
    fitted: Callable[[np.ndarray, np.ndarray, float], Head],
    rows: np.ndarray,
    classes: np.ndarray,
    strength: float,
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of train's records by heads that have not seen them; none where labels have a single record."""
    if np.bincount(classes, minlength=count).max() < 2:
        return np.zeros((0, count)), np.zeros(0, np.int64)
    fold = (uniform(seed, RNG_STREAM, np.arange(len(rows))) * FOLDS).astype(int)
    scores = np.zeros((len(rows), count))
    for number in range(FOLDS):
        other = fold != number
        if other.all() or len(np.unique(classes[other])) < 2:
            continue
        scores[~other] = fitted(rows[other], classes[other], strength).scores(rows[~other])
    return scores, classes


def _regression(rows: np.ndarray, classes: np.ndarray, count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C) and bias (C,) of a multinomial logistic regression; labels without a record stay far below."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(rows.astype(np.float32), classes)
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:  # two labels
        weights, bias = np.concatenate((-weights / 2, weights / 2), 1), np.concatenate((-bias / 2, bias / 2))
    all_weights, offset = np.zeros((rows.shape[1], count), np.float32), np.full(count, -20.0)
    all_weights[:, model.classes_], offset[model.classes_] = weights, bias
    return all_weights, offset
