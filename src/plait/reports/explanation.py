"""An explanation as JSON, as a page of HTML, and as one image."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from plait.explain.methods import Explanation
from plait.explain.parts import Grid, Part, Words
from plait.modalities.base import cells
from plait.reports.html import page, table

STRONGEST = 5  # units that are listed by name


def as_json_of(found: Explanation) -> dict[str, Any]:
    """Everything, as JSON has it: weights by word, or by region of a grid of rows and columns."""
    parts: list[dict[str, Any]] = []
    for part, weights in zip(found.parts, found.weights, strict=False):
        entry: dict[str, Any] = {"kind": part.name, "weights": _numbers(weights)}
        if isinstance(part, Words):
            entry["words"] = [word.strip() for word in part.words]
        else:
            entry |= {"column": part.column, "grid": list(part.shape)}
        entry["strongest"] = [{"where": part.spot(unit), "weight": float(weights[unit])} for unit in _top(weights)]
        parts.append(entry)
    shown: dict[str, Any] = {
        "method": found.method,
        "answer": found.answer,
        "measure": found.measure,
        "score": found.score,
        "chance": found.chance,
        "parts": parts,
        "lost_without": found.lost,
        "layers": [
            {**layer, "likeliest": [{"text": text, "chance": p} for text, p in layer["likeliest"]]}
            for layer in found.layers
        ],
        "warnings": found.warnings,
    }
    if found.areas is not None:
        shown["areas"] = {
            "deletion": found.areas.deletion,
            "insertion": found.areas.insertion,
            "random_deletion": float(np.mean(found.areas.random_deletion)),
            "random_insertion": float(np.mean(found.areas.random_insertion)),
            "random_maps_beaten": found.areas.beaten,
            "random_maps": len(found.areas.random_deletion),
        }
    if found.gap is not None:
        shown |= {"completeness_gap": found.gap, "steps": found.steps}
    if found.regions is not None:
        rows = [
            {"word": word, "lost": _numbers(lost)} for word, lost in zip(found.region_words, found.regions, strict=True)
        ]
        shown["made"] = {"grid": list(found.region_grid), "words": rows}
    return shown


def _numbers(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _top(weights: np.ndarray) -> list[int]:
    order = np.argsort(-weights, kind="stable")[:STRONGEST].tolist()
    return [unit for unit in order if weights[unit] > 0]


def _shares(weights: np.ndarray, all_weights: list[np.ndarray]) -> np.ndarray:
    """Weights in [-1, 1], on one scale for all parts."""
    top = max(float(np.abs(one).max(initial=0)) for one in all_weights)
    return weights / top if top else weights


# --- images ---------------------------------------------------------------------------------------------------


def _png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _maps(found: Explanation) -> list[tuple[str, PILImage.Image]]:
    """The marked images of an explanation, each with its name."""
    maps = [
        (part.name, part.marked(_shares(weights, found.weights)))
        for part, weights in zip(found.parts, found.weights, strict=False)
        if isinstance(part, Grid)
    ]
    if found.regions is not None and found.written is not None:
        maps.append((f"made: {found.written.name}", found.written.marked(np.zeros(found.written.count))))
        for word, lost in zip(found.region_words, found.regions, strict=True):
            maps.append((f"“{word}”", _region(found, lost)))
    return maps


def _region(found: Explanation, lost: np.ndarray) -> PILImage.Image:
    """What was made, marked where it lost likelihood (cells,)."""
    assert found.written is not None and found.regions is not None
    written = found.written
    places = cells((written.sample.shape[0], written.sample.shape[1]), found.region_grid)
    return written.modality.marked(written.sample, _shares(lost, [found.regions])[places])


def _line(words: list[str], shares: np.ndarray, width: int = 640) -> PILImage.Image:
    """Marked words as an image. The font knows Latin letters; the page shows all."""
    font = ImageFont.load_default(20)
    image = PILImage.new("RGB", (width, 30 * (2 + sum(map(len, words)) // 50)), "white")
    pen, x, y = ImageDraw.Draw(image), 8, 6
    for word, share in zip(words, shares, strict=True):
        shown = word.strip()
        size = int(pen.textlength(shown, font=font))
        if x + size > width - 8:
            x, y = 8, y + 30
        pen.rectangle((x - 2, y, x + size + 2, y + 25), fill=_colour(float(share)))
        pen.text((x, y), shown, fill="black", font=font)
        x += size + 10
    return image.crop((0, 0, width, y + 32))


def _colour(share: float) -> tuple[int, int, int]:
    strength = min(abs(share), 1.0) ** 0.7
    ground = (255, 120, 110) if share > 0 else (130, 165, 255)
    return tuple(round(255 + (channel - 255) * strength) for channel in ground)


def as_png(found: Explanation) -> bytes:
    """All marked parts below one another."""
    images = [image for _, image in _maps(found)]
    for part, weights in zip(found.parts, found.weights, strict=False):
        if isinstance(part, Words):
            images.append(_line(part.words, _shares(weights, found.weights)))
    if not images:  # the logit lens
        rows = [f"{layer['layer']:3}  {layer['chance']:.3f}  {layer['likeliest'][0][0]}" for layer in found.layers]
        images = [_line([row], np.zeros(1)) for row in rows]
    wide = max(image.width for image in images)
    whole = PILImage.new("RGB", (wide, sum(image.height + 8 for image in images)), "white")
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height + 8
    return _png(whole)


# --- the page ---------------------------------------------------------------------------------------------------


def _url(image: PILImage.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _marked_text(part: Words, shares: np.ndarray) -> str:
    spans = []
    for word, share in zip(part.words, shares, strict=True):
        red, green, blue = _colour(float(share))
        style = f"background:rgb({red},{green},{blue});color:#111;border-radius:.2rem;padding:0 .15rem"
        spans.append(f'{word[: len(word) - len(word.lstrip())]}<span style="{style}">{escape(word.strip())}</span>')
    return f'<p style="font-size:1.2rem;line-height:1.9">{"".join(spans)}</p>'


def _strongest(part: Part, weights: np.ndarray) -> str:
    rows = [[escape(part.spot(unit)), f"{weights[unit]:+.3f}"] for unit in _top(weights)]
    return table(["strongest", "weight"], rows, numbers=(1,)) if rows else "<p>No unit speaks for the answer.</p>"


def as_html(found: Explanation) -> str:
    """A self-contained page."""
    measure = f"{found.measure} {found.score:.3f}"
    summary = f"{escape(found.method)} · why “{escape(found.answer)}” · {measure} · chance {found.chance:.3f}"
    top = "".join(f'<p style="color:var(--bad)"><b>{escape(text)}</b></p>' for text in found.warnings)
    sections: list[tuple[str, str, str]] = []
    if found.weights:
        note = (
            '<p class="dim">Red speaks for the answer, blue against it; weights are '
            f"{escape(found.measure)}{'' if found.measure == 'similarity' else ', in nats'}.</p>"
        )
        body = note
        for part, weights in zip(found.parts, found.weights, strict=True):
            shares = _shares(weights, found.weights)
            body += f"<h3>{escape(part.name)}</h3>"
            if isinstance(part, Words):
                body += _marked_text(part, shares)
            else:
                body += f'<img alt="marked {escape(part.name)}" src="{_url(part.marked(shares))}">'
            body += _strongest(part, weights)
        sections.append(("parts", "What moved the answer", body))
    if found.regions is not None:
        body = '<p class="dim">Marked is what would have been less likely without the word.</p><div class="panels">'
        for name, marked in _maps(found)[-len(found.region_words) - 1 :]:
            image = f'<img style="max-width:100%" alt="{escape(name)}" src="{_url(marked)}">'
            body += f'<figure class="panel"><figcaption>{escape(name)}</figcaption>{image}</figure>'
        sections.append(("made", "What depends on which word", body + "</div>"))
    if found.lost:
        rows = [[escape(name), f"{lost:+.3f}"] for name, lost in found.lost.items()]
        sections.append(("removed", "Each part left out", table(["without", "score lost"], rows, numbers=(1,))))
    if found.layers:
        rows = [
            [str(layer["layer"]), f"{layer['chance']:.4f}", str(layer["rank"]),
             ", ".join(f"{escape(repr(text))} {p:.3f}" for text, p in layer["likeliest"])]
            for layer in found.layers
        ]  # fmt: skip
        head = ["layer", "chance of the answer's first token", "rank", "likeliest"]
        sections.append(("layers", "What each layer would say", table(head, rows, numbers=(0, 1, 2))))
    checks = _checks(found)
    if checks:
        sections.append(("checks", "Checks", checks))
    return page("Why: " + found.answer, summary, top, sections)


def _checks(found: Explanation) -> str:
    body = ""
    if found.areas is not None:
        areas, count = found.areas, len(found.areas.random_deletion)
        rows = [
            [name, f"{mine:.3f}", f"{np.mean(random):.3f} ± {np.std(random):.3f}", better]
            for name, mine, random, better in (
                ("deletion, the weightiest first", areas.deletion, areas.random_deletion, "lower"),
                ("insertion, the weightiest first", areas.insertion, areas.random_insertion, "higher"),
            )
        ]
        body += table(["area under the answer's chance", "this map", "random maps", "better"], rows, numbers=(1, 2))
        body += f"<p>It does better than {areas.beaten} of {count} random maps.</p>"
    if found.gap is not None:
        body += f"<p>Completeness gap: {found.gap:.2%} of the difference between the input and nothing, "
        body += f"at {found.steps} steps.</p>"
    return body
