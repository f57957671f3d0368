"""Linear classifiers on dense features and on n-grams of texts; fitted by scikit-learn, kept as arrays and JSON."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.classifiers.mixture import log_softmax, softened, temperature

# scikit-learn is imported where it fits or reads texts: that takes longer than torch, and media need none of it.
if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

# Strengths of a linear SVM, in the order in which they are tried: where time is short, the first ones alone.
STRENGTHS = (0.3, 1.0, 0.1, 3.0)  # on n-grams
UNEVEN_STRENGTHS = (0.1, 0.03, 0.3, 1.0)  # on n-grams, where some classes have far more records than others
DENSE_STRENGTHS = (1e-3, 3e-3, 3e-4, 1e-4)
UNEVEN = 3  # times the records of the median class that the largest one has, from which classes are uneven
AGAIN = 1.3  # times a fit on train that the last one takes, on train and val
MOST_GRAMS = 2**16  # n-grams of one kind that are kept, by the weight that they have
WORD_GRAMS, CHARACTER_GRAMS = (1, 2), (2, 5)


@dataclass
class Linear:
    """Scores (N, classes) = features @ weights + bias."""

    weights: np.ndarray  # (F, classes) float32
    bias: np.ndarray  # (classes,)

    def __call__(self, features: Any) -> np.ndarray:
        return np.asarray(features @ self.weights + self.bias, np.float64)


def fit_linear(features: Any, labels: np.ndarray, classes: int, strength: float, balanced: bool) -> Linear:
    """A linear SVM, one class against the rest. Classes without a record get a score below all others."""
    from sklearn.svm import LinearSVC

    model = LinearSVC(C=strength, class_weight="balanced" if balanced else None, max_iter=2000)
    with warnings.catch_warnings():  # of few records of many classes, which are classes all the same
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(features, labels)
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:  # two classes
        weights, bias = np.concatenate([-weights, weights], 1), np.concatenate([-bias, bias])
    padded = np.zeros((weights.shape[0], classes), np.float32)
    offset = np.full(classes, -3.0)
    padded[:, model.classes_], offset[model.classes_] = weights, bias
    return Linear(padded, offset)


@dataclass(frozen=True)
class LinearChoice:
    """How a linear SVM is fitted: its strength, whether classes are balanced; the model on train, and the strengths
    that there was no time to try."""

    strength: float
    balanced: bool
    linear: Linear
    untried: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Trial:
    """What a strength shows on held-out records: the mean of accuracy and macro F1, and of each record (N,) how good
    its answer is, the larger the better."""

    score: float
    strength: float
    balanced: bool
    linear: Linear
    gains: np.ndarray

    def surely_worse_than(self, best: _Trial) -> bool:
        """By more than a standard error of the difference, record by record."""
        lost = best.gains - self.gains
        return bool(lost.mean() > lost.std() / len(lost) ** 0.5)


def choose_linear(
    features: Any, labels: np.ndarray, held_features: Any, held_labels: np.ndarray, classes: int, sparse: bool,
    seconds: float = math.inf,
) -> LinearChoice:  # fmt: skip
    """The strength, and whether to balance classes, by held-out records: the least strength that is not surely worse
    than the best, since new records differ more from train than these do.

    Where classes of texts are even, the best is the one under which the right labels are likeliest, its scores
    calibrated: many strengths name as many of them right, and that one is the surest where it is right. Else it is the
    one with the best mean of accuracy and macro F1, each class counting half by its records and half as one among
    others: a likelihood hardly sees small classes.

    Args:
        features, labels: Of train, (N, F) and (N,).
        held_features, held_labels: Of held-out records.
        classes: How many there are.
        sparse: Whether features are n-grams of texts.
        seconds: Of a processor that this may take together with the last fit; one strength is tried in any case.
    """
    counts = np.bincount(labels, minlength=classes)
    uneven = bool(counts.max() > UNEVEN * max(np.median(counts), 1))
    strengths = (UNEVEN_STRENGTHS if uneven else STRENGTHS) if sparse else DENSE_STRENGTHS
    trials: list[_Trial] = []
    begun = time.process_time()
    for strength in strengths:
        started = time.process_time()
        for balanced in (False, True) if uneven else (False,):
            linear = fit_linear(features, labels, classes, strength, balanced)
            scores = linear(held_features)
            score, gains = _judged(scores, held_labels, by_likelihood=sparse and not uneven)
            trials.append(_Trial(score, strength, balanced, linear, gains))
        took, used = time.process_time() - started, time.process_time() - begun
        if used + (1 + AGAIN) * took > seconds:
            break
    tried = {one.strength for one in trials}
    chosen = max(trials, key=lambda one: (one.score, one.strength)).balanced
    alike = [one for one in trials if one.balanced == chosen]
    best = max(alike, key=lambda one: float(one.gains.mean()))
    taken = min((one for one in alike if not one.surely_worse_than(best)), key=lambda one: one.strength)
    return LinearChoice(taken.strength, chosen, taken.linear, tuple(one for one in strengths if one not in tried))


def _judged(scores: np.ndarray, labels: np.ndarray, by_likelihood: bool) -> tuple[float, np.ndarray]:
    """The `score` and `gains` of a trial by its scores (N, classes) of held-out records."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = scores.argmax(1)
    score = (accuracy_score(labels, predicted) + f1_score(labels, predicted, average="macro")) / 2
    if by_likelihood:
        logs = log_softmax(scores * temperature(scores, softened(labels, scores.shape[1])))
        return score, logs[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=scores.shape[1])
    share = 0.5 + 0.5 * len(labels) / (np.count_nonzero(counts) * counts[labels])
    return score, share * (predicted == labels)


