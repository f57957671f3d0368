"""What preparing and a run found out about the data: near-duplicates, likely label errors, what to label next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from plait.core.files import write_json
from plait.modalities.media import MEDIA
from plait.studio.listing import list_project
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
    # A medium's id is its path; where labels were edited, its source is a line of `metadata.jsonl`.
    places = [str(row["id"]), str(row["source"])] if kind in MEDIA else []
    file = next((place for place in places if (project.source / place).is_file()), "")
    return Twin(str(row["id"]), str(row["split"]), file or str(row["source"]), file)


@dataclass(frozen=True)
class Doubt:
    """A record whose label is to be looked at.

    Attributes:
        file: Relative to the project's source.
        kind: "image", "audio" or "video".
        label: Its label, "" where it has none.
        suggested: The likeliest label.
        probability: Of that one.
    """

    file: str
    kind: str
    label: str
    suggested: str
    probability: float


def write_review(review: Any, path: Path) -> None:
    """Keep what `plait.label_review` found, for the page of data."""
    suspects = [(one.source, one.id, one.label, one.suggested, one.suggested_probability)
                for one in review.suspects if one.likely]  # fmt: skip
    candidates = [(one.source, one.id, "", one.guess, one.probability) for one in review.candidates]
    names = ("source", "id", "label", "suggested", "probability")
    rows = {"suspects": suspects, "candidates": candidates}
    write_json(path, {part: [dict(zip(names, row, strict=True)) for row in entries] for part, entries in rows.items()})


def read_review(project: Project, limit: int = 48) -> tuple[list[Doubt], list[Doubt]]:
    """Labels that are likely wrong, and records to label next, as the newest run that was reviewed sees them; without
    those that were edited since."""
    places = [project.folder / "jobs" / run.name / "review.json" for run in project.runs]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return [], []
    try:
        review = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [], []
    items = {item.path: item for item in list_project(project).items if item.kind in MEDIA}
    names = _described(project)
    parts = []
    for part in ("suspects", "candidates"):
        doubts = []
        for row in review.get(part, []):
            file = next((one for one in (row["source"], row["id"], names.get(row["source"], "")) if one in items), None)
            if file is not None and items[file].label == row["label"]:
                doubts.append(Doubt(file, items[file].kind, row["label"], row["suggested"], row["probability"]))
        parts.append(doubts[:limit])
    return parts[0], parts[1]


def _described(project: Project) -> dict[str, str]:
    """The place of a record in `metadata.jsonl` -> its file."""
    path = project.source / "metadata.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    files = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        name = next((str(row[key]) for key in row if str(key).endswith("file_name")), "")
        files[f"metadata.jsonl:{number}"] = name
    return files


def read_rejects(data: Path, limit: int = 200) -> tuple[list[dict[str, Any]], int]:
    """The first of what was not used, with file, line and reason, and how many there are."""
    try:
        with (data / "rejects.jsonl").open(encoding="utf-8") as file:
            first = [json.loads(line) for line in islice(file, limit)]
            return first, len(first) + sum(1 for _ in file)
    except OSError:
        return [], 0
