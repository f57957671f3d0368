"""The page that `plait prepare` leaves: what the dataset holds, with examples to look at and listen to."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from dataclasses import dataclass

from plait.data.conversations import turns
from plait.data.dataset import Manifest
from plait.modalities.audio_files import decode_audio, encode_wav
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import decode_image, encode_png
from plait.modalities.media import media_type

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.3rem .8rem;text-align:left;vertical-align:top;
border-bottom:1px solid #ddd}td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:128px;
image-rendering:auto}audio{width:15rem}pre{white-space:pre-wrap;margin:0;max-width:30rem;font:inherit}
.warn{background:#fff4d6;padding:.4rem .8rem;margin:.3rem 0}@media(prefers-color-scheme:dark){body{background:#181818;
color:#ddd}td,th{border-color:#444}.warn{background:#4a3b10}}
"""


@dataclass
class Example:
    """A record to show."""

    id: str
    split: str
    parts: dict[str, str | bytes]


def _url(data: bytes) -> str:
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def _shown(kind: str, value: str | bytes, chat: bool) -> str:
    """A part as HTML: the text's or conversation's beginning, a thumbnail, a player of at most five seconds."""
    if chat and isinstance(value, str):
        said = (
            (turn.role, text if kind == "text" else f"({text})") for turn in turns(value) for kind, text in turn.parts
        )
        value = "\n".join(f"{role}: {text}" for role, text in said)
    if isinstance(value, str):
        return f"<pre>{html.escape(value[:400])}{'…' if len(value) > 400 else ''}</pre>"
    try:
        if kind == "audio":
            if len(value) > 150_000:
                wave, rate = decode_audio(value)
                value = encode_wav(wave[: 5 * rate], rate)
            return f'<audio controls src="{_url(value)}"></audio>'
        image = decode_image(value)
        image.thumbnail((256, 256))
        if image.mode in ("L", "RGB") and max(image.size) > 64:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=85)
            return f'<img alt="" src="{_url(out.getvalue())}">'
        return f'<img alt="" src="{_url(encode_png(image))}">'
    except MediaError as error:
        return html.escape(str(error))


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def report(manifest: Manifest, examples: list[Example], reasons: Counter[str], title: str) -> str:
    """The page as HTML: counts, columns, lengths, examples, what was rejected and why. Loads nothing from elsewhere."""
    name = html.escape(title)
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Dataset {name}</title><style>{_STYLE}</style>',
        f"<h1>Dataset: {name}</h1>",
        *(f'<p class="warn">{html.escape(warning)}</p>' for warning in manifest.warnings),
        "<h2>Records</h2>",
        _table(["split", "records"], [[split, f"{count:,}"] for split, count in manifest.counts.items()]),
        "<h2>Columns</h2>",
    ]
    rows = []
    for column, kind in manifest.columns.items():
        stats = manifest.statistics[column]
        found = stats.sizes or {}
        if stats.classes:
            found = dict(sorted(stats.classes.items(), key=lambda entry: (-entry[1], entry[0]))[:30])
        more = ", ".join(f"{html.escape(value)} ({count:,})" for value, count in found.items())
        lengths = f"{stats.min:g} / {stats.mean:g} / {stats.max:g} {stats.unit}"
        rows.append(
            [html.escape(column), kind, f"{stats.records:,}", lengths,
             f"{stats.distinct:,}" if stats.distinct is not None else "", more]
        )  # fmt: skip
    page.append(_table(["column", "kind", "records", "min / mean / max", "distinct", "classes or sizes"], rows))
    page.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in manifest.notes) + "</ul>")
    if manifest.near_duplicates or manifest.overlap or manifest.dropped:
        page.append("<h2>Duplicates</h2><p>Every pair is listed in duplicates.jsonl.</p>")
        pairs = [[pair, "equal", f"{n:,}"] for pair, n in manifest.overlap.items()]
        pairs += [[pair, "near", f"{n:,}"] for pair, n in manifest.near_duplicates.items()]
        if manifest.dropped:
            pairs.append(["train", "left out for near-duplicates in val or test", f"{manifest.dropped:,}"])
        page.append(_table(["records of / that stand in", "", "records"], pairs))
    page.append("<h2>Examples</h2>")
    shown = [
        [html.escape(example.id), example.split]
        + [
            _shown(kind, example.parts[column], column in manifest.chats) if column in example.parts else ""
            for column, kind in manifest.columns.items()
        ]
        for example in examples
    ]
    page.append(_table(["id", "split", *map(html.escape, manifest.columns)], shown))
    if reasons:
        page.append(f"<h2>Not used: {manifest.rejected:,}</h2><p>Each file and row is listed in rejects.jsonl.</p>")
        page.append(_table(["reason", "count"], [[html.escape(r), f"{n:,}"] for r, n in reasons.most_common(30)]))
    return "\n".join(page) + "</html>\n"
