"""How good a run of histories is known to be, for people who look at what it recommends."""

from __future__ import annotations

from pathlib import Path

from plait.core.files import read_json
from plait.evaluation.keys import Metrics
from plait.recommend.evaluate import DIRECTION, TASK

FIGURE = "hr_at_10"


def describe_quality(folder: Path | None) -> str:
    """A sentence on how often the item that came is among ten, where `plait evaluate` measured it; else how to have it
    measured.

    Args:
        folder: That of the model's checkpoint.
    """
    places = [folder, *folder.resolve().parents][:4] if folder is not None else []
    run = next((place for place in places if (place / "run.json").is_file()), None)
    if run is None:
        return ""
    if (run / "metrics.json").is_file():
        for key, metric in Metrics.read(read_json(run / "metrics.json")).items():
            value, baseline, n = metric.get("value"), metric.get("baseline"), metric.get("n")
            if (key.task, key.direction, key.metric) == (TASK, DIRECTION, FIGURE) and value is not None and n:
                beside = f", what followed what alone in {baseline:.1%}" if baseline is not None else ""
                return f"How good: of {n:,} users, what they chose next was among ten in {value:.1%}{beside}."
    return f"How good that is was not measured yet: plait evaluate {run}"
