"""What a model can do by now is written while it trains, within its share of the time, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plait
from conftest import make_image
from plait.core.files import sha256_file
from plait.training.samples import FILE, FOLDER, SHARE, Row, Sample, SampleLog

RECIPE = {"model": {"size": "tiny"}, "training": {"steps": 2, "codec_steps": 10, "recogniser_steps": 20}}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / FOLDER / FILE).read_text(encoding="utf-8").splitlines()]


def weights_of(run: Path) -> str:
    return sha256_file(run / "checkpoints" / "last" / "model.safetensors")


@pytest.mark.parametrize("task", ["recognise", "draw"])
def test_samples_are_written_and_change_no_weight(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    files = [{"image": make_image(n % 2, rng), "label": ("red", "blue")[n % 2]} for n in range(40)]
    data = plait.prepare(files, tmp_path / "data")
    recipe = {**RECIPE, "training": {**RECIPE["training"], "task": task}}  # type: ignore[dict-item]
    stages = {}
    for share in (0.0, 1000.0):  # of the time: none, and as much as they take
        monkeypatch.setattr(SampleLog.__init__, "__defaults__", (share,))
        run = plait.train(data, tmp_path / f"{task}-{share:g}", recipe=recipe, progress=False)
        stages[share] = rows_of(run.folder) if (run.folder / FOLDER / FILE).exists() else []
    assert not [row for row in stages[0.0] if row["step"] > 10]  # the first costs nothing that is known before
    assert weights_of(tmp_path / f"{task}-0") == weights_of(tmp_path / f"{task}-1000")
    found = {row["stage"]: row for row in stages[1000.0]}
    assert not any("error" in row for row in stages[1000.0])
    folder = tmp_path / f"{task}-1000" / FOLDER
    if task == "recognise":
        named = found["encoder"]
        assert {one["wanted"] for one in named["samples"]} == {"red", "blue"} and 0 <= named["share"] <= 1
    else:
        for stage in ("codec", "model"):
            assert [Image.open(folder / one["file"]).size for one in found[stage]["samples"] if one["file"]]
        assert {one["asked"] for one in found["model"]["samples"]} >= {"red", "blue"}
    progress = json.loads((tmp_path / f"{task}-1000" / "progress.json").read_text())
    assert progress["work"] == "model" and progress["done"] == progress["total"] == 2


def test_samples_keep_to_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("plait.training.samples.time.perf_counter", lambda: clock[0])
    log, made = SampleLog(tmp_path), []

    def make() -> Row:
        clock[0] += 0.5
        made.append(clock[0])
        return Row("model", "", 1, 1000, [Sample("text", "a", answer="b")])

    for step in range(1000):
        clock[0] += 1.0
        log.add("model", "", step, 1000, make)
    assert made and log.spent <= SHARE * clock[0]


def test_a_sample_that_fails_is_written_down(tmp_path: Path) -> None:
    def fail() -> Row:
        raise ValueError("no paper")

    SampleLog(tmp_path, share=10.0).add("model", "", 1, 2, fail)
    assert rows_of(tmp_path)[0]["error"] == "no paper"
