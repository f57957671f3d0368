"""Explanations: planted causes are found, what cannot be explained is refused, imports answer as well."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import plait as api
from conftest import EN, RECIPE, make_image, tone
from plait.core.errors import PlaitError
from plait.explain.methods import areas, integrated_gradients, occlusion
from plait.explain.parts import Grid, log_odds
from plait.explain.parts import IntegrationPath as Way
from plait.explain.plait_models import question
from plait.hf.pretrained import load_pretrained
from plait.modalities.image import Image as Images
from plait.modalities.text import words
from test_pretrained import folders, make, write_tokenizer  # noqa: F401


@given(st.text(max_size=40))
def test_words_make_up_the_text(text: str) -> None:
    assert "".join(words(text)) == text
    assert words("a red 红圆 disc ") == ["a", " red", " 红", "圆", " disc", " "]


class Linear:
    """A question with a known answer: the score is a sum over places."""

    answer, measure = "sum", "similarity"

    def __init__(self, grads: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        sample = rng.integers(60, 200, (*grads.shape, 1)).astype(np.uint8)
        sample[0] = sample[-1] = sample[:, 0] = sample[:, -1] = 10  # the edge, so nothing is 10
        self.grads, self.parts = grads, [Grid(sample, Images, "image")]

    def scores(self, inputs: list) -> np.ndarray:
        return np.array([(values[0][..., 0] * self.grads).sum() for values in inputs])

    def chances(self, scores: np.ndarray) -> np.ndarray:
        return scores

    def path(self) -> Way:
        grads = torch.from_numpy(self.grads).double()
        ends = tuple(torch.from_numpy(x.astype(float))[None] for x in (self.parts[0].sample, self.parts[0].baseline))
        return Way(
            lambda x: (x[..., 0] * grads).sum((1, 2)), ends[:1], ends[1:], lambda w: [self.parts[0].summed(w[0])]
        )


def test_weights_of_a_linear_score_are_exact() -> None:
    """Gradients give each unit its own share, occlusion the mean over windows of four units' shares."""
    grads = np.zeros((16, 16))
    grads[5, 9], grads[11, 3] = 3.0, -2.0  # units (2, 4) and (5, 1)
    question = Linear(grads)
    part = question.parts[0]
    share = part.summed((part.sample - part.baseline.astype(float)) * grads[..., None])
    found, gap = integrated_gradients(question, 8)
    np.testing.assert_allclose(found[0], share, atol=1e-6)
    assert gap < 1e-6
    weights = occlusion(question, float(question.scores([[part.sample]])[0]))[0].reshape(8, 8)
    assert np.unravel_index(weights.argmax(), (8, 8)) == (2, 4) and np.isclose(weights[2, 4], share[2 * 8 + 4])
    assert np.isclose(weights[1, 4], share[2 * 8 + 4] / 2) and weights[5, 1] < 0
    better, worse = areas(question, [share]), areas(question, [-share])
    assert (
        better.random_maps_beaten == 10
        and worse.random_maps_beaten == 0
        and better.deletion < min(better.random_deletion)
    )


def test_log_odds() -> None:
    scores = np.log(np.array([[0.7, 0.2, 0.1]]))
    assert np.isclose(log_odds(scores, 0)[0], math.log(0.7 / 0.3))


