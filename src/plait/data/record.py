"""A record: one row of the user's data, and the words that the room `data` shares. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plait.core.rejects import Reason, RejectKind

SPLITS = ("train", "val", "test")
RESERVED = ("id", "source", "seen")  # names that no column of the user's can have
LABEL_SEPARATOR = ";"  # between the labels of a record, where a column holds several

# Names of columns that hold labels, however seldom each value stands there.
LABEL_NAMES = ("label", "labels", "intent", "class", "category", "target", "emotion", "sentiment", "topic")
MOST_ONCE = 200  # labels that may stand at a single record each, in a column of such a name

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
    """Something that cannot be used: a file (and line), the reason, and the record's own id where it is known."""

    file: str
    line: int | None
    why: Reason
    id: str | None = None

    @property
    def kind(self) -> RejectKind:
        """What rejections are counted by."""
        return self.why.kind

    @property
    def reason(self) -> str:
        """Why, for people."""
        return str(self.why)

    @property
    def row(self) -> dict[str, Any]:
        """Its line in `rejects.jsonl`."""
        return {"file": self.file, "line": self.line, "kind": self.kind, "reason": self.reason}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Rejected:
        """What a line of `rejects.jsonl` says."""
        return cls(row["file"], row["line"], Reason(RejectKind(row.get("kind", "other")), row["reason"]))


class UnusableError(ValueError):
    """Why a text, a cell or a medium, and so its record, cannot be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def rejected_of(values: list[Any]) -> Rejected:
    """A rejection that was written as a JSON list."""
    file, line, (kind, detail), id = values
    return Rejected(file, line, Reason(RejectKind(kind), detail), id)


def rejected(place: str, why: Reason) -> Rejected:
    """The rejection of a record by its place, `file` or `file:line`."""
    file, _, line = place.rpartition(":")
    return Rejected(file, int(line), why) if file and line.isdigit() else Rejected(place, None, why)


def are_labels(column: str, distinct: int, records: int, per_label: int) -> bool:
    """Whether a column of short texts holds labels: `distinct` different values at `records` records, so that each
    stands at `per_label` of them on average, or fewer where the column's name says that they are labels."""
    if distinct < 2:
        return False
    return distinct <= records // per_label or (column.lower() in LABEL_NAMES and distinct <= MOST_ONCE)


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


def join_labels(labels: Iterable[str]) -> str:
    """Several labels as one text, "joy; anger"; ";" for a record that has none of them. Raises ValueError where
    one holds the separator."""
    named = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if unusable := [label for label in named if LABEL_SEPARATOR in label]:
        raise ValueError(f"the label '{unusable[0]}' holds a '{LABEL_SEPARATOR}'")
    return f"{LABEL_SEPARATOR} ".join(named) or LABEL_SEPARATOR


def split_labels(text: str) -> list[str]:
    """The labels that `join_labels` joined."""
    return [label.strip() for label in text.split(LABEL_SEPARATOR) if label.strip()]


def text_fault(text: str) -> Reason | None:
    """Why a text cannot be used (NUL, half a surrogate pair), or None."""
    if "\0" in text:
        return Reason(RejectKind.BAD_TEXT, "the text holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Reason(RejectKind.BAD_TEXT, "the text is not valid Unicode (half of a surrogate pair)")
    return None
