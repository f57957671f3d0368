"""Pages of HTML from Jinja2 templates: self-contained, without scripts and without a network.

A template lies in the folder `templates` of its package and is named "PACKAGE/FILE": "reports/run.html" is
`plait/reports/templates/run.html`. All of them extend "core/page.html". What is put into a page is escaped, unless it
is a `markupsafe.Markup`.
"""

from __future__ import annotations

import base64
import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

PACKAGE = Path(__file__).parent.parent


def render(template: str, **context: Any) -> str:
    """The page that a template makes of a context. A name that the context lacks is an error."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "data_url": data_url}
    environment.globals["style"] = Markup(_source("core/style.css"))
    return environment


def _source(name: str) -> str:
    package, _, file = name.partition("/")
    return (PACKAGE / package / "templates" / file).read_text(encoding="utf-8")


def number(value: float | None, kind: str = "number") -> str:
    """A figure for people.

    Args:
        value: the figure; None and what is not finite become a dash.
        kind: "share" for per cent, "ratio" or "number" for three digits, "value" for four.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "share":
        return f"{value * 100:.1f} %"
    if kind == "value":
        return f"{value:.4g}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def data_url(data: bytes, media_type: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
