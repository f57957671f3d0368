"""Pages from templates, with texts in the reader's language."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plait.modalities.media import MEDIA

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "zh")


@cache
def texts(language: str) -> dict[str, str]:
    """All texts of the pages in a language."""
    texts_by_key: dict[str, str] = json.loads((FOLDER / "texts" / f"{language}.json").read_text(encoding="utf-8"))
    return texts_by_key


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["duration"] = duration
    environment.filters["bytes"] = byte_size
    environment.globals["element"] = element
    return environment


def element(kind: str) -> str:
    """The HTML element that shows a medium of a kind; empty for a text."""
    return MEDIA[kind].element if kind in MEDIA else ""


def render(template: str, language: str = "en", **values: Any) -> str:
    """A page or a part of one."""
    language = language if language in LANGUAGES else "en"
    return _environment().get_template(template).render(t=texts(language), language=language, **values)


def duration(seconds: float | None) -> str:
    """Seconds as "2:05"."""
    if seconds is None:
        return "…"
    total = max(int(seconds), 0)
    return (
        f"{total // 3600}:{total % 3600 // 60:02d}:{total % 60:02d}"
        if total >= 3600
        else f"{total // 60}:{total % 60:02d}"
    )


def byte_size(count: float) -> str:
    """Bytes as "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def curve(points: list[tuple[int, float]], steps: int, low: float, high: float) -> str:
    """Points (step, loss) as the `points` of an SVG polyline in a box of 600 x 160."""
    span = max(high - low, 1e-9)
    shown_points = points[:: max(len(points) // 300, 1)] + points[-1:]
    return " ".join(
        f"{600 * step / max(steps, 1):.1f},{150 - 140 * (loss - low) / span:.1f}" for step, loss in shown_points
    )
