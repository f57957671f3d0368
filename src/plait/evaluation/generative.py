"""What the model makes, judged: codecs, drawing and speaking from labels. One fixed setting, no best of many."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from plait.evaluation import metrics
from plait.evaluation.context import EvalContext, LabelClassifier, Media, quotient_error
from plait.evaluation.findings import Gallery, GalleryKind, ReportItem
from plait.evaluation.keys import Direction
from plait.modalities.fsq import FSQ

REDRAWS = 20  # resamples for figures that are dear to take


def evaluate_codec(eval_context: EvalContext, column: str) -> None:
    """Loss on the way to codes and back, and how many codes are in use."""
    media = eval_context.samples(column, eval_context.split)
    if not len(media):
        return
    codes = eval_context.encode(column, media.samples)
    rebuilt = eval_context.rebuilt(column, eval_context.split).samples
    modality = eval_context.modality(column)
    name = modality.codec_metric
    values = modality.codec_errors(media.samples, rebuilt)
    value, error = metrics.mean_with_error(values, seed=eval_context.seed)
    direction = Direction(column)
    eval_context.keep("codec", direction, name, value, stderr=error, n=len(values))
    used, perplexity = metrics.code_use(np.concatenate(codes), FSQ(modality.codec.levels).size)
    count = sum(map(len, codes))
    eval_context.keep("codec", direction, "codes_used", used, n=count)
    eval_context.keep("codec", direction, "code_perplexity", perplexity, n=count)
    shown = range(min(modality.shown, len(media)))
    items = []
    for i in shown:
        report_item = eval_context.preview_sample(column, media.samples[i], "real")
        report_item.beside = eval_context.preview_sample(column, rebuilt[i], "rebuilt")
        items.append(report_item)
    note = "Real test samples, and the same after the codec: nothing that is made can be better than this."
    rows = [(ReportItem(text=column), items)]
    eval_context.findings.galleries.append(Gallery(f"Codec: {column}", note, rows, GalleryKind.CODEC))


def evaluate_making(eval_context: EvalContext, label_column: str, media_column: str, total: int) -> None:
    """Samples for each label of a column: do they show it, are they varied, near to real ones, copies of training?"""
    task, direction = eval_context.modality(media_column).making_task, Direction(label_column, media_column)
    train = eval_context.with_text(eval_context.samples(media_column, "train"), label_column)
    test = eval_context.with_text(eval_context.samples(media_column, eval_context.split), label_column)
    present = {eval_context.texts[label_column][i] for i in train.indices}
    labels = [label for label in eval_context.labels[label_column] if label in present]
    if not labels or not len(test):
        return
    prompts = labels[: max(total // 2, 1)]
    if len(prompts) < len(labels):
        eval_context.note(f"{direction}: {len(prompts)} of {len(labels)} labels were made.")
    each = max(total // len(prompts), 2)
    generated: list[np.ndarray] = []
    chunk = max(64 // each, 1)
    for start in range(0, len(prompts), chunk):
        eval_context.progress(f"{task} {direction}", start, len(prompts))
        contexts = [eval_context.text_sequence(label) for label in prompts[start : start + chunk]]
        for results in eval_context.model.write(contexts, media_column, n=each, seed=eval_context.seed + start):
            generated += results
    eval_context.progress(f"{task} {direction}", len(prompts), len(prompts))
    labels_asked = np.repeat(np.array(prompts, object), each)
    critic = eval_context.label_classifier(media_column, label_column)
    right: np.ndarray | None = None
    if critic is not None:
        right = _judged(
            eval_context, critic, task, label_column, media_column, generated, labels_asked, train, test, len(labels)
        )
    nearest = _copies(eval_context, critic, task, direction, generated, label_column, media_column)
    _show(eval_context, task, direction, media_column, generated, labels_asked, right, train, nearest)


def _judged(
    eval_context: EvalContext,
    critic: LabelClassifier,
    task: str,
    label_column: str,
    media_column: str,
    generated: list[np.ndarray],
    labels_asked: np.ndarray,
    train: Media,
    test: Media,
    classes: int,
) -> np.ndarray:
    """Accuracy, diversity and Frechet distance in the judge's eyes; returns which samples it sees as asked."""
    direction, seed = Direction(label_column, media_column), eval_context.seed

    def look(samples: list[np.ndarray], truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted, hidden = critic.predicted_labels(eval_context.features(media_column, samples), label_column)
        return np.array([a == b for a, b in zip(predicted, truth, strict=True)], float), hidden

    truth = eval_context.texts[label_column][test.indices]
    rebuilt = eval_context.with_text(eval_context.rebuilt(media_column, eval_context.split), label_column)
    right, hidden = look(generated, labels_asked)
    real, real_hidden = look(test.samples, truth)
    again, _ = look(rebuilt.samples, truth)
    (accuracy, error), (real_accuracy, real_error) = (metrics.mean_with_error(x, seed=seed) for x in (right, real))
    again_accuracy, again_error = metrics.mean_with_error(again, seed=seed)
    keep, n, chance = eval_context.keep, len(generated), 1 / classes
    keep(task, direction, "judged_accuracy", accuracy, stderr=error, chance=chance, n=n)
    keep(task, direction, "judge_real", real_accuracy, stderr=real_error, chance=chance, n=len(test))
    keep(task, direction, "judge_reconstructed", again_accuracy, stderr=again_error, chance=chance, n=len(test))
    share = accuracy / real_accuracy if real_accuracy else math.nan
    keep(task, direction, "judged_share", share, n=n, stderr=quotient_error(accuracy, error, real_accuracy, real_error))
    # Real samples of train serve as what perfect drawing would score, as many as were made.
    drawn = eval_context.draw(np.arange(len(train)), n)
    _, other = look(train.only(drawn).samples, eval_context.texts[label_column][train.indices[drawn]])
    value = metrics.diversity(hidden, labels_asked, real_hidden, truth)
    error = _redrawn(lambda rows: metrics.diversity(hidden[rows], labels_asked[rows], real_hidden, truth), n, seed)
    keep(task, direction, "diversity", value, stderr=error, baseline=1.0, n=n)
    value = metrics.frechet_distance(hidden, real_hidden)
    error = _redrawn(lambda rows: metrics.frechet_distance(hidden[rows], real_hidden), n, seed)
    keep(task, direction, "frechet", value, stderr=error, baseline=metrics.frechet_distance(other, real_hidden), n=n)
    return right.astype(bool)


def _redrawn(statistic: Callable[[np.ndarray], float], n: int, seed: int) -> float:
    return metrics.bootstrap(lambda rows: np.array([statistic(row) for row in rows]), n, draws=REDRAWS, seed=seed)


def _copies(
    eval_context: EvalContext,
    critic: LabelClassifier | None,
    task: str,
    direction: Direction,
    generated: list[np.ndarray],
    label_column: str,
    column: str,
) -> np.ndarray:
    """Share of near copies; returns for each sample the place in train of its nearest neighbour.

    A sample is a near copy when it lies nearer to its nearest training sample than all but 1 % of the real test
    samples do to theirs. All have been through the codec, in which what is made must live.
    """
    train = eval_context.with_text(eval_context.rebuilt(column, "train"), label_column)
    test = eval_context.with_text(eval_context.rebuilt(column, eval_context.split), label_column)
    most = max(eval_context.limits.cells // 4 // max(eval_context.features(column, train.samples[:1]).numel(), 1), 1)
    places = eval_context.draw(np.arange(len(train)), most)
    features = [
        eval_context.features(column, samples) for samples in (train.only(places).samples, generated, test.samples)
    ]
    gallery, drawn, real = (f.flatten(1).numpy() for f in features)
    own, nearest = metrics.nearest(drawn, gallery)
    _keep_copies(eval_context, task, direction, "near_copies", own, metrics.nearest(real, gallery)[0])
    if critic is not None:
        gallery, drawn, real = (critic.judge(f)[1] for f in features)
        own, real_distances = metrics.nearest(drawn, gallery)[0], metrics.nearest(real, gallery)[0]
        _keep_copies(eval_context, task, direction, "near_copies_features", own, real_distances)
    return places[nearest]


def _keep_copies(
    eval_context: EvalContext, task: str, direction: Direction, name: str, own: np.ndarray, real_distances: np.ndarray
) -> None:
    bound = np.quantile(real_distances, 0.01)
    value, error = metrics.mean_with_error(own < bound, seed=eval_context.seed)
    eval_context.keep(
        task, direction, name, value, stderr=error, baseline=float((real_distances < bound).mean()), n=len(own)
    )


def _show(
    eval_context: EvalContext,
    task: str,
    direction: Direction,
    column: str,
    generated: list[np.ndarray],
    labels_asked: np.ndarray,
    right: np.ndarray | None,
    train: Media,
    nearest: np.ndarray,
) -> None:
    rows, per_row = [], eval_context.modality(column).made_per_row
    for label in list(dict.fromkeys(labels_asked))[:10]:
        items = []
        for place in np.flatnonzero(labels_asked == label)[:per_row]:
            report_item = eval_context.preview_sample(
                column, generated[place], "made", None if right is None else bool(right[place])
            )
            report_item.beside = eval_context.preview_sample(column, train.samples[nearest[place]], "nearest")
            items.append(report_item)
        rows.append((ReportItem(text=str(label)), items))
    note = "The first of what was made for each label, none chosen, each beside the training sample nearest to it. "
    note += "" if right is None else "Green: the judge sees the label asked for; red: another."
    title = f"{task.capitalize()}: {direction.arrow}"
    eval_context.findings.galleries.append(Gallery(title, note, rows, GalleryKind.MADE))
