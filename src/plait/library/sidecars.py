"""Files beside media that tell other programs what a model said: XMP for images, SubRip (SRT) for recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

from plait.core.files import write_atomic
from plait.data.files import Media

Sidecar = Literal["xmp", "srt"]
# Kind of sidecar -> the verbs whose answers it can hold.
SIDECARS: dict[Sidecar, tuple[str, ...]] = {"xmp": ("classify", "describe"), "srt": ("transcribe",)}
MADE_BY = "Plait"  # in a sidecar of ours, by which it may be written anew

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="{made_by}">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
{body}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def write_sidecar(kind: Sidecar, value: Any, answer: dict[str, Any]) -> bool:
    """Write what was answered beside a medium: `photo.jpg.xmp`, as darktable, digiKam and Immich read it, or
    `talk.srt`, as players do.

    Nothing is written for a text, a member of an archive, or where nothing is said (none of these; silence). Returns
    whether all is well: False where a file of that name is another program's, which is left as it is.
    """
    if not isinstance(value, Media) or not isinstance(value.path, Path):
        return True
    path = value.path.with_name(f"{value.path.name}.xmp") if kind == "xmp" else value.path.with_suffix(".srt")
    text = xmp(answer) if kind == "xmp" else srt(answer)
    if not text:
        return True
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        if there == text:
            return True
        if kind == "srt" or f'x:xmptk="{MADE_BY}"' not in there:
            return False
    write_atomic(path, text)
    return True


def xmp(answer: dict[str, Any]) -> str:
    """A label as a keyword (dc:subject), a caption as the description; "" where there is neither."""
    if "caption" in answer:
        item = f'<rdf:li xml:lang="x-default">{escape(answer["caption"])}</rdf:li>'
        body = f"   <dc:description><rdf:Alt>{item}</rdf:Alt></dc:description>"
        return _XMP.format(made_by=MADE_BY, body=body)
    words = answer["labels"] if "labels" in answer else [answer["label"]]
    if answer.get("none_of_these") or not words:
        return ""
    items = "".join(f"<rdf:li>{escape(word)}</rdf:li>" for word in words)
    return _XMP.format(made_by=MADE_BY, body=f"   <dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>")


def srt(answer: dict[str, Any]) -> str:
    """Subtitles of the segments, numbered from 1."""
    return "\n".join(
        f"{number}\n{_time(one['start'])} --> {_time(one['end'])}\n{one['text']}\n"
        for number, one in enumerate(answer["segments"], 1)
        if one["text"]
    )


def _time(seconds: float) -> str:
    """HH:MM:SS,mmm."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
