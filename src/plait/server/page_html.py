"""What the page is made of: its style, texts of others as HTML, a conversation, and what a run brings along."""

from __future__ import annotations

import base64
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.modalities.image_files import decode_image
from plait.modalities.media import media_type
from plait.server.service import Served

EXAMPLES, EXAMPLE_BYTES = 4, 100_000  # media of each kind that are ready to click
STYLE = """
.plait-hidden{display:none!important}.plait-bar{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr 3.5rem;
gap:.6rem;align-items:center;margin:.3rem 0}.plait-bar i{display:block;height:.9rem;border-radius:.3rem;
background:var(--color-accent);min-width:2px}.plait-row{display:flex;flex-wrap:wrap;gap:.7rem;align-items:flex-start}
.plait-row figure{margin:0;max-width:11rem}.plait-row figcaption{font-size:.8rem;opacity:.75;overflow-wrap:anywhere}
.plait-row img,.plait-media img,.plait-turn img{width:9rem;height:9rem;object-fit:contain;image-rendering:pixelated;
border-radius:.5rem;border:1px solid var(--border-color-primary);background:var(--background-fill-secondary);margin:0}
.plait-row audio,.plait-media audio,.plait-turn audio{width:min(16rem,100%);height:2.4rem}
.plait-media{border:1.5px dashed var(--border-color-primary);border-radius:.7rem;padding:.8rem}
.plait-media.over{border-color:var(--color-accent)}.plait-media .tools{display:flex;flex-wrap:wrap;gap:.5rem}
.plait-media button,.plait-example{font:inherit;padding:.4rem .8rem;border-radius:.5rem;cursor:pointer;
border:1px solid var(--border-color-primary);background:var(--background-fill-secondary);color:inherit}
.plait-media canvas{display:block;width:min(15rem,100%);aspect-ratio:1;touch-action:none;border-radius:.5rem;
border:1px solid var(--border-color-primary);margin-top:.6rem;cursor:crosshair}.plait-media .shown{margin-top:.6rem}
.plait-media .told{margin:.4rem 0 0;font-size:.85rem;opacity:.75}.plait-examples{display:flex;flex-wrap:wrap;gap:.5rem}
.plait-example{padding:.2rem .5rem}.plait-example img{width:3.2rem;height:3.2rem;object-fit:contain;display:block;
image-rendering:pixelated;margin:0}.plait-turn{margin:.5rem 0;padding:.6rem .9rem;border-radius:.8rem;max-width:85%;
width:fit-content;background:var(--background-fill-secondary);overflow-wrap:anywhere}.plait-turn.user{margin-left:auto;
background:var(--color-accent-soft)}.plait-wrong{color:var(--error-text-color,#b91c1c);padding:.5rem 0}
iframe.plait-report{width:100%;height:75vh;border:1px solid var(--border-color-primary);border-radius:.6rem}
.plait-history{display:flex;flex-wrap:wrap;gap:.4rem;align-items:center;margin:.4rem 0}
.plait-row .plait-item{width:9rem;display:flex;flex-direction:column;gap:.3rem}.plait-item b{font-weight:600}
.plait-item .tile{width:9rem;height:9rem;display:grid;place-items:center;text-align:center;padding:.6rem;
box-sizing:border-box;border-radius:.5rem;border:1px solid var(--border-color-primary);overflow:hidden;
background:var(--background-fill-secondary);font-weight:600;overflow-wrap:anywhere}
.plait-item .tools{display:flex;gap:.3rem}.plait-item button{flex:1;padding:.15rem .3rem;font-size:.85rem}
.plait-marked{font-size:1.15rem;line-height:1.9}.plait-marked span{border-radius:.2rem;padding:0 .15rem;color:#111}
.plait-row .plait-overlay{width:auto;height:auto;min-width:9rem;max-width:100%}
footer{display:none!important}.gradio-container{width:100%!important;max-width:60rem!important;margin:0 auto!important}
.form:not(:has(>:not(.plait-hidden))){display:none!important}.plait-media button,.plait-example{margin:0!important}
"""


def bar_html(label: str, share: float, told: str | None = None) -> str:
    """A label with its probability as a bar; `told` is the figure where it is another."""
    bar = f'<i style="width:{share:.1%}"></i><span>{told or f"{share:.1%}"}</span>'
    return f'<div class="plait-bar"><b>{plain_html(label)}</b>{bar}</div>'


