"""A record: one row of the user's data, and the words that the room `data` shares. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

SPLITS = ("train", "val", "test")
RESERVED = ("id", "source", "seen")  # names that no column of the user's can have

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
}


@dataclass
class Record:
    """One row of a dataset. `parts` maps column names to text (str) or to a media file's encoded bytes, and holds
    only what is there; `source` says which file (and line) it came from."""

    id: str
    split: str
    parts: dict[str, str | bytes] = field(default_factory=dict)
    source: str = ""


class Rejected(NamedTuple):
    """Something that cannot be used: a file (and line) and the reason."""

    file: str
    line: int | None
    reason: str


def rejected(place: str, reason: str) -> Rejected:
    """The rejection of a record by its place, `file` or `file:line`."""
    file, _, line = place.rpartition(":")
    return Rejected(file, int(line), reason) if file and line.isdigit() else Rejected(place, None, reason)


def split_name(name: str) -> str | None:
    """The split that a folder or a value of a `split` column names ("validation" -> "val"), or None."""
    return _SPLIT_NAMES.get(name.strip().lower())


def split_of_file(stem: str) -> str | None:
    """The split that a table's or an idx file's name begins with: `train-00000-of-00001`, `t10k-images`."""
    if stem.startswith("t10k"):
        return "test"
    match = re.match(r"[A-Za-z]+", stem)
    rest = stem[match.end() :] if match else ""
    return split_name(match[0]) if match and (not rest or not rest[0].isalpha()) else None


def text_fault(text: str) -> str | None:
    """Why a text cannot be used (NUL, half a surrogate pair), or None."""
    if "\0" in text:
        return "the text holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not valid Unicode (half of a surrogate pair)"
    return None
