"""What the figures of a report are called, and what they say: metric -> (name, kind, meaning)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from plait.core.features import ExtensionPoint
from plait.evaluation.keys import Direction, MetricKey

TASKS = {
    "recognition": "Recognition: which of the known labels",
    "transcription": "Transcription and captions: free text",
    "language": "Language: how well it predicts text",
    "retrieval": "Retrieval: one kind finds another",
    "drawing": "Drawing: images from labels",
    "speaking": "Speaking: audio from labels",
    "memorising": "Memorising: what was learnt by heart",
    "codec": "Codecs: what is lost on the way to codes and back",
    "timing": "Time",
}
# Metric -> (name, "share" of 1, "ratio" or plain "number", what it says).
MEANING = {
    "accuracy": ("accuracy", "share", "most likely label is the right one"),
    "train_accuracy": ("accuracy on training records", "share", "as many records as in the test"),
    "small_cnn_accuracy": ("accuracy of a small CNN", "share", "fitted for as long as the run"),
    "zero_shot_accuracy": ("zero-shot accuracy", "share", "nearest label in the embedding space"),
    "ece": ("expected calibration error", "share", "of the answer's probability; lower is better"),
    "accuracy_at_90": ("accuracy of the surest 90 %", "share", "the least sure tenth is left to people"),
    "accuracy_at_80": ("accuracy of the surest 80 %", "share", "the least sure fifth is left to people"),
    "macro_f1": ("F1, mean of the labels", "share", "several labels a record; chance: always saying all"),
    "micro_f1": ("F1, of all decisions", "share", "several labels a record; chance: always saying all"),
    "mae": ("mean absolute error", "value", "of numbers; chance: the mean, baseline: ridge regression"),
    "r2": ("R²", "number", "of numbers: 1 is perfect, 0 as good as the mean"),
    "coverage_90": ("truth within the error bars", "share", "which are meant to hold nine of ten"),
    "precision": ("precision, macro", "share", ""),
    "recall": ("recall, macro", "share", ""),
    "f1": ("F1, macro", "share", ""),
    "exact": ("exact match", "share", "whole text right"),
    "wer": ("word error rate", "share", "lower is better"),
    "cer": ("character error rate", "share", "lower is better"),
    "nats_per_token": ("nats per token", "number", "lower is better"),
    "nats_per_character": ("nats per character", "number", "lower is better"),
    "bits_per_byte_ngrams": ("bits per byte of an n-gram model", "number", "of six characters, learnt in a second"),
    "bits_per_byte": ("bits per byte", "number", "lower is better; baseline: an n-gram model of six characters"),
    "r_at_1": ("R@1", "share", "a related record comes first"),
    "r_at_5": ("R@5", "share", "a related record is among 5"),
    "r_at_10": ("R@10", "share", "a related record is among 10"),
    "p_at_10": ("P@10", "share", "related share of the first 10"),
    "judged_accuracy": ("judged right", "share", "a classifier of real data sees the label asked for"),
    "judge_real": ("judge on real test data", "share", "what the judge gets right at best"),
    "judge_reconstructed": ("judge on codec reconstructions", "share", "the most the codec allows"),
    "judged_share": ("judged right, relative to real", "ratio", ""),
    "diversity": ("diversity", "ratio", "spread within a label, relative to real"),
    "frechet": ("Fréchet distance", "number", "to real test data in the judge's features; baseline: real to real"),
    "near_copies": ("near copies", "share", "closer to a training sample than 99 % of real test data are"),
    "near_copies_features": ("near copies, in features", "share", "the same, as the judge sees it"),
    "verbatim": ("verbatim in train", "share", "of runs of 8 words that it wrote; baseline: of real test texts"),
    "near_texts": ("near copies", "share", "longer runs out of train than in 99 % of real test texts"),
    "exposure": ("exposure, bits", "number", "of planted canaries; chance: of canaries that were never planted"),
    "psnr": ("PSNR, dB", "number", "higher is better"),
    "mel_error": ("error of the log-mel", "number", "mean absolute; lower is better"),
    "codes_used": ("codes used", "share", "share of all codes that occur"),
    "code_perplexity": ("code perplexity", "share", "as a share of all codes"),
    "seconds": ("seconds", "number", ""),
    "steps": ("steps", "number", "of training"),
}
HEADLINES: tuple[str, ...] = (
    "accuracy",
    "f1",
    "accuracy_at_80",
    "macro_f1",
    "mae",
    "r2",
    "exact",
    "wer",
    "bits_per_byte",
    "p_at_10",
    "judged_accuracy",
)


@dataclass(frozen=True)
class MetricLabels:
    """What a feature's figures are called.

    Attributes:
        tasks: Task -> its heading.
        meaning: Metric -> (name, kind, what it says), as in `MEANING`.
        headlines: Metrics that stand at the top of a report.
        beside: Task -> tasks whose figures are no headlines where that task has some: the run does not answer by them.
    """

    tasks: Mapping[str, str]
    meaning: Mapping[str, tuple[str, str, str]]
    headlines: tuple[str, ...] = ()
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def is_headline(self, key: MetricKey) -> bool:
        """Whether a figure is one of those that tell most."""
        return key.metric in self.headlines and key.main and not key.clean


METRIC_LABELS: ExtensionPoint[MetricLabels] = ExtensionPoint("metric_labels")


@cache
def metric_labels() -> MetricLabels:
    """The names of all figures, those of features after our own."""
    tasks, meaning, headlines = dict(TASKS), dict(MEANING), HEADLINES
    beside: dict[str, tuple[str, ...]] = {}
    for added in METRIC_LABELS.all():
        tasks |= added.tasks
        meaning |= added.meaning
        headlines += added.headlines
        beside |= added.beside
    return MetricLabels(tasks, meaning, headlines, beside)


def headline_keys(keys: Iterable[MetricKey]) -> list[MetricKey]:
    """Those of figures that tell most, at most three of each task and direction.

    Where labels are recognised, how well they are found by nearness is none of them; nor are those of tasks that a
    run does not answer by (`MetricLabels.beside`).
    """
    keys = list(keys)
    measured = {key.task for key in keys}
    others = {name for task, names in metric_labels().beside.items() if task in measured for name in names}
    recognised = {_columns(key) for key in keys if key.task == "recognition"}
    counts: Counter[tuple[str, Direction]] = Counter()
    chosen = []
    for key in filter(metric_labels().is_headline, keys):
        if key.task in others or (key.task == "retrieval" and _columns(key) in recognised):
            continue
        counts[key.task, key.direction] += 1
        if counts[key.task, key.direction] <= 3:
            chosen.append(key)
    return chosen


def _columns(key: MetricKey) -> frozenset[str]:
    return frozenset((key.direction.source, key.direction.target))
