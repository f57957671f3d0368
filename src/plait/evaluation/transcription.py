"""Texts that are written freely, as captions are, beside the text that is most common in training."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np

from plait.evaluation import metrics
from plait.evaluation.context import EvalContext
from plait.evaluation.findings import Gallery, GalleryKind, ReportItem
from plait.evaluation.keys import Direction
from plait.evaluation.memorising import evaluate_texts


def evaluate_transcription(eval_context: EvalContext, source: str, target: str) -> None:
    """Greedy writing of a text that is not one of few labels; the baseline always writes train's most common one."""
    media = eval_context.pairs(source, target, eval_context.split)
    media = media.only(eval_context.draw(np.arange(len(media)), eval_context.limits.written))
    if not len(media):
        return
    direction, seed = Direction(source, target), eval_context.seed
    written: list[str] = []
    for start in range(0, len(media), 64):
        eval_context.progress(f"transcription {direction}", start, len(media))
        part = media.only(np.arange(start, min(start + 64, len(media))))
        written += [texts[0] for texts in eval_context.model.write(eval_context.inputs(source, part), target)]
    eval_context.progress(f"transcription {direction}", len(media), len(media))
    truth = [unicodedata.normalize("NFC", text) for text in eval_context.texts[target][media.indices]]
    everyday = Counter(eval_context.texts[target][i] for i in eval_context.pairs(source, target, "train").indices)
    constant = [everyday.most_common(1)[0][0] if everyday else ""] * len(truth)
    same = np.array([a == b for a, b in zip(truth, written, strict=True)])
    value, error = metrics.mean_with_error(same, seed=seed)
    fixed = float(np.mean([a == b for a, b in zip(truth, constant, strict=True)]))
    eval_context.keep("transcription", direction, "exact", value, stderr=error, baseline=fixed, n=len(truth))
    clean = eval_context.clean(media.indices)
    if clean is not None:
        value, error = metrics.mean_with_error(same[clean], seed=seed)
        eval_context.keep("transcription", direction, "exact", value, stderr=error, n=int(clean.sum()), clean=True)
    others = metrics.error_rates(truth, constant)
    for name, (wrong, lengths) in metrics.error_rates(truth, written).items():
        value, error = metrics.ratio_with_error(wrong, lengths, seed=seed)
        other = others[name][0].sum() / max(others[name][1].sum(), 1)
        eval_context.keep("transcription", direction, name, value, stderr=error, baseline=float(other), n=len(truth))
        if clean is not None:
            value, error = metrics.ratio_with_error(wrong[clean], lengths[clean], seed=seed)
            eval_context.keep("transcription", direction, name, value, stderr=error, n=int(clean.sum()), clean=True)
    evaluate_texts(eval_context, direction, target, written, truth)
    rows = [
        (
            eval_context.preview_input(source, media, i),
            [ReportItem("truth", text=truth[i]), ReportItem("written", text=written[i], right=bool(same[i]) or None)],
        )
        for i in range(min(8, len(truth)))
    ]
    note = "The first of the test, none chosen."
    eval_context.findings.galleries.append(Gallery(f"Written: {direction.arrow}", note, rows, GalleryKind.WRITTEN))
