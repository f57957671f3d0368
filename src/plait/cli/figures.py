"""How the commands that measure print their figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from plait.console import print_table

if TYPE_CHECKING:
    from plait.evaluation.keys import MetricKey
    from plait.library.evaluations import Metric


def show_figures(figures: Mapping[MetricKey, Metric]) -> None:
    """Print the main figures in words, one a line: value, 95 % interval, chance, the baseline."""
    from plait.core.pages import number
    from plait.reports.metric_labels import metric_labels

    rows = []
    for key, metric in figures.items():
        label, kind, _ = metric_labels().meaning[key.metric]
        low, high = (number(bound, kind) for bound in (metric.low, metric.high))
        likely = "" if metric.low is None else f"{low.removesuffix(' %')} to {high}"
        beside = ["" if one is None else number(one, kind) for one in (metric.chance, metric.baseline)]
        count = "" if metric.n is None else f"{metric.n:,}"
        rows.append((f"{key.direction.arrow}: {label}", number(metric.value, kind), likely, *beside, count))
    print_table(("figure", "value", "95 %", "guessing", "baseline", "records"), rows)
