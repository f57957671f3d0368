"""Every direction that the data allows, measured: recognition, transcription, language, retrieval, and what is made."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.evaluation.answers import evaluate_predictors
from plait.evaluation.context import EVALUATIONS, RECORD_EVALUATIONS, EvalContext, Limits, Progress, Timer
from plait.evaluation.findings import Findings
from plait.evaluation.folds import OutOfFold
from plait.evaluation.generative import evaluate_codec, evaluate_making
from plait.evaluation.keys import Metrics
from plait.evaluation.language import evaluate_language
from plait.evaluation.memorising import evaluate_canaries
from plait.evaluation.recognition import evaluate_recognition
from plait.evaluation.retrieval import evaluate_retrieval
from plait.evaluation.transcription import evaluate_transcription
from plait.evaluation.verdict import make_verdict
from plait.inference.model import PlaitModel

__all__ = ["Limits", "evaluate"]


def evaluate(
    model: PlaitModel,
    dataset: Dataset,
    split: str = "test",
    *,
    seed: int = 0,
    limit: int | None = None,
    limits: Limits | None = None,
    reference_seconds: float = 15.0,
    alternative_seconds: float | None = None,
    progress: Progress | None = None,
    out_of_fold: dict[tuple[str, str], OutOfFold] | None = None,
) -> tuple[Metrics, Findings]:
    """Measure a model on a split of a dataset; all columns that both have, in every direction.

    Args:
        model: The model.
        dataset: Data prepared like the training data.
        split: train, val or test.
        seed: Of all that is drawn.
        limit: The most records that a direction takes.
        limits: The same, for each kind of task.
        reference_seconds: What the judge of one media column gets, which is also the baseline of recognition.
        alternative_seconds: Time for a small CNN, which is then one of the alternatives of recognition; None for none.
        progress: Is told the stage, what is done and what there is to do.
        out_of_fold: Directions (source, target) that are measured by folds, on all records.

    Returns:
        The figures (`write_metrics` and `write_report` take them), and what the report shows beside them.

    Raises PlaitError where the split is empty or the columns do not match.
    """
    progress = progress or (lambda *_: None)
    if dataset.manifest.kind != "records":
        measure = EVALUATIONS.by_feature()[dataset.manifest.kind]
        most = limit or (limits.records if limits else None)
        return measure(model, dataset, split, seed=seed, limit=most, progress=progress)
    out_of_fold = out_of_fold or {}
    if not len(dataset.indices(split)) and not out_of_fold:
        others = [name for name in ("test", "val", "train") if len(dataset.indices(name))]
        raise PlaitError(
            f"{dataset.path} has no records in {split}. Evaluate with --split {' or '.join(others)}, or add data."
        )
    limits = _limits(limits, limit)
    eval_context = EvalContext(model, dataset, split, seed, limits, reference_seconds, progress, alternative_seconds)
    total_timer, timer = Timer(eval_context), Timer(eval_context)
    _evaluate_answers(eval_context, timer, out_of_fold)
    _evaluate_texts(eval_context, timer)
    if _searches(eval_context):
        evaluate_retrieval(eval_context)
        timer.lap("retrieval")
    for column in eval_context.media_columns:
        if eval_context.columns[column] not in model.checkpoint.model.config.read_only:
            _evaluate_made(eval_context, column)
            timer.lap(eval_context.modality(column).making_task)
    total_timer.lap("evaluation")
    findings = eval_context.findings
    findings.galleries.sort(key=lambda gallery: gallery.kind)
    findings.verdict = make_verdict(findings.outcomes)
    return eval_context.metrics, findings


def _searches(eval_context: EvalContext) -> bool:
    """Whether search in the embedding space is measured: not of a run that says which label one medium has, and makes
    none, where that would be the same question asked backwards."""
    config, media = eval_context.model.checkpoint.model.config, eval_context.media_columns
    if not media or not config.embed_dim:
        return False
    texts = set(eval_context.text_columns) - set(eval_context.labels) - _answered(eval_context)
    reads_alone = all(eval_context.columns[column] in config.read_only for column in media)
    return bool(texts) or len(media) > 1 or not reads_alone


def _limits(limits: Limits | None, limit: int | None) -> Limits:
    """The limits of each task, no more than `limit` records."""
    limits = limits or Limits()
    if limit is None:
        return limits
    written, queries = min(limit, limits.written), min(limit, limits.queries)
    return replace(limits, records=limit, written=written, queries=queries)


def _sources(eval_context: EvalContext) -> list[str]:
    """Columns from which training learns to answer: the media, or the texts where there are none."""
    return eval_context.media_columns or list(eval_context.columns)


def _answered(eval_context: EvalContext) -> set[str]:
    """Columns that predictors of the run answer, and no text is written for."""
    return {predictor.target for predictor in eval_context.model.checkpoint.predictors}


def _evaluate_answers(eval_context: EvalContext, timer: Timer, out_of_fold: dict[tuple[str, str], OutOfFold]) -> None:
    """Labels, several labels and numbers."""
    directions = [
        (source, target)
        for source, target in product(eval_context.columns, eval_context.labels)
        if source in _sources(eval_context) and target in eval_context.written and source != target
    ]
    for source, target in directions:
        evaluate_recognition(eval_context, source, target, out_of_fold.get((source, target)))
    evaluate_predictors(eval_context)
    if directions or _answered(eval_context):
        timer.lap("recognition")


def _evaluate_texts(eval_context: EvalContext, timer: Timer) -> None:
    """Texts that are written freely, texts that stand alone, and what features measure; not texts that classifiers
    read, which are given and never asked for."""
    before, answered = len(eval_context.metrics), _answered(eval_context)
    answered |= {classifier.source for classifier in eval_context.model.checkpoint.classifiers}
    for source, target in product(eval_context.columns, eval_context.text_columns):
        free = target in eval_context.written and target not in eval_context.labels and target not in answered
        if free and source != target and source in _sources(eval_context):
            evaluate_transcription(eval_context, source, target)
    for column in eval_context.text_columns:
        if column not in answered:
            evaluate_language(eval_context, column)
    for evaluate_more in RECORD_EVALUATIONS.all():
        evaluate_more(eval_context)
    evaluate_canaries(eval_context)
    if len(eval_context.metrics) > before:
        timer.lap("text")


def _evaluate_made(eval_context: EvalContext, column: str) -> None:
    """The codec of a media column, and what is made from the labels of each column that has some."""
    evaluate_codec(eval_context, column)
    samples = eval_context.samples(column, eval_context.split)
    labelled = [c for c in eval_context.labels if len(eval_context.with_text(samples, c))]
    for target in labelled:
        evaluate_making(eval_context, target, column, max(eval_context.limits.made // len(labelled), 1))
