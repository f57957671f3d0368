"""The n-grams of texts beside an encoder of them: what a text means and which words it has are wrong about different
texts, so both together are right more often than either.

Shapes: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.classifiers.linear import Linear, NgramFeatures, choose_linear, fit_linear
from plait.classifiers.mixture import cross_entropy, fit_mixture, log_softmax, softened

FEWEST = 200  # validation records from which it shows what each is worth
SECONDS = 30.0  # of a processor, for choosing how n-grams are fitted
ENCODER, NGRAMS = "encoder", "n-grams"


@dataclass
class LabelledTexts:
    """LabelledTexts of records and the number of each one's label, (N,)."""

    texts: list[str]
    classes: np.ndarray


@dataclass
class NgramsBeside:
    """Scores of a text's n-grams, and the weights of these and of the head's log-probabilities in the answer. The
    weights' size is the calibration."""

    features: NgramFeatures
    linear: Linear
    encoder_weight: float
    ngram_weight: float

    def log_probabilities(self, of_encoder: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(N, C), from the head's log-probabilities (N, C) and the texts themselves."""
        scores = self.linear(self.features(texts))
        return log_softmax(self.encoder_weight * of_encoder + self.ngram_weight * scores)

    def facts(self) -> dict[str, Any]:
        """What config.json says of it; `arrays` has the rest."""
        return {"grams": self.features.facts(), "weights": [self.encoder_weight, self.ngram_weight]}

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, for a file of tensors."""
        idf = {f"idf.{i}": values for i, values in enumerate(self.features.arrays())}
        return {**idf, "ngram_weights": self.linear.weights.astype(np.float16), "ngram_bias": self.linear.bias}

    @classmethod
    def restore(cls, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> NgramsBeside:
        """From what `facts` and `arrays` gave."""
        features = NgramFeatures.restore(facts["grams"], [arrays[f"idf.{i}"] for i in range(len(facts["grams"]))])
        linear = Linear(arrays["ngram_weights"].astype(np.float32), arrays["ngram_bias"])
        return cls(features, linear, *facts["weights"])


def fit_ngrams_beside(
    train: LabelledTexts, val: LabelledTexts, of_encoder: np.ndarray, count: int
) -> tuple[NgramsBeside, dict[str, float]] | None:
    """N-grams beside a head, and what both together are worth on val; None where val has too few records to tell, or
    the encoder alone makes its labels likelier.

    `of_encoder` (N, C) are the log-probabilities of val by a head that has not seen it; `count` is C.
    """
    if len(val.classes) < FEWEST or not train.texts:
        return None
    features = NgramFeatures.fit(train.texts)
    rows, val_rows = features(train.texts), features(val.texts)
    choice = choose_linear(rows, train.classes, val_rows, val.classes, count, sparse=True, seconds=SECONDS)
    opinions = {ENCODER: of_encoder, NGRAMS: choice.linear(val_rows)}
    weights = fit_mixture(opinions, val.classes).weights
    together = log_softmax(np.sum([weights[name] * opinions[name] for name in opinions], axis=0))
    targets = softened(val.classes, count)
    nats = cross_entropy(together, targets)
    if weights[NGRAMS] == 0 or nats >= cross_entropy(of_encoder, targets):
        return None
    texts, classes = train.texts + val.texts, np.concatenate((train.classes, val.classes))
    features = NgramFeatures.fit(texts)
    linear = fit_linear(features(texts), classes, count, choice.strength, choice.balanced)
    features, linear = features.pruned(linear)
    measured = {"accuracy": float((together.argmax(1) == val.classes).mean()), "nats": nats}
    return NgramsBeside(features, linear, weights[ENCODER], weights[NGRAMS]), measured
