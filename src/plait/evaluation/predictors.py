"""After training: what decides about columns of several labels, and what predicts columns of numbers, is fitted on
train, and its probabilities, thresholds and error bars on val."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from plait.classifiers.classifier import Features
from plait.classifiers.linear import Linear
from plait.classifiers.numbers import Numbers, fit_numbers
from plait.classifiers.predictors import Predictor
from plait.classifiers.several import DENSE_STRENGTHS, STRENGTHS, SeveralLabels, fit_several
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.data.record import split_labels
from plait.inference.model import PlaitModel

MOST = 60_000  # training records
MOST_VALIDATION = 6000
FEWEST = 20  # records of val, below which a fifth of train takes their place
RNG_STREAM = 313  # of the random numbers of `uniform`


def fit_predictors(
    model: PlaitModel, dataset: Dataset, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> list[Predictor]:
    """A predictor for each column of several labels or of numbers, from each column that is read."""
    tell = progress or (lambda *_: None)
    predictors: list[Predictor] = []
    manifest = dataset.manifest
    for target in [*manifest.multi_label, *manifest.numbers]:
        for source in sources(model, dataset):
            tell(f"predictor {source}-{target}", 0, 1)
            one = _fit(model, dataset, source, target, seed)
            if one is not None:
                predictors.append(one)
            tell(f"predictor {source}-{target}", 1, 1)
    return predictors


def sources(model: PlaitModel, dataset: Dataset) -> list[str]:
    """The columns that answers are read from: media, or where there are none texts that are no answers themselves."""
    media = [c for c, kind in dataset.columns.items() if kind in model.checkpoint.model.media and c in model.columns]
    manifest = dataset.manifest
    answers = {*model.labels, *manifest.chats, *manifest.multi_label, *manifest.numbers}
    texts = [c for c, kind in dataset.columns.items() if kind == "text" and c in model.columns and c not in answers]
    return media or texts


def read_examples(
    model: PlaitModel, dataset: Dataset, source: str, target: str, split: str, most: int, seed: int
) -> tuple[np.ndarray, list[Any], list[str]]:
    """Records of a split that have both columns, at most so many, drawn by the seed: numbers, inputs, answers."""
    answers = dataset.texts(target)
    indices = np.array([i for i in dataset.indices(split) if answers[i] is not None], np.int64)
    if len(indices) > most:
        indices = np.sort(indices[np.argsort(uniform(seed, RNG_STREAM, indices), kind="stable")[:most]])
    kept, inputs, targets = [], [], []
    for index, record in zip(indices, dataset.iterate(indices, [source]), strict=True):
        value = record.parts.get(source)
        if value is not None:
            kept.append(int(index))
            inputs.append(value if isinstance(value, str) else model.modality(source).windows(value)[0])
            targets.append(str(answers[index]))
    return np.array(kept, np.int64), inputs, targets


def _fit(model: PlaitModel, dataset: Dataset, source: str, target: str, seed: int) -> Predictor | None:
    """None where there is too little to learn from."""
    _, inputs, answers = read_examples(model, dataset, source, target, "train", MOST, seed)
    _, held_inputs, held_answers = read_examples(model, dataset, source, target, "val", MOST_VALIDATION, seed)
    if len(inputs) < FEWEST:
        return None
    if len(held_inputs) < FEWEST:
        held = uniform(seed, RNG_STREAM, 1, np.arange(len(inputs))) < 0.2
        held_inputs, held_answers = _only(inputs, held), _only(answers, held)
        inputs, answers = _only(inputs, ~held), _only(answers, ~held)
    kind = dataset.columns[source]
    bands = int(str(model.checkpoint.model.config.modalities.get(kind, {}).get("bands", 0)))
    features = Features.fit(kind, inputs, bands)
    rows, held_rows = features(inputs), features(held_inputs)
    if target in dataset.manifest.numbers:
        values, held_values = np.array(answers, float), np.array(held_answers, float)
        return _pruned_numbers(fit_numbers(source, target, features, rows, values, held_rows, held_values))
    counted = Counter(label for answer in answers for label in split_labels(answer))
    labels = [label for label, _ in counted.most_common()]
    if not labels:
        return None
    strengths = STRENGTHS if kind == "text" else DENSE_STRENGTHS
    linear, slope, offsets, thresholds, measured = fit_several(
        rows, as_matrix(answers, labels), held_rows, as_matrix(held_answers, labels), strengths
    )
    if features.grams is not None:
        features.grams, linear = features.grams.pruned(linear)
    return SeveralLabels(
        source, target, labels, features, linear, slope, offsets, thresholds, measured, len(held_inputs)
    )


def _only(values: list[Any], keep: np.ndarray) -> list[Any]:
    return [value for value, kept in zip(values, keep, strict=True) if kept]


def _pruned_numbers(numbers: Numbers) -> Numbers:
    grams = numbers.features.grams
    if grams is not None:
        kept, linear = grams.pruned(Linear(numbers.weights[:-1, None], numbers.weights[-1:]))
        numbers.features.grams = kept
        numbers.weights = np.concatenate([linear.weights[:, 0], linear.bias])
    return numbers


def as_matrix(answers: list[str], labels: list[str]) -> np.ndarray:
    """Texts of several labels as (N, labels) bool; labels that are not among these are passed by."""
    places = {label: place for place, label in enumerate(labels)}
    matrix = np.zeros((len(answers), len(labels)), bool)
    for row, answer in enumerate(answers):
        for label in split_labels(answer):
            if label in places:
                matrix[row, places[label]] = True
    return matrix


def describe_predictor(one: Predictor) -> str:
    """How good it is on validation records, a line."""
    if isinstance(one, SeveralLabels):
        return (
            f"{one.target} from {one.source}: {len(one.labels)} labels, several a record; macro F1 "
            f"{one.measured['macro_f1']:.3f}, micro F1 {one.measured['micro_f1']:.3f} on val (thresholds fitted there)."
        )
    error = min(one.measured["ridge"], one.measured.get("kernel", np.inf))
    return (
        f"{one.target} from {one.source}: off by {error:.4g} on average on val (chosen there); always saying the mean "
        f"is off by {one.measured['mean']:.4g}. Nine of ten lie between {one.low:+.4g} and {one.high:+.4g} of it."
    )
