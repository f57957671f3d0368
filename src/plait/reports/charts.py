"""Charts as inline SVG, for all reports: lines, dots, bars, and their axes. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from plait.evaluation.findings import Reliability
from plait.evaluation.keys import Metric
from plait.reports.overfitting import Gap

POINTS = 300  # that a line has at most


@dataclass(frozen=True)
class Panel:
    """A chart with its heading and a note, as the macro `panels` shows it."""

    title: str
    note: str | Markup
    svg: Markup


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two bounds, at most `count` + 1."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Axes:
    """A plane to draw on; what is drawn is kept in order.

    Attributes:
        width, height: of the whole drawing.
        left, bottom: room for the axes' numbers.
        x_span, y_span: the values at the ends of both axes; what lies beyond the upper end is drawn at it.
    """

    x_span: tuple[float, float]
    y_span: tuple[float, float]
    width: int = 420
    height: int = 230
    left: int = 46
    bottom: int = 24
    parts: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> float:
        """The horizontal place of a value."""
        low, high = self.x_span
        return self.left + (self.width - self.left - 10) * (value - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        """The vertical place of a value."""
        low, high = self.y_span
        return 10 + (self.height - self.bottom - 10) * (1 - (min(value, high) - low) / ((high - low) or 1.0))

    def y_axis(self, values: Iterable[float], label: Callable[[float], str] = "{:.4g}".format) -> None:
        """Numbers on the left, each with a line across."""
        for value in values:
            place = self.y(value)
            self.add(f'<path class="grid" d="M{self.left} {place:.1f}H{self.width - 10}"/>')
            self.text(self.left - 6, place + 4, label(value), "end")

    def x_axis(self, values: Iterable[float], label: Callable[[float], str] = "{:.4g}".format) -> None:
        """Numbers below."""
        for value in values:
            self.text(self.x(value), self.height - 6, label(value), "middle")

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """A text at a place of the drawing."""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], css: str, colour: str | None = None) -> None:
        """A line through points; many of them are averaged to a few hundred."""
        if points:
            path = "L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in _thin(points))
            style = f' stroke="{colour}"' if colour else ""
            self.add(f'<path class="{css}" d="M{path}"{style}/>')

    def dot(self, x: float, y: float, colour: str, filled: bool = True, title: str = "") -> None:
        """A dot at a value, with a text that shows under the pointer."""
        tooltip = f"<title>{escape(title)}</title>" if title else ""
        fill = colour if filled else "none"
        self.add(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.5">{tooltip}</circle>'
        )

    def add(self, svg: str) -> None:
        """A piece of SVG that holds nothing unescaped."""
        self.parts.append(Markup(svg))

    def svg(self, label: str) -> Markup:
        """The drawing; `label` is read out in its place."""
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
            f"{''.join(self.parts)}</svg>"
        )


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `POINTS` points, each the mean of its neighbours'."""
    if len(points) <= POINTS:
        return points
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in np.array_split(np.array(points), POINTS)]


def bar(metric: Metric) -> Markup:
    """A share as a bar with its error, and ticks at chance (dashed) and at the baseline."""
    value = metric.get("value")
    if value is None or not math.isfinite(value):
        return Markup("")
    axes = Axes((0.0, 1.0), (0.0, 1.0), width=140, height=16, left=2)
    axes.add(f'<rect class="fill" x="2" y="4" width="{axes.x(_share(value)) - 2:.1f}" height="8" rx="2"/>')
    error = metric.get("stderr")
    if error is not None and math.isfinite(error):
        axes.add(f'<path class="line" d="M{axes.x(_share(value - error)):.1f} 8H{axes.x(_share(value + error)):.1f}"/>')
    for key in ("chance", "baseline"):
        place = metric.get(key)
        if place is not None and math.isfinite(place):
            axes.add(f'<path class="line {key}" d="M{axes.x(_share(place)):.1f} 1V15"/>')
    return Markup(
        f'<svg class="bar" viewBox="0 0 140 16" width="140" height="16" aria-hidden="true">{"".join(axes.parts)}</svg>'
    )


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def loss_panel(name: str, lines: dict[str, list[tuple[float, float]]], opening: Gap | None) -> Panel:
    """Training and validation losses over steps, the gap at the end and where it opened.

    Args:
        name: of the objective.
        lines: (step, loss) by split.
        opening: the gap between the two, if both are known.
    """
    points = [point for line in lines.values() for point in line]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    # The first steps fall from far above; what matters lies below.
    high = min(high, float(np.quantile(values, 0.97)) * 1.1 + 1e-9) if len(values) > 20 else high
    span = (low - 0.05 * (high - low), high) if high > low else (low - 0.5, high + 0.5)
    last = max(step for step, _ in points)
    axes = Axes((0.0, max(last, 1)), span)
    axes.y_axis(ticks(*span))
    axes.x_axis(ticks(0, last, 5), "{:.0f}".format)
    for split, line in lines.items():
        axes.line(line, f"curve {split}")
    ends = {split: line[-1][1] for split, line in lines.items() if line}
    note = Markup(" · ").join(
        Markup('<span class="key {0}"></span>{0} {1:.3f}').format(split, value) for split, value in ends.items()
    )
    if opening is not None:
        where = f"open from step {opening.opened}" if opening.opened is not None else "never open"
        note += Markup(" · gap {:+.3f}, {}<br>validation lowest at step {}").format(
            opening.gaps[-1], where, opening.lowest
        )
        if opening.opened is not None:
            axes.add(f'<path class="line baseline" d="M{axes.x(opening.opened):.1f} 10V{axes.height - axes.bottom}"/>')
    return Panel(name, note, axes.svg(f"loss of {name} by step"))