def example_button(where: str, kind: str, number: int, url: str) -> str:
    """A medium that is ready to click, for the field `where`."""
    shown = f'<img src="{url}" alt="example">' if kind == "image" else f"audio {number}"
    return f'<button type="button" class="plait-example" data-to="{where}" data-url="{url}">{shown}</button>'


def word_button(where: str, text: str) -> str:
    """A text that is ready to click."""
    return (
        f'<button type="button" class="plait-example" data-to="{where}" data-text="{escape(text, quote=True)}">'
        f"{plain_html(text)}</button>"
    )


def _button(label: str, act: str, item: str, title: str, say: str) -> str:
    """A button that page.js carries out on an item."""
    data = f'data-act="{act}" data-id="{escape(item, quote=True)}" data-title="{escape(title, quote=True)}"'
    return f'<button type="button" class="plait-example" aria-label="{escape(say, quote=True)}" {data}>{label}</button>'


def add_button(item: dict[str, Any]) -> str:
    """An item that joins the history at a click."""
    return _button(plain_html(item["title"]), "add", item["id"], item["title"], f"add {item['title']}")


def history_html(history: list[tuple[str, str]]) -> str:
    """What was chosen, oldest first; a click takes it out."""
    chips = (_button(f"{plain_html(title)} ✕", "drop", id_, title, f"remove {title}") for id_, title in history)
    return f'<div class="plait-history">{"".join(chips)}</div>'


def item_html(one: dict[str, Any], share: bool) -> str:
    """An item that was found: its image or title, its chance (or, where `share` is not, its cosine), and why."""
    title = plain_html(one["title"])
    shown = f'<img src="{one["preview"]}" alt="">' if one["preview"] else f'<div class="tile">{title}</div>'
    told = f"<b>{title}</b><br>" if one["preview"] else ""
    told += f"{one['probability']:.1%}" if share else f"{one['probability']:.3f}"
    told += f" · {plain_html(', '.join(one['categories']))}" if one["categories"] else ""
    if one["why"]:
        told += "<br>because of " + ", ".join(plain_html(reason["title"]) for reason in one["why"])
    add, like = (
        _button(label, act, one["id"], one["title"], f"{act} {one['title']}")
        for label, act in (("+ add", "add"), ("like it", "like"))
    )
    shown += f'<figcaption>{told}</figcaption><div class="tools">{add}{like}</div>'
    return f'<figure class="plait-item">{shown}</figure>'


def read_history(told: str) -> list[tuple[str, str]]:
    """(id, title) of the items that the page keeps; nothing where it was tampered with."""
    try:
        return [(str(id_), str(title)) for id_, title, *_ in json.loads(told or "[]")][:1000]
    except (ValueError, TypeError, RecursionError):
        return []


def explained_html(found: dict[str, Any]) -> str:
    """An explanation as the route tells it: the marked image or words, the strongest, and what the checks say."""
    body = "".join(wrong(text) for text in found["warnings"])
    body += f"<p>Why <b>{plain_html(found['answer'])}</b>: {found['measure']} {found['score']:.3f}, "
    body += f"chance {found['chance']:.3f}. Red speaks for the answer, blue against it.</p>"
    if "image" in found:
        body += f'<div class="plait-row"><img class="plait-overlay" src="{found["image"]}" alt="marked input"></div>'
    top = max((abs(weight) for part in found["parts"] for weight in part["weights"]), default=0) or 1
    for part in found["parts"]:
        if "words" in part:
            pairs = zip(part["words"], part["weights"], strict=True)
            body += f'<p class="plait-marked">{" ".join(_marked(word, weight / top) for word, weight in pairs)}</p>'
        most = part["strongest"][0]["weight"] if part["strongest"] else 1
        listed = (bar_html(one["where"], one["weight"] / most, f"{one['weight']:+.2f}") for one in part["strongest"])
        body += "".join(listed) or "<p>No part of it speaks for the answer.</p>"
    for part_name, lost in found["lost_without"].items():
        body += f"<p>Without the {plain_html(part_name)} the score is {lost:+.3f} lower.</p>"
    if areas := found.get("areas"):
        beaten, maps = (int(areas[name]) for name in ("random_maps_beaten", "random_maps"))
        body += f"<p>This map does better than {beaten} of {maps} random ones.</p>"
    return body