def test_a_planted_mark_is_found(tmp_path: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    """Images of noise whose class is a small square's colour: both methods point at the square."""
    rng = np.random.default_rng(0)
    files, rows = tmp_path / "files", []
    files.mkdir()
    places = {}
    for i in range(240):
        pixels = rng.integers(90, 160, (16, 16, 3)).astype(np.uint8)
        x, y = (int(v) for v in rng.integers(1, 12, 2))
        kind = i % 2
        pixels[y : y + 3, x : x + 3] = (230, 20, 20) if kind else (20, 20, 230)
        Image.fromarray(pixels).save(files / f"{i}.png")
        places[i] = x, y
        rows.append({"file_name": f"{i}.png", "mark": ("blue", "red")[kind], "split": "test" if i >= 200 else "train"})
    (files / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("steps: 160", "steps: 100").replace("audio: {stem: 8, codec_width: 32}", "")
                      + "  weights: {image: 0}\n")  # fmt: skip
    assert plait("prepare", files, "-o", tmp_path / "data") == 0
    assert plait("train", tmp_path / "data", "-o", tmp_path / "run", "--recipe", recipe) == 0
    model = api.load(tmp_path / "run")
    for method in ("occlusion", "integrated-gradients"):
        hits = 0
        for i in range(200, 208):
            found = model.explain(files / f"{i}.png", ("blue", "red")[i % 2], method=method)
            row, column = divmod(int(found.weights[0].argmax()), 8)
            x, y = places[i]
            hits += x - 2 < 2 * column < x + 3 and y - 2 < 2 * row < y + 3
            assert found.gap is None or found.gap < 0.05
        assert hits >= 7, (method, hits)
    capsys.readouterr()
    file = files / "201.png"
    assert plait("explain", tmp_path / "run", file, "--json", "-o", tmp_path / "why.png") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["answer"] == "red" and shown["areas"]["random_maps_beaten"] == 10 and not shown["warnings"]
    assert Image.open(tmp_path / "why.png").size >= (256, 256)


def test_every_kind_of_input(trained: Path, tmp_path: Path, plait: Callable[..., int], capsys) -> None:
    rng = np.random.default_rng(5)
    make_image(1, rng).save(tmp_path / "a.png")
    (tmp_path / "a.wav").write_bytes(tone(1, rng))
    model = api.load(trained)
    audio = model.explain(tmp_path / "a.wav", EN[1], method="integrated-gradients", steps=200)
    assert audio.parts[0].name == "audio" and audio.gap < 0.05 and audio.areas.random_maps_beaten >= 6
    assert model.explain(tmp_path / "a.png", "蓝圆").answer == "蓝圆"  # finds the column that knows it
    both = model.explain([tmp_path / "a.png", tmp_path / "a.wav"], EN[1])
    assert set(both.lost) == {"image", "audio"} and len(both.weights) == 2
    (tmp_path / "b.wav").write_bytes(tone(2, rng))
    against = model.explain([tmp_path / "a.png", tmp_path / "b.wav"], EN[1])
    assert against.lost["image"] > against.lost["audio"]
    page = tmp_path / "why.html"
    assert plait("explain", trained, tmp_path / "a.wav", "-o", page) == 0
    assert "0.00 to 0." in page.read_text() and "<img" in page.read_text()
    assert plait("explain", trained, "red disc", "--to", "image", "-o", page) == 0
    assert "What depends on which word" in page.read_text()
    drawn = model.explain("red disc", make_image(0, rng), to="image")
    assert drawn.regions.shape == (2, 16) and drawn.regions.sum() > 0
    for modality in ("image", "audio"):
        made = question(model, "blue bar", to=modality, seed=3)
        codec = model.modality(made.column).codec
        with torch.inference_mode():  # what is explained are the codes that were drawn
            np.testing.assert_array_equal(codec.decode(torch.from_numpy(made.codes)[None])[0], made.written.sample)
        grid, shares = made.shown()
        assert shares.shape == (len(made.codes), grid[0] * grid[1]) and np.allclose(shares.sum(1), 1)
        assert (shares >= 0).all() and made.written.name == modality
    capsys.readouterr()
    assert plait("explain", trained, tmp_path / "a.png", "--method", "logit-lens") == 0
    assert "layer 2" in capsys.readouterr().out
    for bad, said in (
        ((tmp_path / "a.png", "--for", "red disk"), "red disc"),
        ((tmp_path / "a.png", "--method", "magic"), "occlusion"),
        ((" ",), "nothing to remove"),
        ((tmp_path / "a.png", "-o", "why.txt"), ".html"),
        (("red disc", "--to", "image", "--method", "integrated-gradients"), "occlusion"),
    ):
        assert plait("explain", trained, *bad) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    assert plait("explain", trained, tmp_path / "white.png") == 1
    assert "nothing to remove" in capsys.readouterr().err


def test_imported_models(folders: dict[str, Path]) -> None:  # noqa: F811
    transformers = pytest.importorskip("transformers")
    clip = api.load(folders["clip"])
    image = Image.new("RGB", (40, 32), "white")
    ImageDraw.Draw(image).rectangle((6, 6, 20, 20), fill="red")
    labels = ["cat", "dog", "mat"]
    chances = dict(clip.classify(image, labels))
    for method in ("occlusion", "integrated-gradients"):
        found = clip.explain(image, "dog", labels=labels, method=method)
        assert abs(found.chance - chances["dog"]) < 1e-2 and found.weights[0].shape == (64,)
    assert clip.explain(image, "a cat").measure == "similarity"
    with pytest.raises(PlaitError, match="logit lens"):
        clip.explain(image, "a cat", method="logit-lens")
    # A causal language model in transformers, beside its own log-probabilities.
    folder = folders["mistral"]
    theirs = load_pretrained(folder, device="cpu")
    text = "the cat sat on the"
    for method in ("occlusion", "integrated-gradients", "logit-lens"):
        found = theirs.explain(text, "mat", method=method)
        assert method == "logit-lens" or (len(found.weights[0]) == 5 and found.measure == "log-likelihood")
    ids = theirs.tokenizer(text)["input_ids"] + theirs.tokenizer("mat", add_special_tokens=False)["input_ids"]
    raw = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = raw(input_ids=torch.tensor([ids])).logits[0, -2].log_softmax(-1)
    assert np.isclose(found.score, float(logits[ids[-1]]), atol=2e-2)
    assert np.isclose(found.layers[-1]["chance"], math.exp(found.score), rtol=0.05)
    with pytest.raises(PlaitError, match="none of these"):
        api.load(folders["bert"]).explain("a text")


def test_causal_models_in_our_backbone(tmp_path: Path) -> None:
    """GPT-2 through our backbone and transformers' own: the same likelihood without each word."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.4,
    )  # fmt: skip
    make(tmp_path, 3, "GPT2LMHeadModel", config)
    write_tokenizer(tmp_path, 64)
    model = api.load(tmp_path)
    text = "the cat sat on a mat"
    found = model.explain(text, "dog")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    encode = model.checkpoint.text.encode

    def told(prompt: str) -> float:
        ids = model.checkpoint.text.start + encode(prompt)
        with torch.no_grad():
            return float(reference(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[encode("dog")[0]])

    pieces = text.split()
    wanted = [told(text) - told(" ".join(p for p in pieces if p is not word)) for word in pieces]
    np.testing.assert_allclose(found.weights[0], wanted, atol=0.05)
    grads = model.explain(text, "dog", method="integrated-gradients", steps=256)
    assert grads.gap < 0.05 and len(grads.weights[0]) == 6
    layers = model.explain(text, "dog", method="logit-lens").layers
    assert len(layers) == 3 and np.isclose(layers[-1]["chance"], math.exp(told(text)), rtol=0.1)
    assert model.explain(text, labels=["dog", "cat"]).measure == "log-odds"
    assert model.explain(text).answer.strip()
