"""Over-fitting as images: losses over steps with the gap between training and validation, and calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from plait.evaluation.findings import Reliability
from plait.reports.html import ticks

OPEN = 0.05  # share of the validation loss beyond which a gap counts as open


@dataclass(frozen=True)
class Gap:
    """What lies between training and validation for one objective."""

    steps: list[int]
    gaps: list[float]  # validation less the mean of training since the validation before, nats
    opened: int | None  # the step from which it stayed above `OPEN` of the validation loss; None where it did not
    lowest: int  # the step of the lowest validation loss


def gap(log: list[dict[str, Any]], name: str) -> Gap | None:
    """The gap of an objective ("loss/text") over a run's log; None where one of the two sides was not logged."""
    rows = [row for row in log if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    train = [(int(row["step"]), float(row[name])) for row in rows if row.get("split") == "train"]
    val = [(int(row["step"]), float(row[name])) for row in rows if row.get("split") == "val"]
    steps, gaps, before = [], [], 0
    kept: list[float] = []
    for step, loss in val:
        seen = [value for at, value in train if before < at <= step]
        if seen:
            steps.append(step)
            gaps.append(loss - float(np.mean(seen)))
            kept.append(loss)
            before = step
    if not steps:
        return None
    wide = [g > OPEN * abs(loss) for g, loss in zip(gaps, kept, strict=True)]
    last_closed = max((i for i, w in enumerate(wide) if not w), default=-1)
    opened = steps[last_closed + 1] if last_closed + 1 < len(steps) else None
    return Gap(steps, gaps, opened, min(val, key=lambda point: point[1])[0])


def reliability_diagram(found: Reliability) -> str:
    """An SVG: the share that is right over the probability believed, beside the diagonal of perfect calibration."""
    width, height, left, bottom = 280, 250, 40, 34
    inner, tall = width - left - 10, height - bottom - 10

    def x(share: float) -> float:
        return left + inner * share

    def y(share: float) -> float:
        return 10 + tall * (1 - share)

    parts = [
        f'<path class="grid" d="M{left} {y(t):.1f}H{width - 10}"/>'
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.1f}</text>'
        f'<text x="{x(t):.1f}" y="{height - 18}" text-anchor="middle">{t:.1f}</text>'
        for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    bins, most = len(found.counts), max(int(found.counts.max(initial=1)), 1)
    for i, (right, count) in enumerate(zip(found.right, found.counts, strict=True)):
        if count:
            shade = 0.25 + 0.6 * count / most
            parts.append(
                f'<rect x="{x(i / bins) + 1:.1f}" y="{y(right):.1f}" width="{inner / bins - 2:.1f}" '
                f'height="{max(tall * right, 1):.1f}" fill="var(--train)" opacity="{shade:.2f}">'
                f"<title>{count} answers</title></rect>"
            )
    parts.append(f'<path class="line baseline" d="M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}"/>')
    parts.append(f'<text x="{x(0.5):.1f}" y="{height - 3}" text-anchor="middle">probability of the answer</text>')
    label = f"share right by probability, {escape(found.title)}"
    return (
        f'<figure class="panel"><figcaption><b>{escape(found.title)}</b><br>expected calibration error '
        f"{found.error * 100:.1f} % · {int(found.counts.sum()):,} answers; darker bars hold more</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def curves(log: list[dict[str, Any]]) -> str:
    """A panel for each objective: training and validation over steps, the gap at the end and where it opened."""
    names = list(dict.fromkeys(key for row in log for key in row if key.startswith("loss/")))
    panels = []
    for name in names:
        lines = {
            split: [(float(row["step"]), float(row[name])) for row in log if row.get("split") == split and name in row]
            for split in ("train", "val")
        }
        lines = {split: [p for p in points if math.isfinite(p[1])] for split, points in lines.items()}
        if any(lines.values()):
            panels.append(_panel(name.removeprefix("loss/"), lines, gap(log, name)))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else "<p>No losses were logged.</p>"


def _panel(name: str, lines: dict[str, list[tuple[float, float]]], opening: Gap | None) -> str:
    points = [p for line in lines.values() for p in line]
    right = max(p[0] for p in points)
    values = [p[1] for p in points]
    low, high = min(values), max(values)
    # The first steps fall from far above; what matters lies below.
    high = min(high, float(np.quantile(values, 0.97)) * 1.1 + 1e-9) if len(values) > 20 else high
    low, high = (low - 0.05 * (high - low), high) if high > low else (low - 0.5, high + 0.5)
    width, height, left, bottom = 420, 230, 44, 24

    def x(step: float) -> float:
        return left + (width - left - 10) * step / max(right, 1)

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * (1 - (min(value, high) - low) / (high - low))

    grid = "".join(
        f'<path class="grid" d="M{left} {y(t):.1f}H{width - 10}"/>'
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>'
        for t in ticks(low, high)
    )
    grid += "".join(
        f'<text x="{x(t):.1f}" y="{height - 6}" text-anchor="middle">{t:.0f}</text>' for t in ticks(0, right, 5)
    )
    paths = ""
    for split, line in lines.items():
        if line:
            path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in _thin(line))
            paths += f'<path class="curve {split}" d="M{path}"/>'
    ends = {split: line[-1][1] for split, line in lines.items() if line}
    note = " · ".join(f'<span class="key {split}"></span>{split} {value:.3f}' for split, value in ends.items())
    if opening is not None:
        note += f" · gap {opening.gaps[-1]:+.3f}"
        note += f", open from step {opening.opened}" if opening.opened is not None else ", never open"
        note += f"<br>validation lowest at step {opening.lowest}"
        if opening.opened is not None:
            paths += f'<path class="line baseline" d="M{x(opening.opened):.1f} 10V{height - bottom}"/>'
    return (
        f'<figure class="panel"><figcaption><b>{escape(name)}</b><br>{note}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss of {escape(name)} by step">'
        f"{grid}{paths}</svg></figure>"
    )


def _thin(line: list[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours'."""
    if len(line) <= most:
        return line
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in np.array_split(np.array(line), most)]
