"""Over-fitting as reports show it: the gap and where it opened, calibration, texts learnt by heart, canaries."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.evaluation.memorising import Runs, pieces
from plait.evaluation.metrics import calibration
from plait.reports.overfitting import gap
from plait.training.budget import revision_notes
from plait.training.canaries import canary

WORDS = ["the", "a", "red", "blue", "old", "new", "fox", "dog", "runs", "near", "far", "tree", "and", "then", "sees"]


def test_gap_opens_where_it_stays_open() -> None:
    log = []
    for step in range(10, 101, 10):
        log.append({"step": step, "split": "train", "loss/text": 5 - step / 25})
        val = 5 - min(step, 60) / 25 + (0.3 if step == 20 else 0.0)  # one odd validation does not count
        log.append({"step": step, "split": "val", "loss/text": val})
    found = gap(log, "loss/text")
    assert found is not None and found.opened == 70 and found.lowest == 60
    np.testing.assert_allclose(found.gaps[-1], 40 / 25)
    level = gap([row for row in log if row["step"] in (10, 30, 40)], "loss/text")
    assert level is not None and level.opened is None
    assert gap(log, "loss/image") is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_is_what_the_bins_say(answers: list[tuple[float, bool]]) -> None:
    believed, right = np.array([p for p, _ in answers]), np.array([r for _, r in answers])
    error, _, _, counts = calibration(believed, right)
    wanted = 0.0
    for low in range(10):
        mine = [(p, r) for p, r in answers if low == min(int(p * 10), 9)]
        if mine:
            wanted += abs(sum(p for p, _ in mine) - sum(r for _, r in mine)) / len(answers)
    assert np.isclose(error, wanted) and counts.sum() == len(answers)


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=12), min_size=1, max_size=6), st.data())
def test_runs_are_those_of_the_texts(texts: list[list[str]], data: st.DataObject) -> None:
    runs = Runs([" ".join(text) for text in texts])
    asked = data.draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=10))
    for length in (1, 2, 3, 4):
        known = {tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)}
        wanted = [tuple(asked[i : i + length]) in known for i in range(len(asked) - length + 1)]
        assert runs.seen(" ".join(asked), length).tolist() == wanted


def test_pieces() -> None:
    found = pieces(["a " * 150, "b", " "])
    assert [len(piece.split()) for piece in found] == [64, 64, 1]


def test_canaries_and_texts_by_heart(tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    """The real commands: exposure rises with how often a canary was planted, and what is repeated is found."""
    rng = np.random.default_rng(0)
    splits = ["train", "val", "test", *["train"] * 5]
    rows = [{"text": " ".join(rng.choice(WORDS, 12)), "split": splits[i % 8]} for i in range(240)]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  backbone: {width: 48, layers: 2, heads: 4, context: 48}\n  text: {vocabulary: 300}\n"
        "training: {steps: 80, batch_size: 24, learning_rate: 4.0e-3, patience: 50}\n"
    )
    run = tmp_path / "run"
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data") == 0
    assert plait("train", tmp_path / "data", "-o", run, "--recipe", recipe, "--canaries", 6) == 0
    assert plait("evaluate", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    exposure = [metrics[f"memorising/canaries planted {often} times/exposure"] for often in (1, 10, 100)]
    assert exposure[0]["value"] < exposure[1]["value"] < exposure[2]["value"] and exposure[2]["value"] > 20
    assert exposure[0]["n"] == 2 and 1 < exposure[0]["chance"] < 2
    assert {"verbatim", "near_texts"} <= {name.split("/")[2] for name in metrics if name.startswith("memorising/text/")}
    page = (run / "report.html").read_text()
    assert "learnt by heart" in page and "validation lowest at step" in page
    assert canary(0, 3) == canary(0, 3) != canary(1, 3)
    capsys.readouterr()
    assert plait("train", tmp_path / "data", "-o", run, "--recipe", recipe, "--canaries", 9) == 1
    assert "canaries was 6, now 9" in capsys.readouterr().err


def test_a_run_that_knows_its_few_texts_by_heart_says_so(
    tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of too little text, that has nothing left for test: longer training is not what helps, and val is measured."""
    rng = np.random.default_rng(0)
    texts = ["- it's " + " ".join(rng.choice(WORDS, 30)) for _ in range(6)]
    rows = [{"text": text, "split": "val" if i < 2 else "train"} for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  backbone: {width: 64, layers: 2, heads: 4, context: 64}\n  text: {vocabulary: 300}\n"
        "training: {task: language, steps: 150, batch_size: 4, learning_rate: 4.0e-3, patience: 50}\n"
    )
    run = tmp_path / "run"
    assert plait("train", tmp_path / "texts.jsonl", "-o", run, "--recipe", recipe) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "learnt by heart" in shown and "(--init-from)" in shown and "--minutes" not in shown
    command = shlex.split(shown.partition("See it at work: ")[2])
    assert command == ["plait", "generate", str(run), "--", " ".join(texts[0].split()[:6])]
    assert plait("generate", "--max-new-tokens", 4, *command[2:]) == 0
    capsys.readouterr()
    assert plait("evaluate", run) == 0
    out, err = (" ".join(text.split()) for text in capsys.readouterr())
    assert "learnt by heart" in out and "(--init-from)" in out and "--minutes" not in out
    assert "test has no records" in err and "also chose the checkpoint" in err
    assert "also chose the checkpoint" in (run / "report.html").read_text()
    assert plait("evaluate", run, "--split", "test") == 1


def test_a_schedule_that_changes_is_told_once_in_each_direction() -> None:
    earlier: list[dict[str, Any]] = []
    told = []
    for fit in (110, 60, 95, 50, 12, 11):
        notes = revision_notes(earlier, 100, fit)
        earlier.append({"at": 0, "steps": fit, **({"told": list(notes), "fit": fit} if notes else {})})
        told.append(list(notes))
    assert told == [[], ["slower"], ["faster"], [], ["few"], []]
    assert "60 fit in the time, not 100" in revision_notes([], 100, 60)["slower"]
    assert "12 steps teach hardly anything" in revision_notes([], 13, 12)["few"]
