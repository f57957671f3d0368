"""The report of a transfer study: accuracy by way to begin and labels, where it pays, and what was forgotten."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from plait.core.files import write_atomic
from plait.core.pages import render
from plait.reports.charts import Axes, Panel, key, ticks

COLOURS = {"scratch": "var(--dim)", "frozen": "var(--good)", "lora": "var(--train)", "full": "var(--val)"}

Rows = list[dict[str, Any]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; nan for none, and of one alone."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def _of(rows: Rows, labels: str, way: str, key: str = "accuracy") -> list[float]:
    return [row[key] for row in rows if row["labels"] == labels and row["way"] == way and row[key] is not None]


def verdicts(rows: Rows, labels: list[str]) -> list[dict[str, Any]]:
    """For each number of labels and each way but scratch: its gain over scratch, the gain's standard error (the root of
    the sum of both squared), and whether it pays: True or False where the gain is beyond two of these, else None."""
    judged = []
    for count in labels:
        base, base_error = mean_and_error(_of(rows, count, "scratch"))
        for way in COLOURS:
            values = _of(rows, count, way)
            if way == "scratch" or not values or math.isnan(base):
                continue
            mean, error = mean_and_error(values)
            both = math.hypot(error, base_error)
            gain = mean - base
            pays = None if math.isnan(both) or abs(gain) <= 2 * both else gain > 0
            known = None if math.isnan(both) else both
            judged.append({"labels": count, "way": way, "gain": gain, "standard_error": known, "pays": pays})
    return judged


def write_comparison(path: Path, title: str, study: dict[str, Any]) -> None:
    """Write the page of what a study's `study.json` holds. Raises PlaitError where it cannot be written."""
    rows: Rows = study["rows"]
    labels = list(dict.fromkeys(row["labels"] for row in rows))
    ways = [way for way in COLOURS if any(row["way"] == way for row in rows)]
    began = [way for way in ways if way != "scratch"]
    settings = study["settings"]
    before = study.get("before")
    page = render(
        "transfer_learning/study.html",
        title=title,
        summary=(
            f"{settings['source']} → {study['dataset']} · {settings['read']} → {settings['answered']} · "
            f"{len(rows)} runs"
        ),
        chart=_chart(rows, labels, ways),
        ways=ways,
        accuracy=[[count, *(_shown(_of(rows, count, way)) for way in ways)] for count in labels],
        as_it_is=study.get("as_it_is"),
        pays=[_pays(verdict) for verdict in study.get("verdicts", [])],
        began=began,
        before=before,
        forgetting=[] if before is None else _forgetting(rows, labels, began),
        settings=json.dumps(settings, ensure_ascii=False, indent=1),
    )
    write_atomic(path, page)


def _shown(values: list[float]) -> str:
    """Mean and standard error in per cent."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean * 100:.1f}" if math.isnan(error) else f"{mean * 100:.1f} ± {error * 100:.1f}"


def _pays(verdict: dict[str, Any]) -> list[Any]:
    """A row of where it pays."""
    words = {True: "pays", False: "costs", None: "not told apart"}
    error = "–" if verdict["standard_error"] is None else f"{verdict['standard_error'] * 100:.1f}"
    word = Markup("<b>{}</b>").format(words[verdict["pays"]])
    return [verdict["labels"], verdict["way"], f"{verdict['gain'] * 100:+.1f}", error, word]


def _forgetting(rows: Rows, labels: list[str], began: list[str]) -> list[list[str]]:
    """What each way still knows of the source's own test, by labels."""
    return [[count, *(_shown(_of(rows, count, way, "old")) for way in began)] for count in labels]


def _chart(rows: Rows, labels: list[str], ways: list[str]) -> Panel | None:
    """Accuracy over labels, a line for each way, with error bars; None where no run has ended."""
    if not rows:
        return None
    axes = Axes((-0.3, max(len(labels) - 1, 1) + 0.3), (0.0, 1.0), width=560, height=300, bottom=30)
    axes.y_axis(ticks(0.0, 1.0, 5), lambda value: f"{value * 100:.0f} %")
    for place, count in enumerate(labels):
        axes.text(axes.x(place), axes.height - 8, count, "middle")
    for number, way in enumerate(ways):
        points = []
        for place, count in enumerate(labels):
            mean, error = mean_and_error(_of(rows, count, way))
            if math.isnan(mean):
                continue
            at = place + (number - 1.5) * 0.03 * max(len(labels) - 1, 1)
            points.append((at, mean))
            if not math.isnan(error):
                axes.line([(at, max(mean - error, 0.0)), (at, min(mean + error, 1.0))], "curve", COLOURS[way])
            axes.dot(at, mean, COLOURS[way], title=f"{way}, {count} a label: {mean * 100:.1f} %")
        axes.line(points, "curve", COLOURS[way])
    return Panel("", key({way: COLOURS[way] for way in ways}), axes.svg("accuracy by records a label"))
