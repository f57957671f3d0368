"""Columns of several labels and of numbers: prepared, trained, evaluated, asked; and stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score

import plait as api
from plait.classifiers.numbers import interval
from plait.classifiers.several import calibrate, f1_scores, macro_f1, micro_f1, sigmoid, thresholds_of
from plait.data.record import join_labels, split_labels
from plait.inference.decisions import Option, Question

Plait = Callable[..., int]
WORDS = {"sweet": "honey sugar candy", "sour": "lemon vinegar lime", "hot": "chili pepper wasabi"}
SMALL = "model: {backbone: {width: 32, layers: 1, heads: 2, context: 64}}\ntraining: {task: recognise, steps: 4}\n"


def test_labels_are_joined_and_split() -> None:
    for labels in (["a"], ["a", "b c"], []):
        assert split_labels(join_labels(labels)) == labels
    assert join_labels([" a ", "a", ""]) == "a"
    with pytest.raises(ValueError, match="holds a"):
        join_labels(["a;b"])


def test_measures_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.random((200, 5)) < 0.3, rng.random((200, 5)) < 0.4
    np.testing.assert_allclose(f1_scores(truth, said), f1_score(truth, said, average=None))
    assert macro_f1(truth, said) == pytest.approx(f1_score(truth, said, average="macro"))
    assert micro_f1(truth, said) == pytest.approx(f1_score(truth, said, average="micro"))


def test_thresholds_and_probabilities_are_fitted() -> None:
    """Of scores whose odds are known the probabilities are right, and the threshold is half the best F1."""
    rng = np.random.default_rng(1)
    logits = rng.normal(-1, 2, (20_000, 3))
    truth = rng.random(logits.shape) < sigmoid(logits)
    slope, offsets = calibrate(logits / 3, truth)
    assert slope == pytest.approx(3, rel=0.05) and np.abs(offsets).max() < 0.15
    chances = sigmoid(logits)
    thresholds = thresholds_of(chances, truth)
    best = f1_scores(truth, chances >= thresholds)
    np.testing.assert_allclose(thresholds, best / 2, atol=0.08)
    assert (best >= f1_scores(truth, chances >= 0.5)).all()


def test_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = []
    for _ in range(400):
        low, high = interval(rng.standard_t(4, 40), 0.9)
        new = rng.standard_t(4, 50)
        held.append(((new >= low) & (new <= high)).mean())
    assert 0.89 < np.mean(held) < 0.97


def rows_of_tastes(count: int = 200) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    rows = []
    for number in range(count):
        tastes = [taste for taste in WORDS if rng.random() < 0.45]
        words = [str(rng.choice(WORDS[taste].split())) for taste in tastes]
        rows.append({"recipe": " ".join([*words, "dish", str(number)]), "tastes": tastes, "price": 2.0 + len(tastes)})
    return rows


@pytest.mark.parametrize("form", ["lists", "bars"])
def test_several_labels_and_numbers(form: str, plait: Plait, tmp_path: Path, capsys: Any) -> None:
    rows = rows_of_tastes()
    source = tmp_path / ("in.parquet" if form == "lists" else "in.csv")
    if form == "lists":
        pq.write_table(pa.Table.from_pylist(rows), source)
        told: list[str] = []
    else:
        lines = [f"{row['recipe']},{'|'.join(row['tastes'])},{row['price']}" for row in rows if row["tastes"]]
        source.write_text("recipe,tastes,price\n" + "\n".join([*lines, "a dish,sweet,dear"]) + "\n")
        told = ["--labels", "tastes"]
    assert plait("prepare", source, "-o", tmp_path / "data", *told, "--number", "price", "--workers", 0) == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["multi_label"] == ["tastes"] and manifest["numbers"] == ["price"]
    assert manifest["rejected"] == (form == "bars")  # "dear" is no number
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL)
    run = tmp_path / "run"
    capsys.readouterr()
    assert plait("train", tmp_path / "data", "-o", run, "--recipe", recipe) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tastes from recipe: 3 labels, several a record" in out and "price from recipe: off by" in out

    model = api.load(run)
    found = model.classify("chili lime dish")
    assert set(found.chosen or []) == {"hot", "sour"} and len(found) == 3
    assert model.several == ["tastes"] and model.numbers == ["price"]
    price = model.estimate("honey lemon pepper dish")
    assert price.low <= price.value <= price.high and abs(price.value - 5) < 1.2
    with pytest.raises(api.PlaitError, match="estimate"):
        model.classify("honey", column="price")
    hot, level, foreign = model.decide("chili dish", [
        Question("predicate", "hot"),
        Question("score", "What is the price?", tuple(map(Option, "2345"))), Question("predicate", "blue"),
    ])  # fmt: skip
    assert hot.probabilities[0] > 0.5 and hot.calibrated and foreign.refusal
    assert abs(level.expected - (model.estimate("chili dish").value - 2)) < 0.8 and level.column == "price"

    assert plait("evaluate", run, "--json") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["recognition/recipe-tastes/macro_f1"]["value"] > 0.9
    assert "recognition/recipe-tastes/f1[hot]" in metrics
    mae = metrics["recognition/recipe-price/mae"]
    assert mae["value"] < mae["chance"] and mae["baseline"] is not None
    assert plait("classify", run, "lime candy dish") == 0
    assert set(capsys.readouterr().out.splitlines()[-1].rpartition(": ")[2].split(", ")) == {"sour", "sweet"}
    assert plait("classify", run, "lime dish", "-o", tmp_path / "a.jsonl") == 0
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row["labels"] == ["sour"] and "probability of hot" in row
    assert plait("classify", run, "lime dish", "-o", tmp_path / "n.jsonl", "--column", "price") == 0
    assert json.loads((tmp_path / "n.jsonl").read_text())["low"] <= 3.5
