"""What a project's files are good for, as far as their beginnings tell before anything is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.core.config import DataRecipe
from plait.core.errors import PlaitError
from plait.data.files import Tree
from plait.data.prepare import DATA_KINDS
from plait.server.page_parts import PAGE_PARTS
from plait.studio.excerpts import Excerpt, read_excerpt
from plait.studio.listing import Item, Listing
from plait.studio.workspace import Project, safe_path
from plait.training.tasks import QUESTIONS, REPLIES

LOOKED_AT = 20  # tables and texts, at most

TaskName = Literal["nothing", "recognise", "no_labels", "chat", "reply", "feature", "text"]


@dataclass(frozen=True)
class SeenTask:
    """What the files are for.

    Attributes:
        name: Of the sentence that says so.
        labels, files: How many there are, of media.
        feature: The name of the part of the Use page that data of a feature's are for; "" for others.
    """

    name: TaskName
    labels: int = 0
    files: int = 0
    feature: str = ""

    def title(self, language: str) -> str:
        """What a feature calls what it does, "" for other tasks."""
        part = next((part for part in PAGE_PARTS.all() if part.name == self.feature), None)
        return part.title[language] if part is not None else ""


def seen_task(project: Project, listing: Listing | None) -> SeenTask:
    """What a project's files are for. It is seen for certain when they are prepared."""
    if listing is None or not listing.items:
        return SeenTask("nothing")
    labels, files = [label for label in listing.labels if label], sum(listing.labels.values())
    if labels:
        return SeenTask("recognise", len(labels), files)
    if files:
        return SeenTask("no_labels", files=files)
    texts = [item for item in listing.items if item.kind == "text"][:LOOKED_AT]
    if feature := _feature_of(project, texts):
        return SeenTask("feature", feature=feature)
    excerpts = [_excerpt(project, item) for item in texts]
    if any(one.conversations for one in excerpts):
        return SeenTask("chat")
    if any(_has(one, QUESTIONS) and _has(one, REPLIES) for one in excerpts):
        return SeenTask("reply")
    return SeenTask("text")


def _has(excerpt: Excerpt, names: tuple[str, ...]) -> bool:
    return any(column.lower() in names for column in excerpt.header)


def _excerpt(project: Project, item: Item) -> Excerpt:
    place = project.source if project.source.is_file() else safe_path(project.source, item.path)
    return read_excerpt(place, item.path)


def _feature_of(project: Project, items: list[Item]) -> str:
    """The feature whose data the tables hold, "" where they are records of columns."""
    folder = project.source.parent if project.source.is_file() else project.source
    tree = Tree(folder, project.source, files={item.path: folder / item.path for item in items})
    for name, kind in DATA_KINDS.by_feature().items():
        try:
            if kind(tree, DataRecipe()) is not None:
                return name
        except PlaitError:  # what is wrong is said when the files are prepared
            continue
    return ""
