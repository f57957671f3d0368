"""The report of a study: what was tried, what mattered, and whether the best beats the default on fresh seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup

from plait.core.files import write_atomic
from plait.core.pages import number, render
from plait.reports.charts import Axes, Panel, bar, span_of, ticks

_STATES = {"complete": "complete", "pruned": "stopped early", "failed": "failed", "running": "at work"}


def verdict(default: list[float], best: list[float]) -> dict[str, Any]:
    """Whether the best recipe's losses on fresh seeds lie below the default's by more than seeds vary.

    That is so where the difference of the means exceeds twice its standard error, the root of the sum of var/n of both.
    Infinite losses are of runs that diverged. `better` is True, False (worse) or None (not told apart).
    """
    if not default or not best:
        return {"better": None, "text": "No trial beat the default recipe, so there was nothing to train again."}
    means = statistics.fmean(default), statistics.fmean(best)
    shown: dict[str, Any] = {"default": [_finite(v) for v in default], "best": [_finite(v) for v in best]}
    bad, also = sum(map(math.isinf, default)), sum(map(math.isinf, best))
    if bad or also:
        better = None if bad == also else bad > also
        text = f"On fresh seeds the default diverged {bad} of {len(default)} times, the best {also} of {len(best)}."
        return {**shown, "better": better, "text": text}
    gain = means[0] - means[1]
    shown |= {"default_mean": means[0], "best_mean": means[1], "gain": gain}
    if min(len(default), len(best)) < 2:
        text = f"On one fresh seed the best recipe is {gain:.4f} lower; to tell how far seeds vary takes two."
        return {**shown, "better": None, "text": text}
    error = math.sqrt(statistics.variance(default) / len(default) + statistics.variance(best) / len(best))
    better = None if abs(gain) <= 2 * error else gain > 0
    word = {True: "lower than", False: "higher than", None: "not told apart from"}[better]
    text = (
        f"On {len(best)} fresh seeds the best recipe's loss is {word} the default's: {means[1]:.4f} against "
        f"{means[0]:.4f}, a difference of {gain:.4f} where seeds make ± {error:.4f}."
    )
    return {**shown, "standard_error": error, "better": better, "text": text}


def uncompared(number: int) -> dict[str, Any]:
    """The verdict where no fresh seeds were asked for."""
    text = f"Trial {number} is the best; without fresh seeds (--seeds 0) it was not compared with the default."
    return {"better": None, "text": text}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_study_report(path: Path, title: str, study: dict[str, Any]) -> None:
    """Write the page of what `study.json` holds. Raises PlaitError where it cannot be written."""
    trials, fields = study.get("trials", []), study["settings"]["fields"]
    objective = study["settings"]["objective"]
    counts = ", ".join(f"{count} {_STATES[state]}" for state, count in study.get("counts", {}).items() if count)
    settings = {key: value for key, value in study["settings"].items() if key != "fields"}
    page = render(
        "tuning/study.html",
        title=title,
        summary=f"{counts or 'no trial yet'} · {objective} on val, lower is better",
        verdict=study.get("verdict"),
        cards=_cards(study, fields),
        history=_history(trials, objective),
        importance=_importance(study.get("importance") or {}),
        guards=_guards(trials, fields),
        slices=_slices(trials, fields),
        names=[field["name"] for field in fields],
        trials=[_trial(row, fields, study.get("best")) for row in trials],
        fresh=_fresh(study.get("fresh") or []),
        settings=json.dumps(settings, ensure_ascii=False, indent=1),
    )
    write_atomic(path, page)


def _importance(shares: dict[str, float]) -> list[tuple[str, Markup, str]]:
    """Rows of what mattered, each with a bar."""
    return [(name, bar({"value": share}), f"{share * 100:.0f} %") for name, share in shares.items()]


def _cards(study: dict[str, Any], fields: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The best and the default trial, and the best value of each field."""
    best = study.get("best")
    if not best:
        return []
    cards = [("best", number(best["value"], "value"), f"trial {best['number']}")]
    default = next((row for row in study["trials"] if row["number"] == 0), None)
    if default:
        note = default["note"] or _STATES[default["state"]]
        cards.append(("default", number(default["value"], "value"), f"trial 0, {note[:60]}"))
    for field in fields:
        name = field["name"]
        shown = number(best["params"].get(name), "value")
        cards.append((name, shown, f"default {number(field['default'], 'value')}"))
    return cards


def _seen(row: dict[str, Any]) -> float | None:
    """A trial's value, or the last that was seen of one that was stopped."""
    if row["value"] is not None:
        return float(row["value"])
    known = {int(at): value for at, value in row["validations"].items()}
    return float(known[max(known)]) if known else None


