"""A classifier from records that are too few to set any of them aside.

The network has seen all that can be asked about, so what it says of them proves nothing: the linear opinion answers
alone. It is calibrated on what it says of each record when it has learnt from the other folds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from plait.classifiers.classifier import Classifier, Features
from plait.classifiers.held_out import stratified_folds
from plait.classifiers.linear import fit_linear
from plait.classifiers.mixture import Mixture, fit_mixture
from plait.classifiers.novelty import novelty_by_folds
from plait.evaluation.examples import Examples, feature_rows

TEXT_STRENGTH, MEDIA_STRENGTH = 0.3, 3e-3  # of the linear SVM: too few records to choose one
FOLDS = 5
# Texts of the median label up to which only their characters count. With 1 and 2 of each these alone were better on
# CLINC150, BANKING77, GoEmotions and two synthetic sets (macro F1 .29 to .32, .39 to .41, .28 to .29, ...); with 3 not.
WORDLESS = 2
FEWEST_CALIBRATED = 4  # records by which probabilities are calibrated
UNCALIBRATED = 2.0  # the factor of scores where there are fewer: a margin of one is odds of seven to one


def fit_few(classifier: Classifier, examples: Examples, bands: int, seed: int) -> Classifier:
    """Fill in what `classifier` decides by, from all examples of train and val."""
    kind, count, mirrored = classifier.features.kind, len(classifier.labels), classifier.mirrored
    strength = TEXT_STRENGTH if kind == "text" else MEDIA_STRENGTH
    each = np.median(np.bincount(examples.classes)[np.unique(examples.classes)])
    classifier.features = Features.fit(kind, examples.inputs, bands, words=bool(each > WORDLESS))
    fold = stratified_folds(examples.classes, FOLDS, seed)
    scores, judged = np.zeros((len(examples), count)), np.zeros(len(examples), bool)
    for number in np.unique(fold):
        here, rest = np.flatnonzero(fold == number), examples.only(np.flatnonzero(fold != number))
        if len(np.unique(rest.classes)) < 2:
            continue
        classifier.linear = fit_linear(*feature_rows(classifier.features, rest, mirrored), count, strength, False)
        scores[here] = classifier.linear_scores([examples.inputs[i] for i in here])
        judged[here] = np.isin(examples.classes[here], rest.classes)  # nobody can know a label that is never seen
    _calibrate(classifier, scores[judged], examples.classes[judged])
    if judged.any():
        _measure(classifier, scores, examples.classes)
    rows, classes = feature_rows(classifier.features, examples, mirrored)
    if kind != "text" and judged.all() and len(examples) >= 2 * FOLDS:
        plain = classifier.features(examples.inputs)
        classifier.novelty["features"], unlike = novelty_by_folds(plain, examples.classes, fold)
        classifier.mixture.fit_quantiles({"linear": scores}, [unlike])
    classifier.linear = fit_linear(rows, classes, count, strength, False)
    if classifier.features.grams is not None:
        classifier.features.grams, classifier.linear = classifier.features.grams.pruned(classifier.linear)
    return classifier


def _calibrate(classifier: Classifier, scores: np.ndarray, truth: np.ndarray) -> None:
    if len(truth) >= FEWEST_CALIBRATED:
        classifier.mixture = fit_mixture({"linear": scores}, truth)
    else:
        classifier.mixture = Mixture({"linear": UNCALIBRATED}, {"linear": 0.0}, {"linear": 1.0}, [])
    classifier.portable = replace(classifier.mixture)


def _measure(classifier: Classifier, scores: np.ndarray, truth: np.ndarray) -> None:
    """On all records; those whose label stands once among them are wrong."""
    right = float((scores.argmax(1) == truth).mean())
    classifier.measured = {"linear": right, "mixed": right, "portable": right}
    classifier.guess = float(np.bincount(truth).max() / len(truth))
    classifier.records = len(truth)
