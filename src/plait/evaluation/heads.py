"""How right a head over a frozen encoder is on records that it has not seen."""

from __future__ import annotations

import numpy as np

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.evaluation.findings import Findings
from plait.evaluation.keys import Direction, MetricKey, Metrics
from plait.evaluation.outcome import Outcome
from plait.evaluation.verdict import make_verdict
from plait.hf.heads import HeadModel


def measure_head(model: HeadModel, dataset: Dataset, split: str, limit: int | None) -> tuple[Metrics, Findings]:
    """Accuracy and macro F1 of a split, beside the most frequent label, and what that comes to.

    Raises PlaitError where the split is empty.
    """
    from sklearn.metrics import f1_score

    source, target = model.config["source"], model.config["target"]
    answers = dataset.texts(target)
    indices = np.array([i for i in dataset.indices(split) if answers[i] is not None], np.int64)[:limit]
    inputs, truth = [], []
    for index, record in zip(indices, dataset.iterate(indices, [source]), strict=True):
        if source in record.parts:
            inputs.append(record.parts[source])
            truth.append(str(answers[index]))
    if not truth:
        raise PlaitError(f"{dataset.path} has no record of {split} with {source} and {target}. Name another --split.")
    predicted = np.array([predictions[0].label for predictions in model.classify_inputs(inputs, top=1)])
    labels = np.array(truth)
    right = predicted == labels
    frequent = max((labels == label).mean() for label in set(truth))
    count, chance = len(truth), 1 / len(model.head.labels)
    error = float(right.std() / count**0.5)
    direction, figures = Direction(source, target), Metrics()
    figures.keep(
        MetricKey("recognition", direction, "accuracy"), float(right.mean()), stderr=error, chance=chance,
        baseline=float(frequent), n=count,
    )  # fmt: skip
    macro = float(f1_score(labels, predicted, average="macro"))
    known = sorted(set(truth))  # of always saying the most frequent label: its own F1, and 0 of the others
    constant = 2 * float(frequent) / (1 + float(frequent)) / len(known)
    figures.keep(
        MetricKey("recognition", direction, "macro_f1"), macro, stderr=error, chance=chance, baseline=constant, n=count
    )
    findings = Findings()
    findings.outcomes.append(
        Outcome(
            "recognition", f"{target} from {source}", "right", float(right.mean()), error, count, chance,
            "always saying the most frequent label", float(frequent), error, advice="more records.",
        )
    )  # fmt: skip
    findings.verdict = make_verdict(findings.outcomes)
    return figures, findings
