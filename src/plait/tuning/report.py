"""The report of a study: what was tried, what mattered, and whether the best beats the default on fresh seeds."""

from __future__ import annotations

import json
import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic
from plait.reports.html import page, table, ticks

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 230, 50, 24

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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_study_report(path: Path, title: str, study: dict[str, Any]) -> None:
    """Write the page of what `study.json` holds. Raises PlaitError where it cannot be written."""
    trials, fields = study.get("trials", []), study["settings"]["fields"]
    objective = study["settings"]["objective"]
    counts = ", ".join(f"{count} {_STATES[state]}" for state, count in study.get("counts", {}).items() if count)
    summary = f"{escape(counts or 'no trial yet')} · {escape(objective)} on val, lower is better"
    sections = [("history", "History", _history(trials, objective))]
    if study.get("importance"):
        sections.append(("importance", "What mattered", _importance(study["importance"])))
    if any(field.get("guard") for field in fields):
        sections.append(("guards", "Guards against over-fitting", _guards(trials, fields)))
    sections.append(("slices", "Slices", _slices(trials, fields)))
    sections.append(("trials", "Trials", _trials(trials, fields, study.get("best"))))
    if study.get("fresh"):
        sections.append(("fresh", "Fresh seeds", _fresh(study["fresh"])))
    settings = {key: value for key, value in study["settings"].items() if key != "fields"}
    shown = escape(json.dumps(settings, ensure_ascii=False, indent=1))
    sections.append(("study", "This study", f"<pre>{shown}</pre>"))
    write_atomic(path, page(title, summary, _top(study, fields), sections))


def _top(study: dict[str, Any], fields: list[dict[str, Any]]) -> str:
    verdict = study.get("verdict")
    told = f"<p><b>{escape(verdict['text'])}</b></p>" if verdict else ""
    best = study.get("best")
    if not best:
        return told
    default = next((row for row in study["trials"] if row["number"] == 0), None)
    cards = [("best", _number(best["value"]), f"trial {best['number']}")]
    if default:
        note = default["note"] or _STATES[default["state"]]
        cards.append(("default", _number(default["value"]), f"trial 0, {note[:60]}"))
    for field in fields:
        name = field["name"]
        cards.append((name, _number(best["params"].get(name)), f"default {_number(field['default'])}"))
    body = "".join(
        f'<div class="card"><div class="dim">{escape(a)}</div><div class="big">{escape(b)}</div>'
        f'<div class="dim">{escape(c)}</div></div>'
        for a, b, c in cards
    )
    return f'{told}<div class="cards">{body}</div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _seen(row: dict[str, Any]) -> float | None:
    """A trial's value, or the last that was seen of one that was stopped."""
    if row["value"] is not None:
        return float(row["value"])
    known = {int(at): value for at, value in row["validations"].items()}
    return float(known[max(known)]) if known else None


def _span(values: list[float]) -> tuple[float, float]:
    """Bounds around what matters; the worst quarter may lie beyond."""
    low, high = min(values), max(values)
    ordered = sorted(values)
    middle = ordered[len(ordered) * 3 // 4]
    high = min(high, middle + 2 * (middle - low)) if middle > low else high
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _frame(values: list[float]) -> tuple[Any, str]:
    """The vertical place of a value, and the grid with its ticks."""
    low, high = _span(values)

    def y(value: float) -> float:
        return 10 + (HEIGHT - BOTTOM - 10) * (1 - (min(value, high) - low) / (high - low))

    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(t):.1f}H{WIDTH - 10}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>'
        for t in ticks(low, high)
    )
    return y, grid


def _mark(x: float, y: float, row: dict[str, Any]) -> str:
    """Filled where a trial is complete, hollow where it was stopped; the default is orange."""
    colour = "var(--val)" if row["number"] == 0 else "var(--train)"
    fill = colour if row["state"] == "complete" else "none"
    title = escape(f"trial {row['number']}, {_STATES[row['state']]}: {_number(_seen(row))}")
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5">'
        f"<title>{title}</title></circle>"
    )


def _image(name: str, note: str, body: str) -> str:
    return (
        f'<figure class="panel"><figcaption><b>{escape(name)}</b><br>{escape(note)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{body}</svg></figure>'
    )


_LEGEND = (
    '<p class="dim">A dot is a trial: filled where it is complete, hollow where it was stopped early, orange the '
    "default recipe. What lies far above stands at the upper edge.</p>"
)


def _history(trials: list[dict[str, Any]], objective: str) -> str:
    rows = [row for row in trials if _seen(row) is not None]
    if not rows:
        return "<p>Nothing was validated yet.</p>"
    y, grid = _frame([value for row in rows if (value := _seen(row)) is not None])
    last = max(row["number"] for row in trials)

    def x(number: float) -> float:
        return LEFT + 8 + (WIDTH - LEFT - 26) * number / max(last, 1)

    grid += "".join(
        f'<text x="{x(t):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{t:.0f}</text>'
        for t in ticks(0, last, 6)
        if float(t).is_integer()
    )
    best = math.inf
    path: list[str] = []
    for row in trials:
        if row["value"] is not None and row["value"] < best:
            path += [f"{x(row['number']):.1f} {y(best):.1f}"] if path else []
            best = row["value"]
        if best < math.inf:
            path.append(f"{x(row['number']):.1f} {y(best):.1f}")
    line = f'<path class="curve train" d="M{"L".join(path)}"/>' if path else ""
    dots = "".join(_mark(x(row["number"]), y(value), row) for row in rows if (value := _seen(row)) is not None)
    panel = _image(f"{objective} by trial", "the line is the best so far", grid + line + dots)
    return f'{_LEGEND}<div class="panels">{panel}</div>'


