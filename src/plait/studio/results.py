"""What the result page shows, read from a run's folder and its job's predictions."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.evaluation.keys import Metrics
from plait.reports.metric_labels import metric_labels

SHOWN = 5  # figures beside the verdict
MATRIX = 20  # labels of a confusion matrix, at most


@dataclass(frozen=True)
class Predicted:
    """What a model said of one record that training never saw.

    Attributes:
        id: The record's.
        column: The column that was read.
        kind: "image", "audio" or "text".
        source: The file that it came from.
        truth: Its label.
        answers: (label, probability), the likeliest first.
        simple: What the simple alternative says, "" where there is none.
        none: Whether the model thinks that none of its labels fits.
        text: The beginning of a text.
    """

    id: str
    column: str
    kind: str
    source: str
    truth: str
    answers: list[tuple[str, float]]
    simple: str = ""
    none: bool = False
    text: str = ""

    @property
    def right(self) -> bool:
        return self.answers[0][0] == self.truth


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        verdict: The sentence that `plait evaluate` ends with, "" where there is none.
        next_step: What it advises.
        figures: (name, value, chance) of the most telling metrics.
        predictions: Records of test.
        report: Whether there is a report to open.
        outcome: What the verdict rests on, as `plait.evaluation.outcome.Outcome` has it; empty where there is nothing.
    """

    verdict: str
    next_step: str
    figures: list[tuple[str, float, float | None]]
    predictions: list[Predicted]
    report: bool
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def alternative(self) -> str:
        """The simple alternative's name, "" where there is none."""
        return str(self.outcome.get("alternative") or "")

    def verdict_in(self, texts: dict[str, str]) -> tuple[str, str]:
        """The verdict and the next step in a language of the pages."""
        value, n = self.outcome.get("value"), self.outcome.get("n")
        if value is None:
            return self.verdict, self.next_step
        share, other = self.outcome.get("share", True), self.outcome.get("alternative_value")
        shown = [f"{100 * one:.1f}" if share else f"{one:.3g}" for one in (value, other) if one is not None]
        if other is None:
            sentence = texts["verdict_alone"].format(value=shown[0] + " %" * share, n=n)
        else:
            error = f"{100 * (self.outcome.get('stderr') or 0):.1f}"
            sentence = texts[f"verdict_{'share' if share else 'number'}"].format(
                value=shown[0], error=error, n=n, name=texts["simple"], other=shown[1]
            )
        judged = {True: "better", False: "worse", None: "equal"}[self.outcome.get("better")]
        judgement = texts[f"judged_{judged}"] if other is not None else ""
        return f"{sentence} {judgement}".strip(), texts[f"next_{judged}"]

    @property
    def right(self) -> int:
        return sum(one.right for one in self.predictions)

    @property
    def simple_right(self) -> int | None:
        """How many the simple alternative names right, None where it was not asked."""
        with_simple = [one for one in self.predictions if one.simple]
        return sum(one.simple == one.truth for one in with_simple) if with_simple else None

    @property
    def learnt_nothing(self) -> bool:
        """Whether no more is named right than guessing would, within two standard errors."""
        n, chance = len(self.predictions), 1 / max(len(self.labels), 1)
        return n > 0 and self.right / n < chance + 2 * math.sqrt(chance * (1 - chance) / n)

    @property
    def labels(self) -> list[str]:
        """The labels that were met, the most frequent first."""
        return [label for label, _ in Counter(one.truth for one in self.predictions).most_common()]

    def matrix(self) -> list[tuple[str, list[tuple[str, int]]]] | None:
        """A row a label, of (answer, count); None where there are too many labels for a table."""
        names = sorted({one.truth for one in self.predictions} | {one.answers[0][0] for one in self.predictions})
        if not 1 < len(names) <= MATRIX:
            return None
        counts = Counter((one.truth, one.answers[0][0]) for one in self.predictions)
        return [(truth, [(answer, counts[truth, answer]) for answer in names]) for truth in names]

    def confusion(self) -> list[tuple[str, str, int]]:
        """(truth, answer, count) of wrong answers, the most frequent first."""
        mistakes = Counter((one.truth, one.answers[0][0]) for one in self.predictions if not one.right)
        return [(truth, answer, count) for (truth, answer), count in mistakes.most_common(12)]


def read_result(run: Path, job_folder: Path) -> Result:
    """The result of a run; empty parts where it was not evaluated."""
    verdict = _json(job_folder / "verdict.json")
    metrics = verdict.get("figures") or _json(run / "metrics.json")
    return Result(
        str(verdict.get("sentence", "")), str(verdict.get("next_step", "")), _figures(metrics),
        _predictions(job_folder / "predictions.jsonl"), (run / "report.html").is_file(),
        verdict.get("outcome") or {},
    )  # fmt: skip


def _figures(metrics: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """The headline metrics first, of those with a chance level."""
    rows = []
    for key, metric in Metrics.read(metrics).items():
        value, chance = metric.get("value"), metric.get("chance")
        if key.main and value is not None and math.isfinite(value):
            rows.append((key, float(value), None if chance is None else float(chance)))
    labels = metric_labels()
    rows.sort(key=lambda row: (row[2] is None, not labels.is_headline(row[0])))
    return [(str(key), value, chance) for key, value, chance in rows[:SHOWN]]


def _predictions(path: Path) -> list[Predicted]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    predictions = []
    for line in lines:
        row = json.loads(line)
        answers = [(label, chance) for label, chance in row["answers"]]
        predictions.append(Predicted(
            row["id"], row["column"], row["kind"], row["source"], row["truth"], answers, row.get("simple", ""),
            row.get("none", False), row.get("text", ""),
        ))  # fmt: skip
    return predictions


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