@dataclass
class NgramFeatures:
    """TF-IDF of the n-grams of characters within words, and beside them of words, unless there are so few records that
    hardly a word stands in two of them."""

    vectorizers: list[TfidfVectorizer]

    @classmethod
    def fit(cls, texts: Sequence[str], words: bool = True) -> NgramFeatures:
        """Fit on texts; without `words` on characters alone."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        least = 1 if len(texts) < 2000 else 2
        word_options = {"sublinear_tf": True, "min_df": least, "token_pattern": r"(?u)\b\w+\b"}
        options = {"sublinear_tf": True, "min_df": least, "max_features": 4 * MOST_GRAMS}
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=CHARACTER_GRAMS, **options)
        grams = cls([TfidfVectorizer(ngram_range=WORD_GRAMS, **word_options)] * words + [characters])
        for vectorizer in grams.vectorizers:
            vectorizer.fit(texts)
        return grams

    def __call__(self, texts: Sequence[str]) -> Any:
        from scipy.sparse import hstack

        return hstack([vectorizer.transform(texts) for vectorizer in self.vectorizers]).tocsr()

    def pruned(self, linear: Linear) -> tuple[NgramFeatures, Linear]:
        """Without the n-grams that weigh least, so that what is kept on disk stays small."""
        kept, rows, start = [], [], 0
        for vectorizer in self.vectorizers:
            terms = vectorizer.get_feature_names_out()
            norms = np.abs(linear.weights[start : start + len(terms)]).max(1) * vectorizer.idf_
            chosen = np.sort(np.argsort(-norms, kind="stable")[:MOST_GRAMS])
            kept.append(_vectorizer(_settings(vectorizer), terms[chosen].tolist(), vectorizer.idf_[chosen]))
            rows.append(start + chosen)
            start += len(terms)
        return NgramFeatures(kept), Linear(linear.weights[np.concatenate(rows)], linear.bias)

    def facts(self) -> list[dict[str, Any]]:
        """Settings and terms, for JSON; `arrays` has the rest."""
        return [
            {"settings": _settings(vectorizer), "terms": vectorizer.get_feature_names_out().tolist()}
            for vectorizer in self.vectorizers
        ]

    def arrays(self) -> list[np.ndarray]:
        """The weight of each term, an array a vectorizer."""
        return [np.asarray(vectorizer.idf_, np.float32) for vectorizer in self.vectorizers]

    @classmethod
    def restore(cls, facts: list[dict[str, Any]], arrays: list[np.ndarray]) -> NgramFeatures:
        return cls(
            [_vectorizer(one["settings"], one["terms"], weights) for one, weights in zip(facts, arrays, strict=True)]
        )


def _settings(vectorizer: TfidfVectorizer) -> dict[str, Any]:
    return {"analyzer": vectorizer.analyzer, "ngram_range": list(vectorizer.ngram_range)}


def _vectorizer(settings: dict[str, Any], terms: list[str], idf: np.ndarray) -> TfidfVectorizer:
    """A vectorizer of known terms; terms that were left out no longer count in a text's norm."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer=settings["analyzer"],
        ngram_range=tuple(settings["ngram_range"]),
        sublinear_tf=True,
        token_pattern=r"(?u)\b\w+\b",
        vocabulary={term: place for place, term in enumerate(terms)},
    )
    vectorizer.idf_ = np.asarray(idf, np.float64)
    return vectorizer
