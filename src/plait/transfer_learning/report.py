"""The report of a transfer study: accuracy by way to begin and labels, where it pays, and what was forgotten."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.files import write_atomic
from plait.reports.html import page, table, ticks

COLOURS = {"scratch": "var(--dim)", "frozen": "var(--good)", "lora": "var(--train)", "full": "var(--val)"}
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 300, 46, 30

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
    found = []
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
            found.append({"labels": count, "way": way, "gain": gain, "standard_error": known, "pays": pays})
    return found


def write_comparison(path: Path, title: str, study: dict[str, Any]) -> None:
    """Write the page of what a study's `study.json` holds. Raises PlaitError where it cannot be written."""
    rows: Rows = study["rows"]
    labels = list(dict.fromkeys(row["labels"] for row in rows))
    ways = [way for way in COLOURS if any(row["way"] == way for row in rows)]
    settings = study["settings"]
    summary = (
        f"{escape(settings['source'])} → {escape(study['dataset'])} · {escape(settings['read'])} → "
        f"{escape(settings['answered'])} · {len(rows)} runs"
    )
    shown = _image(rows, labels, ways) + _table(rows, labels, ways)
    if study.get("as_it_is") is not None:
        shown += f"<p>The source as it is, without any of these records: {study['as_it_is'] * 100:.1f} %.</p>"
    sections = [("accuracy", "Accuracy by labels", shown)]
    sections.append(("pays", "Where it pays", _pays(study.get("verdicts", []))))
    if study.get("before") is not None:
        sections.append(("forgetting", "What was forgotten", _forgetting(rows, labels, ways, study["before"])))
    told = escape(json.dumps(settings, ensure_ascii=False, indent=1))
    sections.append(("study", "This study", f"<pre>{told}</pre>"))
    write_atomic(path, page(title, summary, "", sections))


def _shown(values: list[float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean * 100:.1f}" if math.isnan(error) else f"{mean * 100:.1f} ± {error * 100:.1f}"


def _table(rows: Rows, labels: list[str], ways: list[str]) -> str:
    body = [[escape(count), *(_shown(_of(rows, count, way)) for way in ways)] for count in labels]
    note = '<p class="dim">Per cent of test records named right, mean over seeds ± its standard error.</p>'
    return note + table(["records a label", *ways], body, numbers=tuple(range(1, len(ways) + 1)))


def _pays(found: list[dict[str, Any]]) -> str:
    words = {True: "pays", False: "costs", None: "not told apart"}
    body = [
        [escape(v["labels"]), escape(v["way"]), f"{v['gain'] * 100:+.1f}",
         "–" if v["standard_error"] is None else f"{v['standard_error'] * 100:.1f}", f"<b>{words[v['pays']]}</b>"]
        for v in found
    ]  # fmt: skip
    note = '<p class="dim">Points over scratch; it pays, or costs, where that is more than two standard errors.</p>'
    return note + table(["records a label", "begun", "gain", "±", ""], body, numbers=(2, 3))


def _forgetting(rows: Rows, labels: list[str], ways: list[str], before: float) -> str:
    began = [way for way in ways if way != "scratch"]
    body = [[escape(count), *(_shown(_of(rows, count, way, "old")) for way in began)] for count in labels]
    note = f'<p class="dim">The source\'s own test: {before * 100:.1f} % before, and after each way.</p>'
    return note + table(["records a label", *began], body, numbers=tuple(range(1, len(began) + 1)))


def _image(rows: Rows, labels: list[str], ways: list[str]) -> str:
    """Accuracy over labels, a line for each way, with error bars."""
    if not rows:
        return "<p>No run has ended yet.</p>"

    def x(place: float) -> float:
        return LEFT + 30 + (WIDTH - LEFT - 60) * place / max(len(labels) - 1, 1)

    def y(value: float) -> float:
        return 10 + (HEIGHT - BOTTOM - 10) * (1 - value)

    parts = [
        f'<path class="grid" d="M{LEFT} {y(t):.1f}H{WIDTH - 10}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t * 100:.0f} %</text>'
        for t in ticks(0.0, 1.0, 5)
    ]
    parts += [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(count)}</text>'
        for i, count in enumerate(labels)
    ]
    for number, way in enumerate(ways):
        points = []
        for i, count in enumerate(labels):
            mean, error = mean_and_error(_of(rows, count, way))
            if math.isnan(mean):
                continue
            at = x(i) + (number - 1.5) * 5
            points.append(f"{at:.1f} {y(mean):.1f}")
            low, high = (mean, mean) if math.isnan(error) else (max(mean - error, 0), min(mean + error, 1))
            parts.append(f'<path d="M{at:.1f} {y(low):.1f}V{y(high):.1f}" stroke="{COLOURS[way]}" stroke-width="2"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(mean):.1f}" r="3.5" fill="{COLOURS[way]}"/>')
        parts.append(f'<path class="curve" d="M{"L".join(points)}" stroke="{COLOURS[way]}"/>' if points else "")
    key = " · ".join(f'<span class="key" style="background:{COLOURS[way]}"></span>{way}' for way in ways)
    return (
        f'<figure class="panel" style="max-width:40rem"><figcaption>{key}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy by records a label">'
        f"{''.join(parts)}</svg></figure>"
    )
