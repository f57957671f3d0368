"""Records of a project's dataset by their ids, which an edit of labels leaves as they are: what an older run's page
shows stays true when the dataset is made again."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.studio.workspace import Project

_reading = threading.Lock()


def record_part(project: Project, record_id: str, column: str) -> str | bytes:
    """A record's text, or the bytes of its medium.

    Raises PlaitError where the dataset has no such record any more.
    """
    manifest = project.data / "manifest.json"
    if not manifest.is_file():
        raise PlaitError("There are no prepared data yet.")
    with _reading:  # a dataset's cache of row groups is for one reader
        dataset, numbers = _opened(project.data, manifest.stat().st_mtime_ns)
        if column not in dataset.columns or record_id not in numbers:
            raise PlaitError("The data have no such record any more: they were changed since.")
        return dataset.record(numbers[record_id], [column]).parts.get(column, "")


@lru_cache(maxsize=2)
def _opened(data: Path, stamp: int) -> tuple[Dataset, dict[str, int]]:
    """A dataset, and the number of each id; `stamp` tells one dataset from the next in its place."""
    dataset = Dataset.open(data)
    return dataset, {one: number for number, one in enumerate(dataset.ids)}