def reliability_panel(reliability: Reliability) -> Panel:
    """The share that is right over the probability believed, beside the diagonal of perfect calibration."""
    axes = Axes((0.0, 1.0), (0.0, 1.0), width=280, height=250, left=40, bottom=34)
    axes.y_axis((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "{:.1f}".format)
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        axes.text(axes.x(value), axes.height - 18, f"{value:.1f}", "middle")
    bins, peak = len(reliability.counts), max(int(reliability.counts.max(initial=1)), 1)
    for i, (right, count) in enumerate(zip(reliability.right, reliability.counts, strict=True)):
        if count:
            left, top = axes.x(i / bins) + 1, axes.y(right)
            axes.add(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{axes.x((i + 1) / bins) - left - 1:.1f}" '
                f'height="{max(axes.y(0) - top, 1):.1f}" fill="var(--train)" opacity="{0.25 + 0.6 * count / peak:.2f}">'
                f"<title>{count} answers</title></rect>"
            )
    axes.line([(0.0, 0.0), (1.0, 1.0)], "line baseline")
    axes.text(axes.x(0.5), axes.height - 3, "probability of the answer", "middle")
    note = (
        f"expected calibration error {reliability.error * 100:.1f} % · {int(reliability.counts.sum()):,} answers; "
        "darker bars hold more"
    )
    return Panel(reliability.title, note, axes.svg(f"share right by probability, {reliability.title}"))


def coverage_panel(reliability: Reliability) -> Panel:
    """The share that is right over how many answers are given, the surest first."""
    low = float(np.floor(min(reliability.accuracy[len(reliability.accuracy) // 10 :].min(initial=1.0), 0.95) * 20) / 20)
    axes = Axes((0.0, 1.0), (low, 1.0), width=280, height=250, left=40, bottom=34)
    axes.y_axis(np.linspace(low, 1.0, 6).tolist(), "{:.2f}".format)
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        axes.text(axes.x(value), axes.height - 18, f"{value:.1f}", "middle")
    start = len(reliability.coverage) // 50  # of the first few the share is a draw
    axes.line(list(zip(reliability.coverage[start:], reliability.accuracy[start:], strict=True)), "curve train")
    axes.text(axes.x(0.5), axes.height - 3, "share of answers given", "middle")
    at = {share: float(np.interp(share, reliability.coverage, reliability.accuracy)) for share in (1.0, 0.9, 0.8)}
    note = " · ".join(f"{value:.1%} right of {share:.0%}" for share, value in at.items())
    return Panel(f"{reliability.title}, the surest first", note, axes.svg(f"accuracy by coverage, {reliability.title}"))


def key(names: dict[str, str]) -> Markup:
    """A legend: name -> colour."""
    return Markup(" · ").join(
        Markup('<span class="key" style="background:{}"></span>{}').format(colour, name)
        for name, colour in names.items()
    )


def span_of(values: Sequence[float]) -> tuple[float, float]:
    """Bounds around what matters of values; the worst quarter may lie beyond."""
    low, high = min(values), max(values)
    ordered: list[Any] = sorted(values)
    middle = ordered[len(ordered) * 3 // 4]
    high = min(high, middle + 2 * (middle - low)) if middle > low else high
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin
