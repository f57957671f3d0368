"""Measures as pure functions on numpy arrays; higher-level tasks put error bars on them with `bootstrap`.

Shapes: N samples, C classes, Q queries, G gallery, E width of features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# --- error bars -------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, *, draws: int = 200, seed: int = 0, cells: int = 2**22
) -> float:
    """Standard error of a statistic of n samples, from `draws` resamples with replacement.

    `statistic` takes indices (R, n) and returns (R,), one value for each resample; at most `cells` indices exist at
    one time. Returns nan where n is 0 or no resample has a finite value.
    """
    if n == 0:
        return math.nan
    random = np.random.default_rng(seed)
    step = max(cells // n, 1)
    values = [
        np.asarray(statistic(random.integers(0, n, (min(step, draws - start), n))), float)
        for start in range(0, draws, step)
    ]
    flat = np.concatenate(values)
    flat = flat[np.isfinite(flat)]
    return float(flat.std(ddof=1)) if len(flat) > 1 else math.nan


def mean_with_error(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Mean of (N,) values and its bootstrap standard error; nan for none. Where all are right, or all wrong, resamples
    tell nothing: the error is that of two more of each (Agresti and Coull, 1998)."""
    values = np.asarray(values, float)
    if not len(values):
        return math.nan, math.nan
    if (values == values[0]).all() and values[0] in (0.0, 1.0):
        share = (values.sum() + 2) / (len(values) + 4)
        return float(values[0]), math.sqrt(share * (1 - share) / (len(values) + 4))
    return float(values.mean()), bootstrap(lambda rows: values[rows].mean(1), len(values), seed=seed)


Z = 1.96  # standard errors of a normal distribution that hold 95 %