def _values(trials: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """The trials of which a value is known, each with it."""
    return [(row, value) for row in trials if (value := _seen(row)) is not None]


def _dot(axes: Axes, x: float, row: dict[str, Any], value: float) -> None:
    """Filled where a trial is complete, hollow where it was stopped; the default is orange."""
    colour = "var(--val)" if row["number"] == 0 else "var(--train)"
    title = f"trial {row['number']}, {_STATES[row['state']]}: {number(value, 'value')}"
    axes.dot(x, value, colour, row["state"] == "complete", title)


def _history(trials: list[dict[str, Any]], objective: str) -> Panel | None:
    """Values by trial, and the best so far; None where nothing was validated."""
    known = _values(trials)
    if not known:
        return None
    last = max(row["number"] for row in trials)
    span = span_of([value for _, value in known])
    axes = Axes((-0.03 * last - 0.1, last * 1.03 + 0.1), span)
    axes.y_axis(ticks(*span))
    axes.x_axis([tick for tick in ticks(0, last, 6) if float(tick).is_integer()], "{:.0f}".format)
    steps: list[tuple[float, float]] = []
    best = math.inf
    for row in trials:
        if row["value"] is not None and row["value"] < best:
            steps += [(row["number"], best)] if steps else []
            best = row["value"]
        if best < math.inf:
            steps.append((row["number"], best))
    axes.line(steps, "curve train")
    for row, value in known:
        _dot(axes, row["number"], row, value)
    return Panel(f"{objective} by trial", "the line is the best so far", axes.svg(f"{objective} by trial"))


def _slices(trials: list[dict[str, Any]], fields: list[dict[str, Any]]) -> list[Panel]:
    """Values by each field that was tuned."""
    known = _values(trials)
    if not known:
        return []
    span = span_of([value for _, value in known])
    panels = []
    for field in fields:
        name, scale = field["name"], math.log if field["log"] else float
        low, high = scale(field["low"]), scale(field["high"])
        margin = 0.03 * (high - low)
        axes = Axes((low - margin, high + margin), span)
        axes.y_axis(ticks(*span))
        for mark in field["choices"] or _round_values(field["low"], field["high"], field["log"]):
            axes.text(axes.x(scale(mark)), axes.height - 6, f"{mark:.4g}", "middle")
        for row, value in known:
            if name in row["params"]:
                _dot(axes, scale(row["params"][name]), row, value)
        panels.append(Panel(name, f"default {number(field['default'], 'value')}", axes.svg(name)))
    return panels


def _round_values(low: float, high: float, log: bool) -> list[float]:
    """Where an axis has numbers."""
    if not log:
        return ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 3) if high / low > 30 else (1, 2, 5)
    return [value for p in powers for m in parts if low * 0.999 <= (value := m * 10.0**p) <= high * 1.001]


def _guards(trials: list[dict[str, Any]], fields: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What each guard alone did to validation, with all else at the default."""
    default = {field["name"]: field["default"] for field in fields}
    values = {tuple(row["params"].get(name) for name in default): row["value"] for row in trials}
    base = values.get(tuple(default.values()))
    rows: list[tuple[str, ...]] = []
    for field in fields:
        if not field.get("guard"):
            continue
        other = next(choice for choice in field["choices"] if choice != field["default"])
        changed = values.get(tuple({**default, field["name"]: other}.values()))
        on, off = (base, changed) if field["default"] else (changed, base)
        outcome = "not known: a trial was stopped or failed"
        if on is not None and off is not None:
            outcome = "helped" if on < off else "did not help"
        setting = number(max(field["choices"]), "value") if field["name"] != "augment" else "on"
        rows.append((field["name"], setting, number(off, "value"), number(on, "value"), outcome))
    return rows


def _trial(row: dict[str, Any], fields: list[dict[str, Any]], best: dict[str, Any] | None) -> list[Any]:
    """A row of the table of trials; the best one's number is bold."""
    is_best = best is not None and row["number"] == best["number"]
    return [
        Markup("<b>{}</b>").format(row["number"]) if is_best else row["number"],
        _STATES[row["state"]],
        number(_seen(row), "value"),
        *(number(row["params"].get(field["name"]), "value") for field in fields),
        "–" if row["seconds"] is None else f"{row['seconds']:.0f}",
        row["note"],
    ]


def _fresh(runs: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The runs on fresh seeds, by trial and seed."""
    ordered = sorted(runs, key=lambda run: (run["trial"], run["seed"]))
    return [(run["trial"], run["seed"], _STATES[run["state"]], number(run["value"], "value")) for run in ordered]