def _marked(word: str, share: float) -> str:
    """A word on red where its weight, in [-1, 1], speaks for the answer, and on blue where against it."""
    strength = min(abs(share), 1.0) ** 0.7
    ground = (255, 120, 110) if share > 0 else (130, 165, 255)
    colour = ",".join(str(round(255 + (channel - 255) * strength)) for channel in ground)
    return f'<span style="background:rgb({colour})">{plain_html(word)}</span>'


def plain_html(text: str) -> str:
    """Text of others in HTML: escaped, in one line, with nothing that Markdown would read as a sign."""
    return "".join(f"&#{ord(c)};" if c in "*_`~[]#|\\$:" else escape(c) for c in text).replace("\n", "<br>")


def wrong(message: str) -> str:
    """What was wrong, for the visitor."""
    return f'<div class="plait-wrong" role="alert">{plain_html(message)}</div>'


def holds_object(value: Any) -> bool:
    """Whether there is a JSON object in a value."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(holds_object, value)))


def read_messages(told: str) -> list[dict[str, Any]]:
    """The conversation that the page keeps; nothing where it was tampered with."""
    try:
        messages = json.loads(told) if told else []
        talk_html(messages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return list(messages)


def talk_html(messages: list[dict[str, Any]]) -> str:
    """A conversation as HTML."""
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        shown = "".join(map(_shown, [*parts, *message.get("images", [])]))
        if audio := message.get("audio"):
            shown += f'<audio controls src="data:audio/wav;base64,{escape(audio["data"], quote=True)}"></audio>'
        found.append(f'<div class="plait-turn {"user" if message["role"] == "user" else "reply"}">{shown or "…"}</div>')
    return "".join(found)


def _shown(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return plain_html(part["text"])
    if part["type"] == "image_url":
        return f'<img src="{escape(part["image_url"]["url"], quote=True)}" alt="image">'
    data = escape(part["input_audio"]["data"], quote=True)
    return (
        f'<audio controls src="data:audio/{escape(part["input_audio"]["format"], quote=True)};base64,{data}"></audio>'
    )


def part_of(url: str) -> dict[str, Any]:
    """A `data:` URL as a part of a message; the route checks what it says."""
    found = re.match(r"data:audio/([a-z0-9.+-]+);base64,", url[:100])
    if not found:
        return {"type": "image_url", "image_url": {"url": url}}
    form = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "x-flac": "flac"}.get(found[1], found[1])
    return {"type": "input_audio", "input_audio": {"data": url[found.end() :], "format": form}}


# --- what a run brings along --------------------------------------------------------------------------------------


def _run(served: Served) -> Path | None:
    """The folder of the run that a model is of."""
    folder = served.model.folder
    places = [folder, *folder.parents[:2], folder.resolve().parent.parent] if folder is not None else []
    return next((place for place in places if (place / "run.json").is_file()), None)


def report_of(served: Served) -> Path | None:
    """The report of the run that a model is of."""
    run = _run(served)
    return run / "report.html" if run is not None and (run / "report.html").is_file() else None


def examples_of(models: list[Served]) -> tuple[dict[str, list[str]], str]:
    """Kind -> a few media of the models' own data that were not trained on, as `data:` URLs; and the ink in which
    images like these are drawn: "black" on white, or "white" on black."""
    found: dict[str, list[str]] = {}
    dark: list[float] = []
    for served in models:
        run = _run(served)
        if run is None or served.model.plait_model is None:
            continue
        try:
            known = read_place(str(read_json(run / "run.json").get("dataset", "data")), run)
            places = [place for place in (known,) if isinstance(place, Path) and (place / "manifest.json").is_file()]
            dataset = Dataset.open(places[0]) if places else None
            rows: list[int] = dataset.indices("test").tolist() if dataset is not None else []
        except PlaitError:
            continue  # examples are a courtesy
        if dataset is None or not len(rows):
            continue
        step = max(len(rows) // 64, 1)
        for record in dataset.iterate(rows[::step]):
            for name, value in record.parts.items():
                kind, few = dataset.columns[name], found.setdefault(dataset.columns[name], [])
                if isinstance(value, bytes) and len(few) < EXAMPLES and len(value) <= EXAMPLE_BYTES:
                    few.append(f"data:{media_type(value)};base64,{base64.b64encode(value).decode()}")
                    if kind == "image":
                        grey = decode_image(value).convert("RGBA").convert("L")
                        dark.append(sum(i * n for i, n in enumerate(grey.histogram())) / (grey.width * grey.height))
    return found, "white" if dark and sum(dark) / len(dark) < 110 else "black"
