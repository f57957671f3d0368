"""One self-contained HTML page for a run: figures with error bars, curves, images, audio clips, what was left out.

No network, no script, no library: inline SVG and data URLs under a policy that forbids everything else.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_atomic, write_json
from plait.core.objective import loss_column, losses_of_row
from plait.core.pages import number, render
from plait.core.rejects import RejectKind
from plait.data.record import Rejected
from plait.data.stores import location, read_place
from plait.evaluation.findings import Confusion, Findings, GalleryKind
from plait.evaluation.keys import Metric, Metrics
from plait.reports.charts import Panel, bar, coverage_panel, loss_panel, reliability_panel
from plait.reports.metric_labels import headline_keys, metric_labels
from plait.reports.overfitting import gap
from plait.training.encoder_curve import EncoderCurve, read_curves
from plait.training.parts import describe_parts


@dataclass
class RunInfo:
    """What is known of a run and its data; every part may be empty."""

    title: str = "Plait"
    metadata: dict[str, Any] = field(default_factory=dict)  # run.json
    log: list[dict[str, Any]] = field(default_factory=list)  # rows of log.jsonl
    manifest: dict[str, Any] = field(default_factory=dict)  # the data set's
    rejects: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)  # by part of the model
    encoders: dict[str, EncoderCurve] = field(default_factory=dict)  # by name, those that learnt labels


def read_run(folder: Path, dataset: str | Path | None = None) -> RunInfo:
    """Gather a run's facts from its folder and its data set's; files that are not there leave their part empty.

    Of a step that a resumed run took twice, the later row counts. Raises PlaitError for a file that is damaged.
    """
    folder = Path(folder)
    info = RunInfo(title=folder.resolve().name)
    if (folder / "run.json").is_file():
        info.metadata = read_json(folder / "run.json")
    rows = {(row.get("step"), row.get("split")): row for row in _read_lines(folder / "log.jsonl", torn=True)}
    info.log = sorted(rows.values(), key=lambda row: row.get("step", 0))
    info.encoders = read_curves(folder)
    place = location(dataset) if dataset else None
    if place is None and "dataset" in info.metadata:
        place = read_place(info.metadata["dataset"], folder)
    if isinstance(place, Path) and (place / "manifest.json").is_file():
        info.manifest = read_json(place / "manifest.json")
        info.rejects = _read_lines(place / "rejects.jsonl")
    return info


def _read_lines(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; with `torn`, a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for line_number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if torn and line_number == len(lines):
                break
            raise PlaitError(f"{path}, line {line_number}, is not JSON: {error}. Delete the line.") from error
    return rows


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write the figures as JSON, one flat object; what is not a finite number becomes null."""
    always, more = ("value", "stderr", "chance", "baseline", "n"), ("low", "high")
    clean = {
        str(key): {field: _finite(metric.get(field)) for field in (*always, *(name for name in more if name in metric))}
        for key, metric in metrics.items()
    }
    write_json(path, clean)


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


# --- the page ----------------------------------------------------------------------------------------------------

CARDS = 5  # figures that stand above the tables
LABELS = 40  # up to which a confusion is shown as a matrix
REASONS = 30  # for rejecting that are listed


@dataclass(frozen=True)
class FigureRow:
    """A row of the tables of figures: what was measured from what to what, and how it stands to chance and baseline."""

    direction: str
    label: str
    meaning: str
    kind: str
    metric: Metric
    clean: Metric | None  # without records that have a near-duplicate in train
    bar: Markup


@dataclass(frozen=True)
class FigureTable:
    """The figures of a task, and whether any of them stands beside chance or a baseline, or is of some records."""

    title: str
    rows: list[FigureRow]

    @property
    def has_clean(self) -> bool:
        """Whether any figure is also of records without near-duplicates."""
        return any(row.clean is not None for row in self.rows)

    @property
    def has_bars(self) -> bool:
        """Whether any figure is a share."""
        return any(row.bar for row in self.rows)

    def has(self, name: str) -> bool:
        """Whether any figure has a field of that name: chance, baseline, n."""
        return any(row.metric.get(name) is not None for row in self.rows)


def write_report(path: Path, metrics: Metrics, findings: Findings, run: RunInfo) -> None:
    """Write the page: the verdict, images and audio, five figures, then tables. Raises PlaitError where it cannot be
    written."""
    page = render(
        "reports/run.html",
        title=run.title,
        summary=_summary(run),
        findings=findings,
        galleries_title=_galleries_title(findings),
        cards=_cards(metrics),
        tables=_tables(metrics),
        curves=_encoder_curves(run.encoders) + _curves(run.log),
        reliabilities=[
            panel(finding) for finding in findings.reliabilities for panel in (reliability_panel, coverage_panel)
        ],
        confusions=[_confusion(finding) for finding in findings.confusions],
        run=run,
        reasons=_reasons(run.rejects),
        notes=[note for kind in ("warnings", "split_notes", "notes") for note in run.manifest.get(kind, [])]
        + run.metadata.get("notes", []),
        metadata=json.dumps(run.metadata, ensure_ascii=False, indent=1, default=str),
    )
    write_atomic(path, page)


def _galleries_title(findings: Findings) -> str:
    """What the galleries show, in a few words."""
    kinds = {gallery.kind for gallery in findings.galleries}
    if kinds & {GalleryKind.MADE, GalleryKind.WRITTEN}:
        return "What it makes and finds"
    return "Right and wrong answers" if kinds & {GalleryKind.MISTAKES, GalleryKind.RIGHT} else "What it finds"


# --- figures -----------------------------------------------------------------------------------------------------


