"""One self-contained HTML page for a run: figures with error bars, curves, images, audio clips, what was left out.

No network, no script, no library: inline SVG and data URLs under a policy that forbids everything else.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_atomic, write_json
from plait.data.stores import location, read_place
from plait.evaluation.findings import Confusion, Findings, Gallery, Metric, Metrics, ReportItem
from plait.reports.curves import curves, reliability_diagram
from plait.reports.html import page, table
from plait.reports.metric_labels import HEADLINES, MEANING, TASKS


@dataclass
class RunInfo:
    """What is known of a run and its data; every part may be empty."""

    title: str = "Plait"
    metadata: dict[str, Any] = field(default_factory=dict)  # run.json
    log: list[dict[str, Any]] = field(default_factory=list)  # rows of log.jsonl
    manifest: dict[str, Any] = field(default_factory=dict)  # the data set's
    rejects: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)  # by part of the model


def read_run(folder: Path, dataset: str | Path | None = None) -> RunInfo:
    """Gather a run's facts from its folder and its data set's; files that are not there leave their part empty.

    Of a step that a resumed run took twice, the later row counts. Raises PlaitError for a file that is damaged.
    """
    folder = Path(folder)
    info = RunInfo(title=folder.resolve().name)
    if (folder / "run.json").is_file():
        info.metadata = read_json(folder / "run.json")
    rows = {(row.get("step"), row.get("split")): row for row in _read_lines(folder / "log.jsonl", torn=True)}
    info.log = sorted(rows.values(), key=lambda row: row.get("step", 0))
    place = location(dataset) if dataset else None
    if place is None and "dataset" in info.metadata:
        place = read_place(info.metadata["dataset"], folder)
    if isinstance(place, Path) and (place / "manifest.json").is_file():
        info.manifest = read_json(place / "manifest.json")
        info.rejects = _read_lines(place / "rejects.jsonl")
    return info


def _read_lines(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; with `torn`, a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if torn and number == len(lines):
                break
            raise PlaitError(f"{path}, line {number}, is not JSON: {error}. Delete the line.") from error
    return rows


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write the figures as JSON, one flat object; what is not a finite number becomes null."""
    clean = {
        name: {key: _finite(metric.get(key)) for key in ("value", "stderr", "chance", "baseline", "n")}
        for name, metric in metrics.items()
    }
    write_json(path, clean)


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


# --- pieces of figures -------------------------------------------------------------------------------------------


