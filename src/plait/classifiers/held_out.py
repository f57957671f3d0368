"""What a simple model says of records that it has not seen: the scores of each record by a model of all the others.

For features that are dense the leave-one-out scores of a ridge regression on random Fourier features (Rahimi and Recht,
2007) have a closed form; for sparse ones a few folds are fitted in turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from plait.classifiers.linear import fit_linear
from plait.classifiers.mixture import log_softmax, softened, temperature

WIDTH = 2000  # random features
BANDWIDTH = 0.5  # of the kernel, in units of the mean squared distance of standardised features
RIDGE = 0.3  # of the regression
FOLDS, STRENGTH = 4, 0.1  # of linear models on sparse features


def held_out_log_probabilities(features: Any, classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Log-probabilities (N, count) of each record's class by a model that has not seen the record.

    `features` (N, F) are standardised where dense; `classes` (N,) may be wrong in places: the scale of the scores is
    fitted to them by likelihood, so the probabilities are of the labels as they are given.
    """
    from scipy.sparse import issparse

    scores = (_by_folds if issparse(features) else _leave_one_out)(features, classes, count, seed)
    return log_softmax(scores * temperature(scores, softened(classes, count)))


def _leave_one_out(features: np.ndarray, classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(N, count): f_i without record i is (f_i - h_i y_i) / (1 - h_i), h the diagonal of the hat matrix."""
    from scipy.linalg import cho_factor, solve_triangular

    mapped = fourier_features(np.asarray(features, np.float32), seed, min(WIDTH, max(len(features), 8)))
    gram = (mapped.T @ mapped).astype(np.float64)
    gram[np.diag_indices_from(gram)] += RIDGE
    lower, _ = cho_factor(gram, lower=True, overwrite_a=True)
    reduced = solve_triangular(lower, mapped.T.astype(np.float64), lower=True, overwrite_b=True)  # (D, N)
    leverage = np.square(reduced).sum(0)[:, None]
    one_hot = np.eye(count)[classes]
    fitted = reduced.T @ (reduced @ one_hot)
    return np.asarray((fitted - leverage * one_hot) / (1 - leverage).clip(1e-6))


def fourier_features(features: np.ndarray, seed: int, width: int) -> np.ndarray:
    """(N, F) to (N, width), whose inner products are about those of a Gaussian kernel."""
    rng = np.random.default_rng(seed)
    scale = np.sqrt(BANDWIDTH / features.shape[1])
    directions = (rng.normal(size=(features.shape[1], width)) * scale).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, width).astype(np.float32)
    mapped: np.ndarray = np.cos(features @ directions + phases) * np.float32(np.sqrt(2 / width))
    return mapped


def stratified_folds(classes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) the fold of each record, below `folds`: those of each class are dealt out in turn, in a drawn order."""
    order = np.random.default_rng(seed).permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    fold = np.empty(len(classes), np.int64)
    fold[order] = np.arange(len(classes)) % folds
    return fold


def _by_folds(features: Any, classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(N, count) of linear models, each fitted without the fold that it is asked of."""
    fold = np.random.default_rng(seed).permutation(len(classes)) % FOLDS
    scores = np.zeros((len(classes), count))
    for number in range(FOLDS):
        here = fold == number
        scores[here] = fit_linear(features[~here], classes[~here], count, STRENGTH, False)(features[here])
    return scores
