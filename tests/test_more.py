"""A finished run that is trained for longer: what it keeps, what it decides anew, and that it resumes bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import plait as package
from conftest import make_image
from plait.core.errors import PlaitError
from plait.core.files import point
from plait.data.dataset import Dataset
from plait.library.longer import set_aside, settle
from plait.training.encoder_curve import read_curves
from plait.training.parts import Budget
from plait.training.run import Progress
from plait.training.trainer import train

Plait = Callable[..., int]
STEPS, MORE = 24, 16
RECIPE = {
    "model": {"backbone": {"width": 32, "layers": 1, "heads": 2, "dropout": 0.1, "context": 64}, "image": {"stem": 8}},
    "training": {"task": "recognise", "steps": STEPS, "batch_size": 8, "validations": 4, "ema": 0.9},
}


@pytest.fixture(scope="module")
def labelled(plait: Plait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `recipe.yaml` and a finished `run` that recognises."""
    place, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for kind in range(4):
        (place / "files" / f"kind {kind}").mkdir(parents=True)
        for number in range(30):
            make_image(kind, rng).save(place / "files" / f"kind {kind}" / f"{number}.png")
    assert plait("prepare", place / "files", "-o", place / "data", "--workers", 0) == 0
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert plait("train", place / "data", "-o", place / "run", "--recipe", place / "recipe.yaml") == 0
    return place


@pytest.fixture
def run(labelled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(labelled / "run", tmp_path / "run", symlinks=True))


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def state(run: Path) -> dict[str, torch.Tensor]:
    newest = run / "checkpoints" / "last"
    return load_file(newest / "model.safetensors") | load_file(newest / "training_state.safetensors")