def _tables(metrics: Metrics) -> list[FigureTable]:
    """The figures by task, in the order of their labels; those of single classes stand in the confusion matrices."""
    present = dict.fromkeys(key.task for key in metrics)
    known = [task for task in metric_labels().tasks if task in present]
    return [_table(task, metrics) for task in dict.fromkeys([*known, *present])]


def _table(task: str, metrics: Metrics) -> FigureTable:
    rows: list[FigureRow] = []
    before = None
    for key, metric in metrics.items():
        of_all = key.clean and replace(key, clean=False) in metrics  # stands beside that figure
        if key.task != task or key.label is not None or of_all:
            continue
        label, kind, meaning = metric_labels().meaning.get(key.metric, (key.metric, "number", ""))
        shown = "" if key.direction == before else key.direction.arrow
        drawn = bar(metric) if kind == "share" else Markup("")
        rows.append(FigureRow(shown, label, meaning, kind, metric, metrics.get(replace(key, clean=True)), drawn))
        before = key.direction
    return FigureTable(metric_labels().tasks.get(task, task), rows)


def _cards(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Label, figure and note of the five figures that tell most: the headlines of each task in turn."""
    by_task: dict[str, list[tuple[str, str, str]]] = {}
    for key in headline_keys(metrics):
        metric = metrics[key]
        if metric.get("value") is None:
            continue
        label, kind, _ = metric_labels().meaning[key.metric]
        beside = (("chance", "guessing"), ("baseline", "baseline"))
        others = [f"{name} {number(metric[field], kind)}" for field, name in beside if metric.get(field) is not None]
        note = "; ".join([key.direction.arrow, *others])
        by_task.setdefault(key.task, []).append((label, number(metric.get("value"), kind), note))
    rounds = zip_longest(*by_task.values())
    return [card for cards in rounds for card in cards if card is not None][:CARDS]


# --- charts and tables -------------------------------------------------------------------------------------------


def _encoder_curves(encoders: dict[str, EncoderCurve]) -> list[Panel]:
    """A panel for each encoder that learnt labels, before the model did."""
    return [
        loss_panel(
            f"{name} encoder: labels", {"train": list(zip(map(float, one.steps), one.losses, strict=True))}, None
        )
        for name, one in encoders.items()
        if one.steps
    ]


def _curves(log: list[dict[str, Any]]) -> list[Panel]:
    """A panel for each objective: training and validation over steps."""
    panels = []
    for name in dict.fromkeys(name for row in log for name in losses_of_row(row)):
        column = loss_column(name)
        lines: dict[str, list[tuple[float, float]]] = {"train": [], "val": []}
        for row in log:
            if row.get("split") in lines and math.isfinite(row.get(column, math.nan)):
                lines[row["split"]].append((float(row["step"]), float(row[column])))
        if any(lines.values()):
            panels.append(loss_panel(name, lines, gap(log, column)))
    return panels


@dataclass(frozen=True)
class ConfusionView:
    """A confusion as it is shown: a matrix where labels are few, else the pairs that are confused most."""

    title: str
    labels: list[str]
    matrix: list[list[tuple[int, float]]]  # counts and their shares of the row, by truth and answer
    f1: list[float] | None
    pairs: list[tuple[str, str, int, int]]  # truth, taken for, times, of


def _confusion(confusion: Confusion) -> ConfusionView:
    counts, labels = confusion.counts, confusion.labels
    f1 = None if confusion.f1 is None else [float(value) for value in confusion.f1]
    if len(labels) > LABELS:
        wrong = counts - np.diag(np.diag(counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:20]
        places = [divmod(int(i), len(labels)) for i in order if wrong.flat[i]]
        pairs = [(labels[a], labels[b], int(wrong[a, b]), int(counts[a].sum())) for a, b in places]
        return ConfusionView(confusion.title, labels, [], f1, pairs)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    matrix = [
        [(int(count), float(share)) for count, share in zip(row, row_shares, strict=True)]
        for row, row_shares in zip(counts, shares, strict=True)
    ]
    return ConfusionView(confusion.title, labels, matrix, f1, [])


def _reasons(rejects: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Why something was rejected, how often, the first place, and its reason in full."""
    counts: Counter[RejectKind] = Counter()
    first: dict[RejectKind, Rejected] = {}
    for row in map(Rejected.of_row, rejects):
        counts[row.kind] += 1
        first.setdefault(row.kind, row)
    rows = [
        (kind.label, f"{count:,}", _place(first[kind]), first[kind].reason[:200])
        for kind, count in counts.most_common(REASONS)
    ]
    if len(counts) > REASONS:
        rest = sum(count for _, count in counts.most_common()[REASONS:])
        rows.append((f"{len(counts) - REASONS} other reasons", f"{rest:,}", "", "see rejects.jsonl"))
    return rows


def _place(row: Rejected) -> str:
    return row.file + (f", line {row.line}" if row.line is not None else "")


def _summary(run: RunInfo) -> str:
    """A line about the run: size, parameters, steps, time, seed."""
    facts = run.metadata
    parts = []
    if "size" in facts:
        parts.append(f"size {facts['size']}")
    if run.parameters:
        parts.append(f"{sum(run.parameters.values()):,} parameters")
    parts += [f"{name} encoder {steps} steps" for name, steps in facts.get("recogniser_steps", {}).items()]
    if "steps" in facts:
        steps = f"{(facts.get('revisions') or [facts])[-1]['steps']} steps"
        parts.append(
            f"{steps} in {len(facts['parts']) + 1} parts ({describe_parts(facts)})" if "parts" in facts else steps
        )
    if isinstance(facts.get("seconds"), (int, float)) and facts["seconds"]:
        parts.append(f"trained {facts['seconds']:.0f} s")
    if "seed" in facts:
        parts.append(f"seed {facts['seed']}")
    if isinstance(facts.get("started"), (int, float)):
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts["started"])))
    return " · ".join(parts)
