"""Linear classifiers on dense features and on n-grams of texts; fitted by scikit-learn, kept as arrays and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

# scikit-learn is imported where it fits or reads texts: that takes longer than torch, and media need none of it.
if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

STRENGTHS = (0.1, 0.3, 1.0, 3.0)  # of a linear SVM, largest last, tried in this order
DENSE_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3)
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
    model.fit(features, labels)
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:  # two classes
        weights, bias = np.concatenate([-weights, weights], 1), np.concatenate([-bias, bias])
    padded = np.zeros((weights.shape[0], classes), np.float32)
    offset = np.full(classes, -3.0)
    padded[:, model.classes_], offset[model.classes_] = weights, bias
    return Linear(padded, offset)


def choose_linear(
    features: Any,
    labels: np.ndarray,
    held_features: Any,
    held_labels: np.ndarray,
    classes: int,
    strengths: Sequence[float],
) -> tuple[float, bool]:
    """The strength, and whether to balance classes, by accuracy and macro F1 (their mean) on held-out records: the
    least strength that is not surely worse than the best, since new records differ more from train than these do.

    Surely worse is: by more than a standard error of the difference, record by record, where each class counts half
    by its records and half as one class among others.
    """
    from sklearn.metrics import accuracy_score, f1_score

    counts = np.bincount(labels, minlength=classes)
    uneven = counts.max() > 3 * max(np.median(counts), 1)
    held_counts = np.bincount(held_labels, minlength=classes)
    share = 0.5 + 0.5 * len(held_labels) / (np.count_nonzero(held_counts) * held_counts[held_labels])
    tried: list[tuple[float, float, bool, np.ndarray]] = []
    for balanced in (False, True) if uneven else (False,):
        for strength in strengths:
            predicted = fit_linear(features, labels, classes, strength, balanced)(held_features).argmax(1)
            score = (accuracy_score(held_labels, predicted) + f1_score(held_labels, predicted, average="macro")) / 2
            tried.append((score, strength, balanced, share * (predicted == held_labels)))
    _, _, chosen, best = max(tried, key=lambda one: one[:3])

    def surely_worse(right: np.ndarray) -> bool:
        lost = best - right
        return bool(lost.mean() > lost.std() / len(lost) ** 0.5)

    return min(
        strength for _, strength, balanced, right in tried if balanced == chosen and not surely_worse(right)
    ), chosen


@dataclass
class NgramFeatures:
    """TF-IDF of the n-grams of words and of characters within words, side by side."""

    vectorizers: list[TfidfVectorizer]

    @classmethod
    def fit(cls, texts: Sequence[str]) -> NgramFeatures:
        from sklearn.feature_extraction.text import TfidfVectorizer

        least = 1 if len(texts) < 2000 else 2
        words = TfidfVectorizer(ngram_range=WORD_GRAMS, sublinear_tf=True, min_df=least, token_pattern=r"(?u)\b\w+\b")
        options = {"sublinear_tf": True, "min_df": least, "max_features": 4 * MOST_GRAMS}
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=CHARACTER_GRAMS, **options)
        grams = cls([words, characters])
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
