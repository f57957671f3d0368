"""CLIP and SigLIP trained on pairs of one's own, with tiny random models; what is exported is transformers' to load."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plait as library
from conftest import make_image
from plait.core.files import read_json
from plait.core.signals import Signals
from test_pretrained import folders  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]
SAID = ("the cat on the mat", "a dog", "this photo", "user describe image")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Images with captions, each of them another."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for n in range(64):
            make_image(n % 4, rng).resize((32, 32)).save(folder / f"{n}.png")
            table.writerow([f"{n}.png", f"{SAID[n % 4]} word{n}"])
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pairs_are_trained_and_exported(
    kind: str, pairs: Path, folders: dict[str, Path], tmp_path: Path, plait: Plait,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    options = ("--init-from", folders[kind], "--steps", 24, "--batch-size", 16, "--learning-rate", 3e-3)
    assert plait("train", pairs, "-o", run, *options) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{kind} from" in told and "have their own image among the ten nearest" in told
    assert plait("train", pairs, "-o", run, *options) == 0 and "already trained" in capsys.readouterr().out
    assert plait("evaluate", run, "--split", "train") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "found among the first ten" in told and "53 texts" in told
    if kind == "clip":
        assert "of the model it began from: worth it" in told, told
    recall = read_json(run / "metrics.json")["retrieval/caption-image/r_at_10"]
    if kind == "clip":  # so few steps of the other objective move a tiny model by less than one caption
        assert recall["value"] > recall["baseline"]
    assert recall["n"] == 53 and (run / "report.html").is_file()
    assert plait("export", run, "-o", tmp_path / "out") == 0
    model, theirs = library.load(run), transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert "training" not in read_json(tmp_path / "out" / "config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        length = {"padding": "max_length", "max_length": 24} if kind == "siglip" else {}
        found: Any = theirs.get_text_features(**tokenizer(["a dog"], return_tensors="pt", **length))
    vector = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
    assert np.allclose(model.embed(["a dog"]), vector.numpy(), atol=1e-5)
    before = library.load(folders[kind]).embed(["a dog"])
    assert not np.allclose(model.embed(["a dog"]), before, atol=1e-3)
    assert plait("index", "add", tmp_path / "index", pairs, "--model", run) in (0, 2)


def test_every_image_with_the_caption_of_a_query_is_right(
    pairs: Path,
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    table = pairs / "metadata.csv"
    lines = table.read_text().splitlines()
    captions = [line.partition(",")[2] for line in lines]
    for n in range(2, len(lines), 2):  # each of them twice
        lines[n] = lines[n].partition(",")[0] + "," + captions[n - 1]
    table.write_text("\n".join(lines))
    run = library.train(pairs, tmp_path / "run", init_from=str(folders["clip"]), steps=1, batch_size=8, progress=False)
    figures = library.evaluate(run, split="train", progress=False)
    records = [record.parts for record in run.dataset.iterate(run.dataset.indices("train"))]
    texts, model = np.array([record["caption"] for record in records]), run.model()
    scores = model.embed([str(text) for text in texts]) @ model.embed([record["image"] for record in records]).T
    first = float((texts[scores.argmax(1)] == texts).mean())
    assert figures["retrieval/caption-image/r_at_1"].value == pytest.approx(first, abs=1e-6)
    chance = float((texts[:, None] == texts[None]).mean())
    assert figures["retrieval/caption-image/r_at_1"].chance == pytest.approx(chance) and chance > 1 / len(texts)


def test_training_lowers_the_loss_and_goes_on_bit_for_bit(
    pairs: Path,
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"init_from": str(folders["clip"]), "steps": 12, "batch_size": 16, "learning_rate": 1e-3}
    whole = library.train(pairs, tmp_path / "whole", progress=False, **options)
    check, calls = Signals.check, []

    def interrupted(self: Signals) -> None:
        calls.append(0)
        if len(calls) == 5:  # after the fifth step, as Ctrl-C does
            raise KeyboardInterrupt
        check(self)

    monkeypatch.setattr(Signals, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.train(pairs, tmp_path / "cut", progress=False, **options)
    assert not library.Run(tmp_path / "cut").finished
    monkeypatch.setattr(Signals, "check", check)
    cut = library.train(pairs, tmp_path / "cut", progress=False, **options)
    assert cut.finished and read_json(cut.last / "config.json")["training"]["step"] == 12
    assert (cut.last / "model.safetensors").read_bytes() == (whole.last / "model.safetensors").read_bytes()
    with pytest.raises(library.PlaitError, match="can be frozen"):
        library.train(pairs, tmp_path / "odd", progress=False, freeze=["backbone"], **options)
