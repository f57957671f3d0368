"""Which labels are likely wrong, and which records without a label are most worth labelling.

A label is judged by models that have not seen it: each record by a simple model of all the others
(`classifiers.held_out`), and where the run has not trained on the record by the run's own classifier too. A label is
listed where another one is believed as much as that one is at the records which bear it (confident learning;
Northcutt, Jiang and Chuang, 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from plait.classifiers.classifier import Classifier, Features
from plait.classifiers.held_out import held_out_log_probabilities
from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.inference.model import PlaitModel
from plait.inference.opinions import ood_scores, opinion_scores

MOST_RECORDS = 30_000  # that are judged, and as many that are looked through for what to label
MOST_CANDIDATES = 5  # times as many uncertain records are compared as are listed
RNG_STREAM = 331  # of the random numbers of `uniform`


@dataclass(frozen=True)
class ReviewedRecord:
    """Which record an entry of a review is about.

    Attributes:
        record: the record's number in its dataset.
        id: the record's id.
        source: the file (and line) that it came from.
        split: train, val or test.
    """

    record: int
    id: str
    source: str
    split: str


@dataclass(frozen=True)
class LabelSuspect(ReviewedRecord):
    """A label that is likely wrong.

    Attributes:
        label: the label as it is given.
        suggested: the likeliest label.
        probability: of the given label, by models that have not seen it.
        suggested_probability: of the likeliest one.
        score: log-odds of the suggested label against the given one; the larger, the likelier it is wrong.
        likely: whether the suggested label is believed as much as it is at records that bear it.
    """

    label: str
    suggested: str
    probability: float
    suggested_probability: float
    score: float
    likely: bool


@dataclass(frozen=True)
class LabelCandidate(ReviewedRecord):
    """A record without a label that is worth labelling.

    Attributes:
        guess: the likeliest label.
        probability: of the guess.
        ood_score: in [0, 1]: how unlike the validation records it looks.
        score: how uncertain the answer is, in [0, 1]: 1 minus the distance of the two likeliest labels.
    """

    guess: str
    probability: float
    ood_score: float
    score: float


@dataclass
class LabelReview:
    """What was found in one column of labels.

    Attributes:
        column: the column of labels.
        input: the column by which they were judged.
        labelled: records that have a label and were judged.
        unlabelled: records that have none and were looked through.
        likely: how many labels are likely wrong, listed or not.
        suspects: the labels that are likeliest wrong, the likeliest first.
        candidates: records to label next, the most useful first; no two of them much alike.
        notes: what to know about the lists.
    """

    column: str
    input: str
    labelled: int
    unlabelled: int
    likely: int
    suspects: list[LabelSuspect] = field(default_factory=list)
    candidates: list[LabelCandidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def review_labels(
    model: PlaitModel,
    dataset: Dataset,
    column: str | None = None,
    *,
    own: bool = True,
    most: int = 200,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> LabelReview:
    """Review a column of labels of a dataset.

    Args:
        model: a run's model, with a classifier for the column.
        dataset: whose labels are looked at.
        column: the column; the first that the model has a classifier for and the dataset holds if None.
        own: whether the model was trained on this dataset, so that its opinion of train counts for nothing.
        most: suspects and candidates to list, at most.
        seed: of what is drawn.
        progress: called as (stage, done, total).

    Raises PlaitError where no column can be reviewed.
    """
    classifier = _classifier(model, dataset, column)
    tell = progress or (lambda *_: None)
    number = {label: place for place, label in enumerate(classifier.labels)}
    answers = dataset.texts(classifier.target)
    labelled = np.array([i for i, answer in enumerate(answers) if answer in number], np.int64)
    blank = np.array([i for i, answer in enumerate(answers) if answer is None], np.int64)
    review = LabelReview(classifier.target, classifier.source, len(labelled), len(blank), 0)
    unknown = len(answers) - len(labelled) - len(blank)
    if unknown:
        review.notes.append(f"{unknown:,} records have labels that the model does not know; they are passed by.")
    tell("labels", 0, 2)
    judged, inputs = _read(model, dataset, classifier, _drawn(labelled, seed, review), review)
    if len(judged) >= 2 * len(number):
        classes = np.array([number[cast(str, answers[i])] for i in judged])
        logs = _judge(model, dataset, classifier, judged, inputs, classes, own, seed)
        _list_suspects(review, dataset, classifier, judged, classes, logs, most)
    else:
        review.notes.append("There are too few labelled records to judge labels by.")
    tell("labels", 1, 2)
    open_, inputs = _read(model, dataset, classifier, _drawn(blank, seed, review), review)
    if len(open_):
        _list_candidates(review, model, dataset, classifier, open_, inputs, most)
    tell("labels", 2, 2)
    return review


def _classifier(model: PlaitModel, dataset: Dataset, column: str | None) -> Classifier:
    """What decides about the column. Raises PlaitError."""
    known = [one for one in model.checkpoint.classifiers if {one.source, one.target} <= set(dataset.columns)]
    classifier = next((one for one in known if column in (None, one.target)), None)
    if classifier is None:
        names = ", ".join(dict.fromkeys(one.target for one in known)) or "none"
        what = f"no labels '{column}'" if column else "no column of labels"
        raise PlaitError(
            f"{model.name} has {what} that it decides about and {dataset.path} holds. It has {names}. A run gets them "
            "by training on records with labels."
        )
    return classifier


def _drawn(indices: np.ndarray, seed: int, review: LabelReview) -> np.ndarray:
    if len(indices) <= MOST_RECORDS:
        return indices
    review.notes.append(f"{MOST_RECORDS:,} of {len(indices):,} records were looked at, drawn by the seed.")
    return np.sort(indices[np.argsort(uniform(seed, RNG_STREAM, indices), kind="stable")[:MOST_RECORDS]])


def _read(
    model: PlaitModel, dataset: Dataset, classifier: Classifier, indices: np.ndarray, review: LabelReview
) -> tuple[np.ndarray, list[Any]]:
    """The inputs of records, and which records have one."""
    kept, inputs = [], []
    for index, record in zip(indices, dataset.iterate(indices, [classifier.source]), strict=True):
        value = record.parts.get(classifier.source)
        if value is not None:
            kept.append(int(index))
            inputs.append(value if isinstance(value, str) else model.modality(classifier.source).windows(value)[0])
    return np.array(kept, np.int64), inputs


def _judge(
    model: PlaitModel, dataset: Dataset, classifier: Classifier, indices: np.ndarray, inputs: list[Any],
    classes: np.ndarray, own: bool, seed: int,
) -> np.ndarray:  # fmt: skip
    """Log-probabilities (N, labels) by models that have not seen the record."""
    kind = classifier.features.kind
    features = Features.fit(kind, inputs, classifier.features.bands)
    logs = held_out_log_probabilities(features(inputs), classes, len(classifier.labels), seed)
    seen = set(dataset.indices("train").tolist()) if own else set()
    new = np.flatnonzero([int(index) not in seen for index in indices])
    # The linear part of the run's classifier has learnt from val, too; the network has not.
    names = [name for name in classifier.mixture.used if not own or name != "linear"]
    if len(new) and names:
        scores = opinion_scores(model, classifier, [inputs[i] for i in new], names)
        logs[new] = (logs[new] + classifier.mixture.partial(names).log_probabilities(scores)) / 2
    return logs


def _list_suspects(
    review: LabelReview, dataset: Dataset, classifier: Classifier, indices: np.ndarray, classes: np.ndarray,
    logs: np.ndarray, most: int,
) -> None:  # fmt: skip
    """The labels that another one is most likely to be right in place of."""
    rows, chances = np.arange(len(classes)), np.exp(logs)
    others = logs.copy()
    others[rows, classes] = -np.inf
    suggested = others.argmax(1)
    odds = others[rows, suggested] - logs[rows, classes]
    counts = np.bincount(classes, minlength=logs.shape[1])
    bar = np.bincount(classes, chances[rows, classes], logs.shape[1]) / np.maximum(counts, 1)  # a class's own belief
    likely = (odds > 0) & (chances[rows, suggested] >= bar[suggested])
    review.likely = int(likely.sum())
    order = np.argsort(-odds, kind="stable")
    chosen = order[odds[order] > 0][:most]
    for row, record in zip(chosen.tolist(), _records(dataset, indices[chosen]), strict=True):
        review.suspects.append(
            LabelSuspect(
                *record, classifier.labels[classes[row]], classifier.labels[suggested[row]],
                float(chances[row, classes[row]]), float(chances[row, suggested[row]]), float(odds[row]),
                bool(likely[row]),
            )
        )  # fmt: skip


def _list_candidates(
    review: LabelReview, model: PlaitModel, dataset: Dataset, classifier: Classifier, indices: np.ndarray,
    inputs: list[Any], most: int,
) -> None:  # fmt: skip
    """Uncertain records that differ: each the best by uncertainty times the distance to those that are listed."""
    scores = opinion_scores(model, classifier, inputs, classifier.mixture.used)
    chances = np.exp(classifier.mixture.log_probabilities(scores))
    unlike = ood_scores(model, classifier, inputs, scores)
    top = np.sort(chances, 1)
    doubt = 1 - (top[:, -1] - top[:, -2])
    uncertain = np.argsort(-doubt, kind="stable")[: MOST_CANDIDATES * most]
    rows = classifier.features([inputs[i] for i in uncertain])
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel() if hasattr(rows, "multiply") else (rows**2).sum(1))
    distance, chosen = np.ones(len(uncertain)), []
    for _ in range(min(most, len(uncertain))):
        best = int(np.argmax(doubt[uncertain] * distance))
        chosen.append(best)
        product = rows @ rows[best].T
        dense = np.asarray(product.todense()).ravel() if hasattr(product, "todense") else np.asarray(product).ravel()
        distance = np.minimum(distance, 1 - dense / np.maximum(norms * norms[best], 1e-9))
        distance[chosen] = -1
    picked = uncertain[chosen]
    for row, record in zip(picked.tolist(), _records(dataset, indices[picked]), strict=True):
        review.candidates.append(
            LabelCandidate(
                *record, classifier.labels[int(chances[row].argmax())], float(chances[row].max()), float(unlike[row]),
                float(doubt[row]),
            )
        )  # fmt: skip


def _records(dataset: Dataset, indices: np.ndarray) -> list[tuple[int, str, str, str]]:
    """Number, id, source and split of records."""
    records = {}
    ascending = np.sort(indices)
    for index, record in zip(ascending, dataset.iterate(ascending, []), strict=True):
        records[int(index)] = (int(index), record.id, record.source, record.split)
    return [records[int(index)] for index in indices]
