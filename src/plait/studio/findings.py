"""What preparing and a run found out about the data: near-duplicates, likely label errors, what to label next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from plait.modalities.media import MEDIA
from plait.studio.workspace import Project


@dataclass(frozen=True)
class Twin:
    """One of two records that are nearly the same.

    Attributes:
        id: The record's.
        split: "train", "val" or "test".
        source: The file (and line) that it came from.
        file: The file, relative to the project's source, where it is a medium; "" else.
    """

    id: str
    split: str
    source: str
    file: str


@dataclass(frozen=True)
class Pair:
    """Two records that are nearly the same.

    Attributes:
        kind: "image", "audio", "video" or "text".
        distance: 0 for equal ones.
        first: The one in the earlier split.
        second: The other.
    """

    kind: str
    distance: float
    first: Twin
    second: Twin

    @property
    def spoils(self) -> bool:
        """Whether a record of val or test is known from another split: figures then look better than they are."""
        return self.first.split != self.second.split


def count_pairs(project: Project) -> int:
    """How many pairs were found when the data were prepared."""
    try:
        with (project.data / "duplicates.jsonl").open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def read_pairs(project: Project, offset: int, count: int) -> list[Pair]:
    """Some of the pairs."""
    try:
        with (project.data / "duplicates.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, offset, offset + count)]
    except OSError:
        return []
    return [
        Pair(row["kind"], row["distance"], _twin(project, row["kind"], row["first"]),
             _twin(project, row["kind"], row["second"]))
        for row in rows
    ]  # fmt: skip


def _twin(project: Project, kind: str, row: dict[str, Any]) -> Twin:
    source = str(row["source"])
    file = source if kind in MEDIA and (project.source / source).is_file() else ""
    return Twin(str(row["id"]), str(row["split"]), source, file)


def read_rejects(data: Path, limit: int = 200) -> tuple[list[dict[str, Any]], int]:
    """The first of what was not used, with file, line and reason, and how many there are."""
    try:
        with (data / "rejects.jsonl").open(encoding="utf-8") as file:
            first = [json.loads(line) for line in islice(file, limit)]
            return first, len(first) + sum(1 for _ in file)
    except OSError:
        return [], 0
