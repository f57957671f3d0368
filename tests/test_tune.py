"""Studies: ranges, the verdict, and one that is killed and goes on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.core.config import load_recipe, parse_recipe
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.training.build import model_config
from plait.tuning.report import verdict
from plait.tuning.space import GUARDS, NAMES, fields_of, score, with_values

SMALL = """
model:
  backbone: {width: 32, layers: 1, heads: 2, context: 96}
  text: {vocabulary: 280}
  image: {stem: 8, codec_width: 16, codec_blocks: 1}
  audio: {stem: 8, codec_width: 16}
training: {codec_steps: 3, batch_size: 16, learning_rate: 0.9, validations: 4}
"""


@pytest.fixture(scope="module")
def data(world: Path, trained: Path) -> Path:
    return world.parent / "data"


def test_fields_keep_the_default_and_stay_valid(data: Path) -> None:
    dataset = Dataset.open(data)
    for raw in ({}, {"model": {"size": "base"}}, {"training": {"learning_rate": 0.5, "weights": {"audio": 0}}}):
        recipe = parse_recipe(raw, "test")
        fields = fields_of(recipe, dataset, list(NAMES))
        defaults = {field.name: field.default for field in fields}
        for field in fields:
            assert field.low <= field.default <= field.high and (not field.choices or field.default in field.choices)
        # Naming the default values changes nothing of the network.
        same = with_values(recipe, fields, defaults)
        assert model_config(same, dataset, 280, None) == model_config(recipe, dataset, 280, None)
        for values in ({f.name: f.low for f in fields}, {f.name: f.high for f in fields}):
            changed = with_values(recipe, fields, values, seed=7)
            model_config(changed, dataset, 280, None)
            assert changed.training.learning_rate == values["learning_rate"] and changed.training.seed == 7
        assert ("weights.audio" in defaults) == (raw.get("training") is None)
    [mine] = fields_of(load_recipe(None), dataset, ["learning_rate=0.001:0.003"])
    assert (mine.low, mine.high, mine.log) == (0.001, 0.003, True)
    for wrong in ("speed", "learning_rate=1", "learning_rate=3:1", "weights.smell", "seed"):
        with pytest.raises(PlaitError, match=wrong.partition("=")[0]):
            fields_of(load_recipe(None), dataset, [wrong])


def test_scores_do_not_follow_tuned_weights() -> None:
    losses = {"text": 2.0, "image": 3.0, "contrastive:image-text": 1.0, "contrastive:audio-text": 2.0}
    recipe = parse_recipe({"training": {"weights": {"image": 0.5}}}, "test")
    assert score(losses, "loss", recipe) == pytest.approx(2 + 1.5 + 0.5 + 1.0)
    assert score(losses, "contrastive", recipe) == 1.5 and score(losses, "text", recipe) == 2.0


def test_verdict() -> None:
    clear = verdict([2.0, 2.1, 2.2], [1.0, 1.1, 0.9])
    assert clear["better"] is True and clear["gain"] == pytest.approx(1.1)
    # Standard deviations of .1 and .1 over three seeds each.
    assert clear["standard_error"] == pytest.approx(math.sqrt(0.01 / 3 + 0.01 / 3))
    assert verdict([1.0, 2.0, 3.0], [0.9, 2.1, 2.7])["better"] is None
    assert verdict([1.0, 1.1, 0.9], [2.0, 2.1, 2.2])["better"] is False
    assert verdict([math.inf, 2.0, 2.0], [1.0, 1.0, 1.1])["better"] is True
    assert verdict([2.0], [1.0])["better"] is None and verdict([], [])["better"] is None


def test_killed_study_goes_on(
    data: Path, tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "study"
    recipe.write_text(SMALL)
    command = ["tune", data, "-o", study, "--recipe", recipe, "--trials", 4, "--steps", 12, "--processes", 2]
    command += ["--seeds", 2, "--over", "learning_rate,layers", "--objective", "text"]
    first = subprocess.Popen([sys.executable, "-m", "plait", *map(str, command)], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if re.match(r"\d+: (complete|pruned)", line):
            first.kill()  # while others train
            break
    first.stderr.close()
    assert first.wait() != 0
    begun = len(list((study / "trials").iterdir()))
    with (study / "journal.log").open("a") as journal:
        journal.write('{"op_code":6,"worker')  # a full disk cuts a line short
    assert plait(*command) == 0, capsys.readouterr().err
    facts = json.loads((study / "study.json").read_text())
    assert [row["number"] for row in facts["trials"]] == [0, 1, 2, 3] and begun <= 4
    assert facts["counts"]["failed"] == 0 and sum(facts["counts"].values()) == 4
    assert facts["trials"][0]["params"] == {"learning_rate": 0.9, "layers": 1}
    done = [row for row in facts["trials"] if row["state"] == "complete"]
    assert facts["best"] == min(done, key=lambda row: row["value"])
    # What a trial was judged by is what its kept checkpoint's validation says.
    kept = study / "trials" / f"{facts['best']['number']:04d}" / "checkpoints" / "best" / "config.json"
    assert json.loads(kept.read_text())["training"]["validation"]["text"] == facts["best"]["value"]
    assert len(facts["fresh"]) == (4 if facts["best"]["number"] else 0)
    # One run prepared the data; the others took its tokenizer, codecs and cache.
    assert [f.parent.name for f in sorted((study / "trials").glob("*/tokenizer.json"))] == [Path(facts["source"]).name]
    best = load_recipe(study / "best.yaml")
    assert best.training.learning_rate == facts["best"]["params"]["learning_rate"]
    page = (study / "report.html").read_text()
    assert facts["verdict"]["text"].split(":")[0] in page.replace("&#39;", "'")
    assert page.count("<circle") >= 4 and not re.search(r"(src|href)=\"?(http|//)", page)
    # Finished, it trains nothing again; as another study, it is refused.
    assert plait(*command) == 0 and json.loads((study / "study.json").read_text()) == facts
    capsys.readouterr()
    assert plait(*command, "--objective", "image") == 1
    assert "another objective" in capsys.readouterr().err


def test_each_guard_is_tried_alone(data: Path, tmp_path: Path, plait: Callable[..., int]) -> None:
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "study"
    recipe.write_text(SMALL)
    command = ["tune", data, "-o", study, "--recipe", recipe, "--trials", 6, "--steps", 4, "--seeds", 0]
    assert plait(*command, "--over", "guards") == 0
    facts = json.loads((study / "study.json").read_text())
    default = facts["trials"][0]["params"]
    assert set(default) == set(GUARDS)
    flipped = [[name for name in GUARDS if row["params"][name] != default[name]] for row in facts["trials"][1:]]
    assert flipped == [[name] for name in GUARDS]
    assert (study / "report.html").read_text().count("helped</td>") + facts["counts"]["pruned"] >= 1
