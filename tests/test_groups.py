"""Records of a group (a speaker, a patient, a folder) share a split: prepared, added to, and measured by folds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import make_image
from plait.data.dataset import Dataset
from plait.data.grouping import group_folds, split_groups
from plait.evaluation.folds import _folds, _groups

Plait = Callable[..., int]
WHO = ("ann", "bob", "cem", "dan", "eva", "fay")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels; each of six people has photos of both, as `N_who_NUMBER.png`."""
    place, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for kind, label in enumerate(("disc", "bar")):
        (place / label).mkdir()
        for who in WHO:
            for number in range(5):
                make_image(2 * kind, rng).save(place / label / f"{kind}_{who}_{number}.png")
    return place


def splits_of_groups(dataset: Dataset) -> dict[str, set[str]]:
    groups, found = dataset.groups, dict[str, set[str]]()
    assert groups is not None
    for split in ("train", "val", "test"):
        for index in dataset.indices(split):
            found.setdefault(str(groups[index]), set()).add(split)
    return found


def test_a_group_stands_in_one_split(
    files: Path, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait("prepare", files, "-o", tmp_path / "plain", "--workers", 0) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Part 2 of the files' names ('ann', 'bob', 'cem', ...)" in said and "--group-by name:2" in said
    pattern = r"_(?P<who>[a-z]+)_"
    for name, options in {"name": ("name:2",), "pattern": ("who", "--pattern", pattern)}.items():
        out = tmp_path / name
        assert plait("prepare", files, "-o", out, "--workers", 0, "--group-by", *options) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(r"each in one split: train 4 \(\w+, \w+, \w+, \w+\), val 1 \(\w+\), test 1 \(\w+\)\.", said)
        dataset = Dataset.open(out)
        found = splits_of_groups(dataset)
        assert found.keys() == set(WHO) and all(len(splits) == 1 for splits in found.values())
        assert dataset.counts == {"train": 40, "val": 10, "test": 10} and set(dataset.columns) == {"image", "label"}
        for index in range(len(dataset)):
            assert f"_{dataset.groups[index]}_" in dataset.ids[index]  # type: ignore[index]
    assert plait("prepare", files, "-o", tmp_path / "x", "--group-by", "folder") == 1
    assert "2 groups, too few" in " ".join(capsys.readouterr().err.split())
    assert plait("prepare", files, "-o", tmp_path / "x", "--group-by", "nobody") == 1
    assert "there is no such column of texts (there are: label)" in " ".join(capsys.readouterr().err.split())


def test_new_records_join_their_group(files: Path, plait: Plait, tmp_path: Path) -> None:
    assert plait("prepare", files, "-o", tmp_path / "data", "--workers", 0, "--group-by", "name:2") == 0
    before = splits_of_groups(Dataset.open(tmp_path / "data"))
    rng = np.random.default_rng(1)
    for label in ("disc", "bar"):
        (tmp_path / "more" / label).mkdir(parents=True)
        for who in WHO:
            make_image(0, rng).save(tmp_path / "more" / label / f"9_{who}_7.png")
    assert plait("prepare", tmp_path / "more", "--into", tmp_path / "data", "--workers", 0) == 0
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset) == 72 and splits_of_groups(dataset) == before


def test_a_column_of_a_table(plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"case {n} is {'well' if n % 2 else 'ill'}", "state": ("ill", "well")[n % 2], "patient": n // 6}
            for n in range(60)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plait("prepare", tmp_path / "a.jsonl", "-o", tmp_path / "plain") == 0
    assert "--group-by patient" in " ".join(capsys.readouterr().out.split())
    assert plait("prepare", tmp_path / "a.jsonl", "-o", tmp_path / "data", "--group-by", "patient") == 0
    dataset = Dataset.open(tmp_path / "data")
    assert all(len(splits) == 1 for splits in splits_of_groups(dataset).values())
    assert set(dataset.columns) == {"text", "state"} and dataset.counts["test"] == dataset.counts["val"] == 6
    groups = _groups(dataset)
    assert groups is not None and len(np.unique(groups)) == 10

    class Everything:
        indices = np.arange(60)
        classes = np.arange(60) % 2

        def __len__(self) -> int:
            return 60

    fold = _folds(dataset, Everything(), 5, seed=0)  # type: ignore[arg-type]
    assert all(len(np.unique(fold[groups == group])) == 1 for group in np.unique(groups))
    assert np.bincount(fold).tolist() == [12] * 5


def test_large_groups_leave_something_for_every_split() -> None:
    draw = np.repeat([0.1, 0.2, 0.9], [10, 80, 10])
    split = split_groups(draw)
    assert {int(split[draw == value][0]) for value in (0.1, 0.2, 0.9)} == {0, 1, 2} and split[draw == 0.2][0] == 0
    assert len(np.unique(group_folds(np.repeat(np.arange(4), 5), 4, 0))) == 4
