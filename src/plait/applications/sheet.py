"""Several pictures as one."""

from __future__ import annotations

import io
import math

from PIL import Image


def contact_sheet(pictures: list[Image.Image], across: int | None = None, least: int = 64, gap: int = 2) -> bytes:
    """A PNG with the pictures in rows of `across`, a side at least `least` pixels, enlarged without smoothing."""
    width, height = pictures[0].size
    zoom = max(math.ceil(least / max(width, height)), 1) if len(pictures) > 1 else 1
    across = across or math.ceil(math.sqrt(len(pictures)))
    down = math.ceil(len(pictures) / across)
    cell_w, cell_h = width * zoom + gap, height * zoom + gap
    sheet = Image.new("RGB", (across * cell_w - gap, down * cell_h - gap), "white")
    for i, picture in enumerate(pictures):
        large = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(large, (i % across * cell_w, i // across * cell_h))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
