"""Example data: each kind can be prepared, and is the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.core.errors import PlaitError
from plait.core.files import sha256_file
from plait.data.dataset import Dataset
from plait.data.examples import examples, write_example
from plait.data.prepare import prepare

COLUMNS = {
    "digits": {"image", "label"},
    "chats": {"messages"},
    "replies": {"question", "reply"},
    "histories": {"item"},
}


@pytest.mark.parametrize("kind", examples())
def test_examples_can_be_prepared(kind: str, tmp_path: Path) -> None:
    folder = write_example(kind, tmp_path / kind)
    again = write_example(kind, tmp_path / "again")
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert names and all(sha256_file(folder / name) == sha256_file(again / name) for name in names)
    prepare(folder, tmp_path / "data")
    manifest = Dataset.open(tmp_path / "data").manifest
    assert set(manifest.columns) == COLUMNS[kind] and not manifest.rejected
    assert all(manifest.counts[split] for split in ("train", "val", "test"))
    with pytest.raises(PlaitError, match="exists already"):
        write_example(kind, folder)


def test_an_unknown_example() -> None:
    with pytest.raises(PlaitError, match="Known are digits"):
        write_example("photos", "nowhere")
