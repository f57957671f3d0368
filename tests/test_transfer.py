"""Transfer studies through the real command: what is compared, resumed, shown and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import EN, RECIPE, make_image
from plait.data.dataset import Dataset, SubsetDataset
from plait.transfer_learning.report import verdicts


def test_verdicts() -> None:
    rows = [
        {"labels": "1", "way": way, "seed": seed, "accuracy": base + 0.01 * seed}
        for way, base in (("scratch", 0.4), ("full", 0.7), ("frozen", 0.41), ("lora", 0.2))
        for seed in range(3)
    ]
    found = {verdict["way"]: verdict for verdict in verdicts(rows, ["1", "10"])}
    assert found["full"]["pays"] is True and found["lora"]["pays"] is False and found["frozen"]["pays"] is None
    error = np.std([0, 0.01, 0.02], ddof=1) / 3**0.5
    assert np.isclose(found["full"]["gain"], 0.3) and np.isclose(found["full"]["standard_error"], error * 2**0.5)


def test_a_study(trained: Path, tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(9)
    (tmp_path / "files").mkdir()
    rows = []
    for i in range(64):
        make_image(i % 4, rng).save(tmp_path / "files" / f"{i}.png")
        split = "test" if i >= 48 else "val" if i >= 40 else "train"
        rows.append({"file_name": f"{i}.png", "name": EN[i % 4].replace(" ", "-"), "split": split})
    (tmp_path / "files" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data") == 0
    dataset = Dataset.open(tmp_path / "data")
    some = SubsetDataset(dataset, {"train": dataset.indices("train")[:3]})
    assert len(some.indices("train")) == 3 and len(some.indices("test")) == 16
    assert [record.id for record in some.iterate(some.indices("train"))] == dataset.ids[:3]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("steps: 160", "validations: 2") + "  weights: {image: 0, audio: 0}\n")
    command = ("transfer", trained, tmp_path / "data", "-o", tmp_path / "study", "--labels", "2", "--seeds", "2",
               "--steps", "6", "--limit", "40", "--recipe", recipe)  # fmt: skip
    assert plait(*command, "--ways", "scratch") == 0
    assert plait(*command, "--ways", "scratch,full") == 0
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [(row["way"], row["seed"]) for row in study["rows"]] == [
        ("scratch", 0), ("scratch", 1), ("full", 0), ("full", 1)
    ]  # fmt: skip
    assert all(row["records"] == 8 and 0 <= row["accuracy"] <= 1 for row in study["rows"])
    assert study["before"] > 0.8 and all(row["old"] is not None for row in study["rows"] if row["way"] == "full")
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Where it pays" in page and "What was forgotten" in page and "<svg" in page
    assert not list((tmp_path / "study" / "runs").glob("*/checkpoints"))
    capsys.readouterr()
    for more, said in (
        (("--ways", "half"), "scratch, frozen, lora, full"),
        (("--labels", "0"), "numbers above 0"),
        (("--column", "nothing"), "no column 'nothing'"),
        (("--steps", "7"), "Choose another folder"),
    ):
        assert plait(*command, *more) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")
