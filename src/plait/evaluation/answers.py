"""Columns of several labels and of numbers, measured on held-out records beside a simple alternative."""

from __future__ import annotations

import numpy as np

from plait.classifiers.numbers import Numbers, apply_ridge, fit_ridge
from plait.classifiers.several import SeveralLabels, f1_scores, macro_f1, micro_f1
from plait.evaluation import metrics
from plait.evaluation.context import EvalContext
from plait.evaluation.keys import Direction
from plait.evaluation.predictors import as_matrix, read_examples

MOST_ALTERNATIVE = 4000  # training records of the simple alternative
RIDGE = 1e-2


def evaluate_predictors(context: EvalContext) -> None:
    """Measure every predictor of the run whose columns the dataset holds."""
    for one in context.model.checkpoint.predictors:
        if not {one.source, one.target} <= set(context.columns):
            continue
        context.progress(f"recognition {one.source}-{one.target}", 0, 1)
        if isinstance(one, SeveralLabels):
            _several(context, one)
        else:
            _numbers(context, one)
        context.progress(f"recognition {one.source}-{one.target}", 1, 1)


def _several(context: EvalContext, one: SeveralLabels) -> None:
    """F1 over labels and over decisions, and of each label; chance is that of always saying every label."""
    _, inputs, answers = read_examples(
        context.model, context.dataset, one.source, one.target, context.split, context.limits.records, context.seed
    )
    if not inputs:
        return
    direction = Direction(one.source, one.target)
    truth = as_matrix(answers, one.labels)
    chances = one.probabilities(inputs)
    predicted = chances >= one.thresholds
    every = np.ones_like(truth)
    n = len(truth)

    def spread(statistic: str) -> float:
        measure = macro_f1 if statistic == "macro" else micro_f1
        return metrics.bootstrap(
            lambda rows: np.array([measure(truth[row], predicted[row]) for row in rows]), n, draws=50, seed=context.seed
        )

    context.keep("recognition", direction, "macro_f1", macro_f1(truth, predicted), stderr=spread("macro"),
                 chance=macro_f1(truth, every), n=n)  # fmt: skip
    context.keep("recognition", direction, "micro_f1", micro_f1(truth, predicted), stderr=spread("micro"),
                 chance=micro_f1(truth, every), n=n)  # fmt: skip
    context.keep("recognition", direction, "exact", float((truth == predicted).all(1).mean()), n=n)
    for label, value, count in zip(one.labels, f1_scores(truth, predicted), truth.sum(0), strict=True):
        context.keep("recognition", direction, "f1", float(value), n=int(count), label=label)
    believed = np.where(chances >= 0.5, chances, 1 - chances).ravel()
    right = ((chances >= 0.5) == truth).ravel()
    context.keep("recognition", direction, "ece", metrics.calibration(believed, right)[0], n=n)


def _numbers(context: EvalContext, one: Numbers) -> None:
    """The mean absolute error beside a ridge regression's on the same features, R2, and how many intervals hold."""
    model, dataset, limits = context.model, context.dataset, context.limits
    columns = (one.source, one.target)
    _, inputs, answers = read_examples(model, dataset, *columns, context.split, limits.records, context.seed)
    if len(inputs) < 2:
        return
    direction = Direction(one.source, one.target)
    truth, predicted = np.array(answers, float), one.predict(inputs)
    off = np.abs(truth - predicted)
    _, train_inputs, known = read_examples(model, dataset, *columns, "train", MOST_ALTERNATIVE, context.seed)
    values = np.array(known, float)
    weights = fit_ridge(one.features(train_inputs), values, RIDGE)
    simple = np.abs(truth - apply_ridge(one.features(inputs), weights))
    guess = float(np.abs(truth - values.mean()).mean())
    value, error = metrics.mean_with_error(off, seed=context.seed)
    n = len(truth)
    context.keep("recognition", direction, "mae", value, stderr=error, chance=guess, baseline=float(simple.mean()), n=n)
    total = float(np.square(truth - truth.mean()).sum())
    if total > 0:
        context.keep("recognition", direction, "r2", 1 - float(np.square(truth - predicted).sum()) / total, n=n)
    inside = (truth >= predicted + one.low) & (truth <= predicted + one.high)
    value, error = metrics.mean_with_error(inside, seed=context.seed)
    context.keep("recognition", direction, "coverage_90", value, stderr=error, n=n)
