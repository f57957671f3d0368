"""Several images as one, and what a search found as an image or a page."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from plait.core.pages import render
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import blank_tile
from plait.modalities.media import MEDIA, media_type

if TYPE_CHECKING:
    from plait.search.index import Hit

TILE, CAPTION = 128, 18  # pixels of a result's square, and of the line below it


def contact_sheet(images: list[Image.Image], across: int | None = None, least: int = 64, gap: int = 2) -> bytes:
    """A PNG with the images in rows of `across`, a side at least `least` pixels, enlarged without smoothing."""
    width, height = images[0].size
    zoom = max(math.ceil(least / max(width, height)), 1) if len(images) > 1 else 1
    across = across or math.ceil(math.sqrt(len(images)))
    down = math.ceil(len(images) / across)
    cell_w, cell_h = width * zoom + gap, height * zoom + gap
    sheet = Image.new("RGB", (across * cell_w - gap, down * cell_h - gap), "white")
    for i, image in enumerate(images):
        large = image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(large, (i % across * cell_w, i // across * cell_h))
    return _png(sheet)


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def results_sheet(hits: Sequence[Hit]) -> bytes:
    """A PNG of what was found, best first: images, waveforms of audio clips and texts, each with its rank and score."""
    tiles = []
    for rank, hit in enumerate(hits, 1):
        tile = Image.new("RGB", (TILE, TILE + CAPTION), "white")
        tile.paste(_tile(hit), (0, 0))
        figure = hit.score if math.isnan(hit.similarity) else hit.similarity
        ImageDraw.Draw(tile).text((4, TILE + 2), f"{rank}.  {figure:.3f}", "black", ImageFont.load_default(12))
        tiles.append(tile)
    across = min(max(math.ceil(math.sqrt(len(tiles) * 1.6)), 1), 10)
    return contact_sheet(tiles or [Image.new("RGB", (TILE, TILE), "white")], across, least=1, gap=6)


def _tile(hit: Hit) -> Image.Image:
    if hit.preview is not None:
        with contextlib.suppress(MediaError):  # a preview that cannot be shown is not worth the whole sheet
            return MEDIA[hit.kind].tile(hit.preview, TILE)
    tile = blank_tile(TILE)
    words = textwrap.fill(hit.text or hit.source, 19, max_lines=8)
    ImageDraw.Draw(tile).multiline_text((6, 6), words, "black", ImageFont.load_default(12))
    return tile


def results_page(query: str, where: str, hits: Sequence[Hit]) -> str:
    """A page of what was found, without scripts and without a network: images, audio clips to play, texts."""
    shown = [
        {
            "preview": hit.preview,
            "media_type": media_type(hit.preview) if hit.preview is not None else "",
            "element": MEDIA[hit.kind].element if hit.kind in MEDIA else "",
            "text": hit.text,
            "source": hit.source,
            "figure": hit.score if math.isnan(hit.similarity) else hit.similarity,
        }
        for hit in hits
    ]
    return render(
        "search/results.html", title=query, summary=f"The {len(hits)} nearest in {where}, best first.", hits=shown
    )
