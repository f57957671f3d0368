"""An explanation as JSON, as a page of HTML, and as one image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from plait.core.pages import render
from plait.explain.methods import Explanation
from plait.explain.parts import Grid, Part, Words
from plait.modalities.base import cells

STRONGEST = 5  # units that are listed by name


def as_json_of(explanation: Explanation) -> dict[str, Any]:
    """Everything, as JSON has it: weights by word, or by region of a grid of rows and columns."""
    parts: list[dict[str, Any]] = []
    for part, weights in zip(explanation.parts, explanation.weights, strict=False):
        entry: dict[str, Any] = {"kind": part.name, "weights": _numbers(weights)}
        if isinstance(part, Words):
            entry["words"] = [word.strip() for word in part.words]
        else:
            entry |= {"column": part.column, "grid": list(part.shape)}
        entry["strongest"] = [{"where": part.spot(unit), "weight": float(weights[unit])} for unit in _top(weights)]
        parts.append(entry)
    shown: dict[str, Any] = {
        "method": explanation.method,
        "answer": explanation.answer,
        "measure": explanation.measure,
        "score": explanation.score,
        "chance": explanation.chance,
        "parts": parts,
        "lost_without": explanation.lost,
        "layers": [
            {**layer, "likeliest": [{"text": text, "chance": p} for text, p in layer["likeliest"]]}
            for layer in explanation.layers
        ],
        "warnings": explanation.warnings,
    }
    if explanation.areas is not None:
        shown["areas"] = {
            "deletion": explanation.areas.deletion,
            "insertion": explanation.areas.insertion,
            "random_deletion": float(np.mean(explanation.areas.random_deletion)),
            "random_insertion": float(np.mean(explanation.areas.random_insertion)),
            "random_maps_beaten": explanation.areas.random_maps_beaten,
            "random_maps": len(explanation.areas.random_deletion),
        }
    if explanation.gap is not None:
        shown |= {"completeness_gap": explanation.gap, "steps": explanation.steps}
    if explanation.regions is not None:
        rows = [
            {"word": word, "lost": _numbers(lost)}
            for word, lost in zip(explanation.region_words, explanation.regions, strict=True)
        ]
        shown["made"] = {"grid": list(explanation.region_grid), "words": rows}
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


def _made(explanation: Explanation) -> list[tuple[str, PILImage.Image]]:
    """What was made, and the same marked for each word that it was made for, each with its name."""
    if explanation.regions is None or explanation.written is None:
        return []
    marked = [
        (f"“{word}”", _region(explanation, lost))
        for word, lost in zip(explanation.region_words, explanation.regions, strict=True)
    ]
    return [(f"made: {explanation.written.name}", explanation.written.unmarked()), *marked]


def _region(explanation: Explanation, lost: np.ndarray) -> PILImage.Image:
    """What was made, marked where it lost likelihood (cells,)."""
    assert explanation.written is not None and explanation.regions is not None
    written = explanation.written
    places = cells((written.sample.shape[0], written.sample.shape[1]), explanation.region_grid)
    return written.modality.marked(written.sample, _shares(lost, [explanation.regions])[places])


GAP = 12  # pixels between what stands side by side
WIDEST = 1000  # pixels that a row of two images has at most


def _beside(part: Grid, marked: PILImage.Image) -> PILImage.Image:
    """What the model read, and the same marked: side by side, or below one another where they are wide."""
    return _arranged([part.unmarked(), marked], in_a_row=2 * marked.width <= WIDEST)


def _arranged(images: list[PILImage.Image], in_a_row: bool) -> PILImage.Image:
    """Images in a row, or in a column."""
    if in_a_row:
        size = (sum(one.width for one in images) + GAP * (len(images) - 1), max(one.height for one in images))
    else:
        size = (max(one.width for one in images), sum(one.height for one in images) + GAP * (len(images) - 1))
    canvas, place = PILImage.new("RGB", size, "white"), 0
    for one in images:
        canvas.paste(one, (place, 0) if in_a_row else (0, place))
        place += (one.width if in_a_row else one.height) + GAP
    return canvas


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


def as_png(explanation: Explanation) -> bytes:
    """The answer, all marked parts, each beside what it was, and what the colours mean, below one another."""
    answer = (
        f"{explanation.answer}: {explanation.measure} {explanation.score:.3f}, probability {explanation.chance:.3f}"
    )
    images = [_text(answer)]
    for part, weights in zip(explanation.parts, explanation.weights, strict=False):
        shares = _shares(weights, explanation.weights)
        if isinstance(part, Words):
            images.append(_line(part.words, shares))
        else:
            images.append(_beside(part, part.marked(shares)))
    images += [image for name, image in _made(explanation)]
    for layer in explanation.layers:
        images.append(_text(f"{layer['layer']:3}  {layer['chance']:.3f}  {layer['likeliest'][0][0]}"))
    if explanation.parts:
        images.append(_text("red speaks for the answer, blue against it", size=14))
    return _png(_arranged(images, in_a_row=False))


def _text(text: str, size: int = 20) -> PILImage.Image:
    """A line of text as an image."""
    font = ImageFont.load_default(size)
    width = int(font.getlength(text)) + 16
    image = PILImage.new("RGB", (width, size + 10), "white")
    ImageDraw.Draw(image).text((8, 3), text, fill="black", font=font)
    return image


# --- the page ---------------------------------------------------------------------------------------------------


def as_html(explanation: Explanation) -> str:
    """A self-contained page."""
    measure = f"{explanation.measure} {explanation.score:.3f}"
    return render(
        "explain/explanation.html",
        title="Why: " + explanation.answer,
        summary=f"{explanation.method} · why “{explanation.answer}” · {measure} · probability {explanation.chance:.3f}",
        warnings=explanation.warnings,
        measure=explanation.measure,
        parts=[
            _part(explanation, part, weights)
            for part, weights in zip(explanation.parts, explanation.weights, strict=False)
        ],
        made=[(name, _png(image)) for name, image in _made(explanation)],
        lost=[(name, f"{lost:+.3f}") for name, lost in explanation.lost.items()],
        layers=[_layer(layer) for layer in explanation.layers],
        areas=_areas(explanation),
        beaten=f"{explanation.areas.random_maps_beaten} of {len(explanation.areas.random_deletion)}"
        if explanation.areas is not None
        else "",
        gap=_gap(explanation),
    )


def _part(explanation: Explanation, part: Part, weights: np.ndarray) -> dict[str, Any]:
    """A part of the input: its marked words or image, and its strongest units."""
    shares = _shares(weights, explanation.weights)
    strongest = [(part.spot(unit), f"{weights[unit]:+.3f}") for unit in _top(weights)]
    if isinstance(part, Words):
        words = [_word(word, float(share)) for word, share in zip(part.words, shares, strict=True)]
        return {"name": part.name, "words": words, "image": b"", "strongest": strongest}
    return {"name": part.name, "words": [], "image": _png(_beside(part, part.marked(shares))), "strongest": strongest}


def _word(word: str, share: float) -> tuple[str, str, str]:
    """The space before a word, the word, and its colour."""
    red, green, blue = _colour(share)
    return word[: len(word) - len(word.lstrip())], word.strip(), f"rgb({red},{green},{blue})"


def _layer(layer: dict[str, Any]) -> list[str]:
    """A row of the table of layers."""
    likeliest = ", ".join(f"{text!r} {chance:.3f}" for text, chance in layer["likeliest"])
    return [str(layer["layer"]), f"{layer['chance']:.4f}", str(layer["rank"]), likeliest]


def _areas(explanation: Explanation) -> list[tuple[str, str, str, str]]:
    """Deletion and insertion beside those of random maps."""
    if explanation.areas is None:
        return []
    areas = explanation.areas
    return [
        (name, f"{value:.3f}", f"{np.mean(random):.3f} ± {np.std(random):.3f}", better)
        for name, value, random, better in (
            ("deletion, the weightiest first", areas.deletion, areas.random_deletion, "lower"),
            ("insertion, the weightiest first", areas.insertion, areas.random_insertion, "higher"),
        )
    ]


def _gap(shown: Explanation) -> str:
    """How far integrated gradients are from adding up, as a sentence."""
    if shown.gap is None:
        return ""
    return f"Completeness gap: {shown.gap:.2%} of the difference between the input and nothing, at {shown.steps} steps."