def interval(value: float, stderr: float, n: float | None, is_share: bool) -> tuple[float, float]:
    """The 95 % interval of a figure: Wilson's for shares of 1, which never leaves [0, 1], of as many records as the
    standard error speaks of; for others that of a normal distribution."""
    if not is_share or not 0 <= value <= 1:
        return value - Z * stderr, value + Z * stderr
    spread = value * (1 - value)
    count = spread / stderr**2 if spread > 0 and stderr > 0 else float(n or 1)
    centre = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(spread / count + Z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def ratio_with_error(top: np.ndarray, bottom: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """sum(top) / sum(bottom) over N samples (errors over words, nats over tokens), with its standard error."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    if not bottom.sum():
        return math.nan, math.nan

    def statistic(rows: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return top[rows].sum(1) / bottom[rows].sum(1)

    return float(top.sum() / bottom.sum()), bootstrap(statistic, len(top), seed=seed)


# --- classification ---------------------------------------------------------------------------------------------


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) counts, rows the truth and columns the prediction."""
    cells = np.bincount(np.asarray(truth) * classes + np.asarray(predicted), minlength=classes**2)
    return cells.reshape(classes, classes)


@dataclass(frozen=True)
class Classification:
    """Figures of one classifier; per-class arrays are (C,), 0 where a class was never predicted or never there."""

    accuracy: float
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    macro_precision: float  # over the classes that occur in the truth or the predictions
    macro_recall: float
    macro_f1: float
    confusion: np.ndarray


def _rates(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and presence, each (..., C), of confusion matrices (..., C, C)."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    predicted, actual = confusion.sum(-2), confusion.sum(-1)
    precision = right / np.maximum(predicted, 1)
    recall = right / np.maximum(actual, 1)
    f1 = 2 * right / np.maximum(predicted + actual, 1)
    return precision, recall, f1, (predicted + actual) > 0


def classification(truth: np.ndarray, predicted: np.ndarray, classes: int) -> Classification:
    """Accuracy, per-class and macro figures of integer labels (N,) below `classes`."""
    confusion = confusion_matrix(truth, predicted, classes)
    precision, recall, f1, present = _rates(confusion)
    total = max(confusion.sum(), 1)

    def macro(values: np.ndarray) -> float:
        return float(values[present].mean()) if present.any() else math.nan

    return Classification(
        float(np.trace(confusion) / total),
        precision,
        recall,
        f1,
        macro(precision),
        macro(recall),
        macro(f1),
        confusion,
    )


def macro_errors(truth: np.ndarray, predicted: np.ndarray, classes: int, *, seed: int = 0) -> dict[str, float]:
    """Bootstrap standard errors of macro precision, recall and f1."""
    cells = np.asarray(truth) * classes + np.asarray(predicted)
    n, errors = len(cells), {}

    def table(rows: np.ndarray) -> list[np.ndarray]:
        offset = np.arange(len(rows))[:, None] * classes**2
        counts = np.bincount((cells[rows] + offset).ravel(), minlength=len(rows) * classes**2)
        *rates, present = _rates(counts.reshape(len(rows), classes, classes))
        return [(rate * present).sum(1) / np.maximum(present.sum(1), 1) for rate in rates]

    budget = max(2**22 // max(n, classes**2), 1) * n  # with many classes the tables, not the rows, are large
    for place, name in enumerate(("precision", "recall", "f1")):
        errors[name] = bootstrap(lambda rows, at=place: table(rows)[at], n, seed=seed, cells=budget)  # type: ignore[misc]
    return errors


def calibration(
    believed: np.ndarray, right: np.ndarray, bins: int = 10
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Expected calibration error (Guo, Pleiss, Sun and Weinberger, 2017) of answers with probabilities believed (N,),
    right (N,) bool; and of each bin of equal width the mean belief, the share right (nan where empty) and the count."""
    place = np.minimum((believed * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, believed, bins) / counts
        share = np.bincount(place, right.astype(float), bins) / counts
    error = float(np.nansum(np.abs(mean - share) * counts) / max(len(believed), 1))
    return error, mean, share, counts


def risk_coverage(believed: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of answers that is given, (N,) ascending, where only the surest are, and the share of these that is
    right (N,); answers have probabilities believed (N,)."""
    order = np.argsort(-np.asarray(believed), kind="stable")
    answered = np.arange(1, len(order) + 1)
    return answered / max(len(order), 1), np.cumsum(np.asarray(right, float)[order]) / answered


# --- text -------------------------------------------------------------------------------------------------------


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Least number of insertions, deletions and substitutions that turn `a` into `b` (Levenshtein, 1966)."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def error_rates(truth: list[str], written: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ "cer" and "wer" -> (errors, length of the truth), each (N,): characters, and words between white space.

    A rate is errors.sum() / lengths.sum(), as `ratio_with_error` does it; it may exceed 1.
    """
    pairs = list(zip(truth, written, strict=True))
    characters = np.array([edit_distance(a, b) for a, b in pairs], int)
    words = np.array([edit_distance(a.split(), b.split()) for a, b in pairs], int)
    return {
        "cer": (characters, np.array([len(a) for a in truth], int)),
        "wer": (words, np.array([len(a.split()) for a in truth], int)),
    }


def bits_per_byte(nats: float, texts: list[str]) -> float:
    """Bits a UTF-8 byte, given the sum of -log P in nats of these texts; nan where they are empty."""
    size = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / size if size else math.nan


# --- retrieval --------------------------------------------------------------------------------------------------


def retrieval(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevant: Callable[[int, int], np.ndarray],
    cutoffs: tuple[int, ...] = (1, 5, 10),
    chunk: int = 512,
) -> dict[str, np.ndarray]:
    """Per-query figures by inner product of queries (Q, E) and gallery (G, E), ties in the gallery's order.

    `relevant(start, stop)` is the boolean relevance (stop - start, G) of these queries. Returns "r_at_k" for each
    cutoff (1 where one of the first k is relevant), "p_at_k" for the largest (share of the first k), "relevant" (how
    many of the gallery are), each (Q,) float, and "top" (Q, k) int, the best first. A query with nothing relevant
    scores 0: leave such queries out beforehand.
    """
    deepest = min(max(cutoffs), len(gallery))
    hits = np.zeros((len(queries), deepest), bool)
    top = np.zeros((len(queries), deepest), int)
    counts = np.zeros(len(queries))
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        similarity = queries[start:stop] @ gallery.T
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :deepest]
        related = relevant(start, stop)
        top[start:stop], hits[start:stop] = best, np.take_along_axis(related, best, 1)
        counts[start:stop] = related.sum(1)
    recall = {f"r_at_{k}": hits[:, :k].any(1).astype(float) for k in cutoffs}
    return {**recall, f"p_at_{max(cutoffs)}": hits.mean(1) if deepest else counts, "relevant": counts, "top": top}


def retrieval_chance(relevant: np.ndarray, gallery: int, k: int) -> tuple[float, float]:
    """What a random order gives on average: (R@k, P@k), from each query's count of relevant entries (Q,)."""
    k = min(k, gallery)
    relevant = np.asarray(relevant, float)
    miss = np.ones(len(relevant))
    for place in range(k):
        miss *= np.maximum(gallery - relevant - place, 0) / (gallery - place)
    return float((1 - miss).mean()), float((relevant / gallery).mean())


# --- images, audio clips, codes ------------------------------------------------------------------------------------


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features (N, E) and (M, E), each of at least two rows.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the last trace being the sum of the root eigenvalues of
    A^(1/2) B A^(1/2), which is symmetric (Dowson and Landau, 1982).
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2 or len(b) < 2:
        return math.nan
    first, second = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()
    return float(max(distance, 0.0))


def pairwise_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances (N, M) between rows of (N, E) and (M, E)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(squares.clip(min=0))


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of two different samples of one class, averaged over the classes that have two; nan for none."""
    distances = []
    for label in np.unique(labels):
        rows = features[labels == label]
        if len(rows) > 1:
            distances.append(pairwise_distance(rows, rows).sum() / (len(rows) * (len(rows) - 1)))
    return float(np.mean(distances)) if distances else math.nan


def diversity(generated: np.ndarray, made_labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Spread of what was made as a ratio to the real one, over the classes that both have; 1 is as varied."""
    shared = np.intersect1d(made_labels, real_labels)
    own, other = np.isin(made_labels, shared), np.isin(real_labels, shared)
    ground = spread(real[other], real_labels[other])
    return spread(generated[own], made_labels[own]) / ground if ground else math.nan


def nearest(queries: np.ndarray, gallery: np.ndarray, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Distance (Q,) to the nearest row of the gallery, and which it is (Q,); rows are flattened."""
    flat = np.asarray(gallery, np.float32).reshape(len(gallery), -1)
    lengths = np.square(flat).sum(1)
    distances, places = np.zeros(len(queries)), np.zeros(len(queries), int)
    for start in range(0, len(queries), chunk):
        rows = np.asarray(queries[start : start + chunk], np.float32).reshape(-1, flat.shape[1])
        best = (lengths - 2 * rows @ flat.T).argmin(1)
        places[start : start + chunk] = best
        # Taken again from the rows themselves: the difference of large squares loses small distances.
        distances[start : start + chunk] = np.sqrt(np.square(rows - flat[best]).sum(1))
    return distances, places


def code_use(codes: np.ndarray, size: int) -> tuple[float, float]:
    """Share of the `size` codes that occur, and the perplexity of how often, as a share of `size` too."""
    counts = np.bincount(np.asarray(codes).ravel(), minlength=size)[:size]
    if not counts.sum():
        return math.nan, math.nan
    share = counts[counts > 0] / counts.sum()
    return float((counts > 0).mean()), float(np.exp(-(share * np.log(share)).sum()) / size)