def _importance(shares: dict[str, float]) -> str:
    rows = [
        [
            escape(name),
            f'<svg class="bar" viewBox="0 0 140 16" width="140" height="16" aria-hidden="true">'
            f'<rect class="fill" x="2" y="4" width="{136 * min(max(share, 0), 1):.1f}" height="8" rx="2"/></svg>',
            f"{share * 100:.0f} %",
        ]
        for name, share in shares.items()
    ]
    note = (
        '<p class="dim">The share of each setting in what separates the better complete trials from the others '
        "(PED-ANOVA); with few trials it is a hint.</p>"
    )
    return note + table(["setting", "", "share"], rows, numbers=(2,))


def _guards(trials: list[dict[str, Any]], fields: list[dict[str, Any]]) -> str:
    """What each guard alone did to validation, with all else at the default."""
    default = {field["name"]: field["default"] for field in fields}
    values = {tuple(row["params"].get(name) for name in default): row["value"] for row in trials}
    base = values.get(tuple(default.values()))
    rows = []
    for field in fields:
        if not field.get("guard"):
            continue
        other = next(choice for choice in field["choices"] if choice != field["default"])
        found = values.get(tuple({**default, field["name"]: other}.values()))
        on, off = (base, found) if field["default"] else (found, base)
        told = "not known: a trial was stopped or failed" if on is None or off is None else (
            "helped" if on < off else "did not help"
        )  # fmt: skip
        setting = _number(max(field["choices"])) if field["name"] != "augment" else "on"
        rows.append([escape(field["name"]), setting, _number(off), _number(on), told])
    note = (
        '<p class="dim">One trial each, all else as in the default recipe: differences within what seeds vary say '
        "nothing. The verdict on fresh seeds is above.</p>"
    )
    return note + table(["guard", "setting", "val without", "val with", ""], rows, numbers=(1, 2, 3))


def _slices(trials: list[dict[str, Any]], fields: list[dict[str, Any]]) -> str:
    rows = [row for row in trials if _seen(row) is not None]
    if not rows:
        return "<p>Nothing was validated yet.</p>"
    y, grid = _frame([value for row in rows if (value := _seen(row)) is not None])
    panels = []
    for field in fields:
        name, log = field["name"], field["log"]
        low, high = (math.log(v) if log else float(v) for v in (field["low"], field["high"]))

        def x(value: float, low: float = low, high: float = high, log: bool = log) -> float:
            place = math.log(value) if log else value
            return LEFT + 8 + (WIDTH - LEFT - 26) * (place - low) / max(high - low, 1e-12)

        marks = field["choices"] or _round_values(field["low"], field["high"], log)
        axis = "".join(f'<text x="{x(t):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{t:.4g}</text>' for t in marks)
        dots = "".join(
            _mark(x(row["params"][name]), y(value), row)
            for row in rows
            if name in row["params"] and (value := _seen(row)) is not None
        )
        panels.append(_image(name, f"default {_number(field['default'])}", grid + axis + dots))
    return f'{_LEGEND}<div class="panels">{"".join(panels)}</div>'


def _round_values(low: float, high: float, log: bool) -> list[float]:
    """Where an axis has numbers."""
    if not log:
        return ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 3) if high / low > 30 else (1, 2, 5)
    return [value for p in powers for m in parts if low * 0.999 <= (value := m * 10.0**p) <= high * 1.001]


def _trials(trials: list[dict[str, Any]], fields: list[dict[str, Any]], best: dict[str, Any] | None) -> str:
    names = [field["name"] for field in fields]
    rows = [
        [
            f"<b>{row['number']}</b>" if best and row["number"] == best["number"] else str(row["number"]),
            _STATES[row["state"]],
            _number(_seen(row)),
            *(_number(row["params"].get(name)) for name in names),
            "–" if row["seconds"] is None else f"{row['seconds']:.0f}",
            escape(row["note"]),
        ]
        for row in trials
    ]
    head = ["trial", "", "value", *(escape(name) for name in names), "seconds", ""]
    return table(head, rows, numbers=tuple(range(2, len(names) + 4)))


def _fresh(runs: list[dict[str, Any]]) -> str:
    rows = [
        [str(run["trial"]), str(run["seed"]), _STATES[run["state"]], _number(run["value"])]
        for run in sorted(runs, key=lambda run: (run["trial"], run["seed"]))
    ]
    note = '<p class="dim">Trial 0 is the default recipe; each was trained again from other seeds, to its end.</p>'
    return note + table(["recipe of trial", "seed", "", "value"], rows, numbers=(0, 1, 3))