def test_more_steps_are_a_schedule_of_their_own(
    labelled: Path, run: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").write_text("{}")
    before = min(package.Run(run).history.losses("text", "val")[1])
    command = ("train", labelled / "data", "-o", run, "--recipe", labelled / "recipe.yaml", "--steps", STEPS + MORE)
    assert plait(*command) == 0
    said = capsys.readouterr()
    assert f"Training for {MORE} steps more" in said.out and f"{STEPS} + {MORE}, a schedule each" in said.out
    assert f"going on from step {STEPS}" in said.err and "right on val after more training" in said.err
    assert re.search(r"label from image, before -> after: [\d.]+% -> [\d.]+% of the same \d+", said.out)
    assert not (run / "before").exists()
    rows = [row for row in package.Run(run).history if row["split"] == "train"]
    assert [row["step"] for row in rows] == [10, 20, 24, 30, 40]
    rates = [row["learning_rate"] for row in rows]
    assert rates[3] > 10 * rates[2] and rates[3] > rates[4]  # it rose again, and falls to zero
    learnt = facts(run)["recognisers"]["image"]
    assert learnt["steps"] == STEPS + MORE and learnt["part"] == 1 and facts(run)["parts"][0]["end"] == STEPS
    after = package.Run(run).history.losses("text", "val")
    assert after[0][-1] == STEPS + MORE and min(after[1]) <= before
    assert (run / "checkpoints" / "best" / "classifiers.json").is_file()
    assert (run / "metrics-part-1.json").is_file() and not (run / "metrics.json").exists()
    report = (run / "report.html").read_text()
    assert f"40 steps in 2 parts ({STEPS} + {MORE})" in report and "image encoder: labels" in report
    assert read_curves(run)["image"].steps == [10, 20, 24, 34, 40]  # of both parts
    assert plait(*command) == 0
    assert "already trained" in capsys.readouterr().err
    assert plait(*command[:-1], STEPS - 1) == 1
    assert "other settings" in capsys.readouterr().err


def test_the_better_of_before_and_after_is_kept(run: Path) -> None:
    best = run / "checkpoints" / "best"
    began = best.resolve()
    for change, words in ((0.1, "as good as before"), (-0.1, "the model of before is kept")):
        set_aside(run)
        newer = Path(shutil.copytree(best.resolve(), run / "checkpoints" / f"step-{90 + round(10 * change):06d}"))
        config, classifiers = (json.loads((newer / f"{name}.json").read_text()) for name in ("config", "classifiers"))
        config["training"]["step"] = int(newer.name.removeprefix("step-"))
        if change < 0:
            classifiers["classifiers"][0]["measured"]["mixed"] -= 0.1
        (newer / "config.json").write_text(json.dumps(config))
        (newer / "classifiers.json").write_text(json.dumps(classifiers))
        expected = began if change < 0 else newer
        point(best, newer.name)
        lines = settle(run)
        assert "label from image, before -> after" in lines[0] and words in lines[-1]
        assert best.resolve() == expected and not (run / "before").exists()
        point(best, began.name)
    assert settle(run) == []
    set_aside(run)
    for place in (run / "before", best):  # as of a run that recognises nothing
        (place / "classifiers.json").unlink()
    newer = Path(shutil.copytree(began, run / "checkpoints" / "step-000095"))
    config = json.loads((newer / "config.json").read_text())
    config["training"] |= {"step": 95, "validation": {"text": 0.25}}
    (newer / "config.json").write_text(json.dumps(config))
    point(best, newer.name)
    assert re.fullmatch(r"Validation loss, before -> after: text [\d.]+ -> 0\.250\.", *settle(run))


@pytest.mark.parametrize(("stage", "done"), [("image labels", 10), ("model", STEPS + 6)])
def test_more_resumes_bit_for_bit(labelled: Path, run: Path, stage: str, done: int) -> None:
    dataset, recipe = Dataset.open(labelled / "data"), package.Run(run).recipe
    whole = Path(shutil.copytree(run, run.with_name("whole"), symlinks=True))
    train(dataset, whole, recipe, lambda progress: None, more=Budget(steps=MORE))

    def interrupt(progress: Progress) -> None:
        if progress.stage == stage and progress.done == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, run, recipe, interrupt, more=Budget(steps=MORE))
    assert "finished" not in facts(run)
    train(dataset, run, recipe, lambda progress: None)
    one, other = state(whole), state(run)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    file = "recognisers/image-1.safetensors"
    assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_all_alternatives_are_fitted_once(
    run: Path, plait: Plait, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = "recognition/image-label/small_cnn_accuracy"
    found = []
    for again in (False, True):
        assert plait("evaluate", run, "--folds", 0, "--alternatives", "all") == 0
        assert ("was fitted before" in " ".join(capsys.readouterr().err.split())) is again
        found.append(json.loads((run / "metrics.json").read_text()))
    assert found[0][key]["value"] == found[1][key]["value"] > 0.7
    assert found[0]["timing/small_cnn_image/steps"] == found[1]["timing/small_cnn_image/steps"]
    assert plait("evaluate", run, "--alternatives", "some") == 1
    assert "Known are quick and all" in capsys.readouterr().err


def test_more_minutes(labelled: Path, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert plait("train", labelled / "data", "-o", run, "--minutes", 0.05) == 0
    first = facts(run)
    assert plait("train", labelled / "data", "-o", run, "--minutes", 0.08) == 0
    assert facts(run)["more"]["minutes"] == pytest.approx(0.03)
    assert plait("train", run, "--more", 0.04) == 0
    known = facts(run)
    assert [part.get("more", {}).get("minutes") for part in known["parts"]] == [None, pytest.approx(0.03)]
    assert known["recipe"] == first["recipe"] and known["more"] == {"minutes": 0.04}
    assert plait("train", labelled / "data", "-o", run, "--minutes", 0.05) == 0  # the command that began it
    assert facts(run) == known
    capsys.readouterr()
    assert plait("train", run, "--more", 1, "--seed", 3) == 1
    assert "--seed and --more exclude each other" in capsys.readouterr().err
    assert plait("train", labelled / "data", "--more", 1) == 1
    assert "is not a run" in capsys.readouterr().err
    del known["finished"], known["more"]
    (run / "run.json").write_text(json.dumps(known))
    with pytest.raises(PlaitError, match="was stopped before its end"):
        package.Run(run).more(1)
