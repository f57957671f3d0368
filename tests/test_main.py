"""The whole path through the real commands, on a small world made on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import EN, RECIPE, make_image
from plait.core.config import parse_recipe
from plait.core.progress import ProgressBar
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.training.run import Progress
from plait.training.trainer import train

Plait = Callable[..., int]


def test_files_to_figures(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    for name in (
        "recognition/image-en/accuracy",
        "recognition/audio-zh/accuracy",
        "retrieval/audio-image/p_at_10",
        "drawing/en-image/judged_accuracy",
        "speaking/en-audio/judged_accuracy",
        "codec/image/psnr",
    ):
        assert set(metrics[name]) == {"value", "stderr", "low", "high", "chance", "baseline", "n"}
    assert metrics["recognition/image-en/accuracy"]["value"] > 0.8
    assert metrics["recognition/audio-en/accuracy"]["value"] > 0.6
    assert metrics["retrieval/image-en/p_at_10"]["value"] > metrics["retrieval/image-en/p_at_10"]["chance"]
    assert metrics["drawing/en-image/judge_real"]["value"] > 0.9


def test_report_is_one_file(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" in page and "data:audio" in page and "<svg" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)


def test_use(trained: Path, plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.png"
    make_image(1, np.random.default_rng(9)).save(file)
    assert plait("classify", trained, file) == 0
    assert re.search(r"a\.png: blue disc 0\.\d+", capsys.readouterr().out)
    assert plait("describe", trained, file, "--column", "zh") == 0
    assert plait("draw", trained, "red bar", "-n", 4, "-o", tmp_path / "drawn.png") == 0
    assert Image.open(tmp_path / "drawn.png").size == (130, 130)
    assert plait("speak", trained, "blue bar", "-o", tmp_path / "said.wav") == 0
    wave, rate = soundfile.read(tmp_path / "said.wav")
    assert rate == 8000 and len(wave) > 0
    assert plait("embed", trained, "red disc", file, "-o", tmp_path / "vectors.npy") == 0
    vectors = np.load(tmp_path / "vectors.npy")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_python_face(trained: Path) -> None:
    import plait as package

    model = package.load(trained)
    one = model.generate("red", max_new_tokens=4)
    many = model.generate("red", max_new_tokens=4, num_return_sequences=3)
    assert isinstance(one, str) and one.startswith("red")
    assert len(many) == 3 and all(text.startswith("red") for text in many)
    assert model.generate("red", max_new_tokens=4) == one
    label, probability = model.classify(make_image(2, np.random.default_rng(3)), labels=EN)[0]
    assert label in EN and 0 < probability <= 1
    assert len(model.generate(["a drawing of", "red disc"], to="image", n=2)) == 2


def interrupted_after(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.stage == "model" and progress.done == step:
            raise KeyboardInterrupt

    return report


def test_resume_is_bit_for_bit(world: Path, tmp_path: Path) -> None:
    """Interrupted and gone on with, a run ends with the weights of the run that was not."""
    prepare(world, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    recipe = parse_recipe({"model": _small(), "training": {"steps": 30, "codec_steps": 5, "batch_size": 8}}, "test")
    whole = train(dataset, tmp_path / "whole", recipe, lambda progress: None)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "broken", recipe, interrupted_after(20))
    train(dataset, tmp_path / "broken", recipe, lambda progress: None)
    a = load_file(whole.parent / "last" / "model.safetensors")
    b = load_file(tmp_path / "broken" / "checkpoints" / "last" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _small() -> dict[str, object]:
    import yaml

    return {**yaml.safe_load(RECIPE)["model"], "backbone": {"width": 32, "layers": 1, "heads": 2, "dropout": 0.1}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "nowhere", "-o", "run"), "nowhere"),
        (("evaluate", "nowhere"), "nowhere"),
        (("classify", "nowhere", "x.png"), "nowhere"),
        (("train", "{data}", "-o", "{tmp}/run", "--recipe", "{tmp}/bad.yaml"), "did you mean 'learning_rate'"),
        (("train", "{data}", "-o", "/proc/run"), "/proc/run"),
        (("prepare", "{tmp}/empty", "-o", "{tmp}/out"), "empty"),
        (("classify", "{tmp}/empty", "x.png"), "empty"),
        (("classify", "{run}", "missing.png"), "missing.png does not exist"),
        (("train", "{data}", "-o", "{run}", "--steps", "7"), "other settings"),
    ],
)
def test_mistakes_are_told(
    arguments: tuple[str, ...],
    said: str,
    trained: Path,
    plait: Plait,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("training: {learning_rat: 1}")
    places = {"tmp": tmp_path, "run": trained, "data": trained.parent / "data"}
    assert plait(*(argument.format(**places) for argument in arguments)) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_text_cannot_spell_special_tokens(trained: Path) -> None:
    import plait as package

    model = package.load(trained)
    vocabulary = model.checkpoint.model.vocabulary
    for text in ("<|image|>", "<|endoftext|>", "<|/audio|>", "<|en|>"):
        ids = model.checkpoint.text.encode(text)
        assert len(ids) > 1 and max(ids) < vocabulary.text
        assert model.checkpoint.text.decode(ids) == text


def test_what_is_cut_is_said_and_best_is_the_newest_without_val(
    plait: Plait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few records, none for val, one text longer than the context: counted, trained to the last step, resumed."""
    from plait.reports.report import read_run

    files = tmp_path / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        make_image(i, rng).save(files / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "ab " * 200 if i else EN[0]})
    (files / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for seed in range(20):  # the hash splits: until train has all
        assert plait("prepare", files, "-o", tmp_path / "data", "--workers", 0, "--seed", seed) == 0
        if Dataset.open(tmp_path / "data").manifest.counts == {"train": 3, "val": 0, "test": 0}:
            break
    command = ("train", tmp_path / "data", "-o", tmp_path / "run", "--recipe", tmp_path / "recipe.yaml", "--steps", 6)
    assert plait(*command) == 0
    assert "longer than 46 tokens" in capsys.readouterr().out
    assert "longer than 46 tokens" in read_run(tmp_path / "run").metadata["notes"][0]
    config = json.loads((tmp_path / "run" / "checkpoints" / "best" / "config.json").read_text())
    assert config["training"]["step"] == 6
    assert plait(*command) == 0  # the same command on a finished run is no other recipe
    assert plait("evaluate", tmp_path / "run") == 1
    assert "--split train" in capsys.readouterr().err


def test_a_file_name_with_spaces_is_a_file(trained: Path, plait: Plait, tmp_path: Path) -> None:
    make_image(0, np.random.default_rng(0)).save(tmp_path / "my image.png")
    assert plait("embed", trained, tmp_path / "my image.png", EN[0], "-o", tmp_path / "out.npy") == 0
    vectors = np.load(tmp_path / "out.npy")
    assert plait("embed", trained, tmp_path / "my image.png", "-o", tmp_path / "one.npy") == 0
    assert np.allclose(vectors[0], np.load(tmp_path / "one.npy")[0], atol=1e-5)
    text = tmp_path / "text.npy"
    assert plait("embed", trained, str(tmp_path / "no such.png"), "-o", text) == 0  # a text that ends like a file
    assert not np.allclose(np.load(text)[0], vectors[0], atol=1e-3)


def test_an_unknown_option_is_answered_with_the_one_that_was_meant(
    plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait("explain", "run", "a.png", "--answer", "cat") == 2
    assert "--for" in capsys.readouterr().err


def test_lines_of_progress_say_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(True) as bar:
        for done in (0, 3, 7):
            bar("read", done, 7)
        bar("embed", 0, 1)
        bar("embed", 1, 1)
        bar("note", 1, 1, "so it is")
    assert capsys.readouterr().err.split("\n") == ["read ...", "read: 7/7", "embed ...", "note: so it is", "", ""]