def _number(value: float | None, kind: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "share":
        return f"{value * 100:.1f} %"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _with_error(metric: Metric, kind: str) -> str:
    error = metric.get("stderr")
    text = f"<b>{_number(metric.get('value'), kind)}</b>"
    if error is None or not math.isfinite(error):
        return text
    shown = f"{error * 100:.1f}" if kind == "share" else f"{error:.2g}"
    return f'{text} <span class="dim">±&nbsp;{shown}</span>'


def _parts(name: str) -> tuple[str, str, str]:
    """Task, direction and metric of a figure's name; a column's name may hold slashes."""
    task, _, rest = name.partition("/")
    direction, _, metric = rest.rpartition("/")
    return task, direction, metric


def _direction(name: str) -> str:
    """ "image-en" -> "image → en": columns' names may hold hyphens themselves, so the middle one counts."""
    places = [i for i, c in enumerate(name) if c == "-"]
    if not places:
        return escape(name)
    middle = places[len(places) // 2]
    return f"{escape(name[:middle])} → {escape(name[middle + 1 :])}"


# --- pieces of a page -------------------------------------------------------------------------------------------


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _exhibit(exhibit: ReportItem, small: bool = False) -> str:
    mark = {True: " right", False: " wrong", None: ""}[exhibit.right]
    parts = []
    if exhibit.image is not None:
        shape = "mel" if exhibit.audio is not None else "pic"
        parts.append(f'<img class="{shape}" alt="{escape(exhibit.caption)}" src="{_url("image/png", exhibit.image)}">')
    if exhibit.audio is not None:
        parts.append(f'<audio controls preload="none" src="{_url("audio/wav", exhibit.audio)}"></audio>')
    if exhibit.text is not None:
        cut = exhibit.text if len(exhibit.text) <= 300 else exhibit.text[:300] + "…"
        parts.append(f'<span class="words">{escape(cut)}</span>')
    if exhibit.caption:
        parts.append(f"<figcaption>{escape(exhibit.caption)}</figcaption>")
    figure = f'<figure class="{"small" if small else "full"}{mark}">{"".join(parts)}</figure>'
    if exhibit.beside is not None:
        return f'<div class="pair">{figure}{_exhibit(exhibit.beside, small=True)}</div>'
    return figure


def _gallery(gallery: Gallery) -> str:
    rows = "".join(
        f'<div class="row"><div class="head">{_exhibit(head)}</div>'
        f'<div class="items">{"".join(_exhibit(item) for item in items)}</div></div>'
        for head, items in gallery.rows
    )
    return f'<h3>{escape(gallery.title)}</h3><p class="dim">{escape(gallery.note)}</p><div class="gallery">{rows}</div>'


def _confusion(confusion: Confusion, most: int = 40) -> str:
    counts, labels = confusion.counts, [escape(label) for label in confusion.labels]
    title = f"<h3>{escape(confusion.title)}</h3>"
    if len(labels) > most:
        wrong = counts - np.diag(np.diag(counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:20]
        pairs = [(i // len(labels), i % len(labels)) for i in order if wrong.flat[i]]
        rows = [[labels[a], labels[b], str(wrong[a, b]), str(counts[a].sum())] for a, b in pairs]
        return title + table(["truth", "taken for", "times", "of"], rows, numbers=(2, 3))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{label}</th>" for label in labels)
    extra = "<th>F1</th>" if confusion.f1 is not None else ""
    body = ""
    for i, label in enumerate(labels):
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}{" deep" if shares[i, j] > 0.5 else ""}" '
            f'style="--s:{shares[i, j] * 100:.0f}%">{counts[i, j] or ""}</td>'
            for j in range(len(labels))
        )
        tail = f'<td class="n">{confusion.f1[i] * 100:.1f}</td>' if confusion.f1 is not None else ""
        body += f"<tr><th>{label}</th>{cells}{tail}</tr>"
    return (
        f'{title}<p class="dim">Rows are the truth, columns the answer.</p><div class="wide"><table class="confusion">'
        f"<tr><th></th>{head}{extra}</tr>{body}</table></div>"
    )


def _bar(metric: Metric) -> str:
    """A share as a bar with its error, and ticks at chance (dashed) and at the baseline."""
    value = metric.get("value")
    if value is None or not math.isfinite(value):
        return ""
    width = 140

    def x(share: float) -> float:
        return 2 + (width - 4) * min(max(share, 0), 1)

    parts = [f'<rect class="fill" x="2" y="4" width="{x(value) - 2:.1f}" height="8" rx="2"/>']
    error = metric.get("stderr")
    if error is not None and math.isfinite(error):
        parts.append(f'<path class="line" d="M{x(value - error):.1f} 8H{x(value + error):.1f}"/>')
    for key in ("chance", "baseline"):
        place = metric.get(key)
        if place is not None and math.isfinite(place):
            parts.append(f'<path class="line {key}" d="M{x(place):.1f} 1V15"/>')
    box = f'viewBox="0 0 {width} 16" width="{width}" height="16"'
    return f'<svg class="bar" {box} aria-hidden="true">{"".join(parts)}</svg>'


def _figures(metrics: Metrics) -> str:
    found = ""
    names = list(dict.fromkeys(_parts(name)[0] for name in metrics))
    tasks = [task for task in TASKS if task in names] + [name for name in names if name not in TASKS]
    for task in tasks:
        rows = []
        before = ""
        clean = any(_parts(name)[0] == task and f"{name}_clean" in metrics for name in metrics)
        for name, metric in metrics.items():
            first, direction, last = _parts(name)
            if first != task or name.endswith("]"):  # figures of single classes stand in the confusion matrix
                continue
            if name.removesuffix("_clean") in metrics and name.endswith("_clean"):
                continue  # stands beside the figure of all records
            label, kind, meaning = MEANING.get(last, (last, "number", ""))
            rows.append([
                "" if direction == before else _direction(direction),
                f'{escape(label)}<div class="dim tip">{escape(meaning)}</div>',
                _with_error(metric, kind),
                _bar(metric) if kind == "share" else "",
                _number(metric.get("chance"), kind),
                _number(metric.get("baseline"), kind),
                "–" if metric.get("n") is None else f"{metric['n']:,.0f}",
                *([_with_error(metrics.get(f"{name}_clean", {}), kind)] if clean else []),
            ])  # fmt: skip
            before = direction
        head = ["", "", "value", "", "chance", "baseline", "n", *(["without near-duplicates"] if clean else [])]
        numbers = (2, 4, 5, 6, 7) if clean else (2, 4, 5, 6)
        found += f"<h3>{escape(TASKS.get(task, task))}</h3>" + table(head, rows, numbers=numbers, name="figures")
    return found


def _cards(metrics: Metrics) -> str:
    cards = []
    shown: Counter[str] = Counter()
    for name, metric in metrics.items():
        task, direction, last = _parts(name)
        if last not in HEADLINES or metric.get("value") is None or shown[task] == 4:
            continue
        shown[task] += 1
        label, kind, _ = MEANING[last]
        chance = metric.get("chance")
        note = f"chance {_number(chance, kind)}" if chance is not None else "&nbsp;"
        cards.append(
            f'<div class="card"><div class="dim">{escape(task)} · {_direction(direction)}</div>'
            f'<div class="big">{_number(metric.get("value"), kind)}</div>'
            f'<div class="dim">{escape(label)}, {note}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


# --- the page ---------------------------------------------------------------------------------------------------


def write_report(path: Path, metrics: Metrics, findings: Findings, run: RunInfo) -> None:
    """Write the page. Raises PlaitError where it cannot be written."""
    sections: list[tuple[str, str, str]] = []
    if metrics:
        note = (
            '<p class="dim">Each figure is of the test split, ± its bootstrap standard error. '
            "In a bar, the dashed tick is chance and the orange one the baseline.</p>"
        )
        sections.append(("figures", "Figures", note + _figures(metrics)))
    if run.log:
        note = (
            '<p class="dim">Loss by step, in nats. The gap is validation less training: what was learnt by heart. The '
            "upright line is where it opened: from there on it stayed above 5 % of the validation loss. A contrastive "
            "loss depends on how many records a batch has and how many are alike, so its gap says less.</p>"
        )
        sections.append(("learning", "Learning", note + curves(run.log)))
    if findings.reliabilities:
        note = '<p class="dim">How many answers of each probability were right; on the line, as many as it says.</p>'
        panels = "".join(reliability_diagram(found) for found in findings.reliabilities)
        sections.append(("calibration", "Calibration", f'{note}<div class="panels">{panels}</div>'))
    if findings.galleries:
        sections.append(("made", "What it makes and finds", "".join(_gallery(g) for g in findings.galleries)))
    if findings.confusions:
        sections.append(("confusion", "What it takes for what", "".join(_confusion(c) for c in findings.confusions)))
    if run.manifest or run.rejects:
        sections.append(("data", "Data", _data(run)))
    sections.append(("run", "This run", _run(run)))
    notes = "".join(f"<li>{escape(note)}</li>" for note in findings.notes)
    top = _cards(metrics) + (f"<ul>{notes}</ul>" if notes else "")
    write_atomic(path, page(run.title, _summary(run), top, sections))


def _summary(run: RunInfo) -> str:
    facts = run.metadata
    parts = []
    if "size" in facts:
        parts.append(f"size {escape(str(facts['size']))}")
    if run.parameters:
        parts.append(f"{sum(run.parameters.values()):,} parameters")
    if "steps" in facts:
        parts.append(f"{(facts.get('revisions') or [facts])[-1]['steps']} steps")
    if isinstance(facts.get("seconds"), (int, float)) and facts["seconds"]:
        parts.append(f"trained {facts['seconds']:.0f} s")
    if "seed" in facts:
        parts.append(f"seed {facts['seed']}")
    if isinstance(facts.get("started"), (int, float)):
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts["started"])))
    return " · ".join(parts)


def _data(run: RunInfo) -> str:
    manifest = run.manifest
    counts = manifest.get("counts", {})
    parts = [f"<p>{escape(str(manifest.get('source', '')))}</p>"] if manifest.get("source") else []
    if counts:
        parts.append(table(["split", "records"], [[escape(k), f"{v:,}"] for k, v in counts.items()], numbers=(1,)))
    if columns := manifest.get("columns"):
        parts.append(table(["column", "kind"], [[escape(k), escape(str(v))] for k, v in columns.items()]))
    notes = [*manifest.get("warnings", []), *manifest.get("notes", []), *run.metadata.get("notes", [])]
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in notes) + "</ul>")
    parts.append("<h3>What was left out</h3>")
    if not run.rejects:
        return "".join(parts) + "<p>Nothing.</p>"
    reasons = Counter(str(row.get("reason", "?")).split(":")[0][:80] for row in run.rejects)
    first: dict[str, dict[str, Any]] = {}
    for row in run.rejects:
        first.setdefault(str(row.get("reason", "?")).split(":")[0][:80], row)
    rows = [
        [
            escape(reason),
            f"{count:,}",
            escape(_place(first[reason])),
            escape(str(first[reason].get("reason", ""))[:200]),
        ]
        for reason, count in reasons.most_common(30)
    ]
    if len(reasons) > 30:
        rest = sum(count for _, count in reasons.most_common()[30:])
        rows.append([f"{len(reasons) - 30} other reasons", f"{rest:,}", "", "see rejects.jsonl"])
    return "".join(parts) + table(["reason", "times", "first example", "in full"], rows, numbers=(1,))


def _place(row: dict[str, Any]) -> str:
    return str(row.get("file", "")) + (f", line {row['line']}" if row.get("line") is not None else "")


def _run(run: RunInfo) -> str:
    parts = []
    if run.parameters:
        rows = [[escape(name), f"{count:,}"] for name, count in run.parameters.items()]
        parts.append("<h3>Parameters</h3>" + table(["part", "number"], rows, numbers=(1,)))
    if run.metadata:
        shown = {key: value for key, value in run.metadata.items() if key != "codec_log"}
        text = json.dumps(shown, ensure_ascii=False, indent=1, default=str)
        parts.append(f"<h3>Configuration</h3><pre>{escape(text)}</pre>")
    return "".join(parts) or "<p>Nothing is known of how it was trained.</p>"
