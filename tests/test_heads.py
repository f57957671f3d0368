"""Heads over frozen encoders: fitted by `plait train`, calibrated, with features that are made once."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import plait
import plait as library
from conftest import make_image, tone
from plait.core.config import Recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf import heads
from plait.hf.encoder_features import Variant
from plait.hf.last_blocks import LastBlocks, States, train_last
from plait.hf.pixel_scale import USUAL, better_scale
from plait.modalities.audio_files import decode_audio
from test_huggingface import make_tokenizer

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]
WORDS = {"fruit": "apple pear plum cherry", "metal": "iron copper zinc gold", "river": "rhine nile volga ganges"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def table(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    file = folder / "texts.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for i in range(count):
            label = list(WORDS)[i % 3]
            words = rng.choice(WORDS[label].split(), 3)
            writer.writerow([f"{' '.join(words)} {i}", label])
    return file


def test_a_head_over_a_text_encoder(
    bert: Path, tmp_path: Path, plait: Plait, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = table(tmp_path, 150), tmp_path / "run"
    assert plait("train", source, "-o", run, "--init-from", bert) == 0
    assert "label from text: 3 labels over the frozen encoder" in capsys.readouterr().out
    assert plait("classify", run, "iron zinc gold 3", "--top", 1) == 0
    assert "metal" in capsys.readouterr().out
    assert plait("evaluate", run) == 0
    figures = json.loads((run / "metrics.json").read_text())
    assert (
        figures["recognition/text-label/accuracy"]["value"] > 0.8 > figures["recognition/text-label/accuracy"]["chance"]
    )
    # Features are made once: a second head on the same data asks the encoder for the labels' names alone.
    asked: list[int] = []
    original = heads.TextEncoder.features

    def counted(self: heads.TextEncoder, values: list[str]) -> np.ndarray:
        asked.append(len(values))
        return original(self, values)

    monkeypatch.setattr(heads.TextEncoder, "features", counted)
    facts = json.loads((run / "run.json").read_text())
    from plait.data.dataset import Dataset

    heads.train_head(Dataset.open(run / "data"), run, str(bert), facts, Recipe(), "cpu", lambda *_: None)
    assert asked == [3]


def test_probabilities_and_labels_of_ones_own(bert: Path, tmp_path: Path) -> None:
    run = plait.train(table(tmp_path, 90), tmp_path / "run", init_from=str(bert), progress=False)
    model = run.model()
    found = model.classify_inputs(["plum pear plum 1", "nile nile rhine 2"], top=None)
    assert [one[0].label for one in found] == ["fruit", "river"]
    assert all(abs(sum(p.probability for p in one) - 1) < 1e-6 and one.ood_score is not None for one in found)
    two = model.classify_inputs(["plum pear plum 1"], labels=["metal", "river"])[0]
    assert {p.label for p in two} == {"metal", "river"} and abs(sum(p.probability for p in two) - 1) < 1e-6
    with pytest.raises(PlaitError, match="was not learnt"):
        model.classify_inputs(["x"], labels=["bird"])
    with pytest.raises(PlaitError, match="another run"):
        plait.train(table(tmp_path, 60), tmp_path / "run", init_from=str(bert), progress=False)
    kept = read_json(run.best / "config.json")
    heads._save(model.head, {}, {**kept, "version": heads.VERSION - 1}, {}, tmp_path / "older")
    with pytest.raises(PlaitError, match=r"reads heads of version \d+. Train again"):
        plait.load(tmp_path / "older")
    weights = bert / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-4] + b"\0\0\0\1")
        with pytest.raises(PlaitError, match="weights are others now"):
            plait.load(tmp_path / "run")
    finally:
        weights.write_bytes(whole)


def test_ngrams_stand_beside_an_encoder_of_texts_where_both_are_better(bert: Path, tmp_path: Path) -> None:
    """A word among many decides: an encoder that was never trained hardly hears it, n-grams do."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(2200):
        label = list(WORDS)[i % 3]
        words = [
            *rng.choice(["stone", "cloud", "seven", "again", "window", "under"], 9),
            rng.choice(WORDS[label].split()),
        ]
        rows.append((" ".join(rng.permutation(words)) + f" {i}", label))
    with (tmp_path / "texts.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("text", "label"), *rows])
    run = plait.train(tmp_path / "texts.csv", tmp_path / "run", init_from=str(bert), progress=False)
    measured = read_json(run.best / "config.json")["measured"]
    assert measured["together_accuracy"] > 0.99 > measured["accuracy"] + 0.1
    assert "and the n-grams of the texts" in run.describe()
    test = list(run.dataset.iterate(run.dataset.indices("test").tolist()))
    model = run.model()
    found = model.classify_inputs([record.parts["text"] for record in test], top=None)
    right = [one[0].label == record.parts["label"] for one, record in zip(found, test, strict=True)]
    assert np.mean(right) > 0.99
    assert all(abs(sum(p.probability for p in one) - 1) < 1e-6 for one in found)


def test_a_head_over_a_vision_encoder(vit: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for i in range(48):
        place = tmp_path / "images" / f"kind {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        make_image(i % 2, rng).save(place / f"{i}.png")
    run = plait.train(tmp_path / "images", tmp_path / "run", init_from=str(vit), progress=False)
    model = run.model()
    said = [model.classify_inputs([make_image(kind, rng)], top=1)[0][0].label for kind in (0, 1, 0, 1)]
    assert said == ["kind 0", "kind 1", "kind 0", "kind 1"]


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "efficientnet"
    torch.manual_seed(0)
    config = transformers.EfficientNetConfig(
        image_size=64, width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256, num_labels=2, hidden_act="relu6"
    )
    network = transformers.EfficientNetModel(config)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # transformers' own beginning gives zeros at the end
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    network.save_pretrained(folder)
    transformers.EfficientNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["vit", "efficientnet"])
def test_last_blocks_compute_what_the_whole_network_does(name: str, request: pytest.FixtureRequest) -> None:
    network = transformers.AutoModel.from_pretrained(request.getfixturevalue(name)).eval()
    pixels = torch.randn(3, 3, *(2 * [network.config.image_size]))
    if name == "vit":
        with pytest.raises(ValueError, match="no blocks"):  # a single one
            LastBlocks(network, pixels[:1])
        return
    last = LastBlocks(network, pixels[:1])
    states = last.before(pixels)
    with torch.no_grad():
        assert torch.allclose(last.after(states), network(pixel_values=pixels).last_hidden_state, atol=1e-4)
    assert 0 < len(last.trained) < len(list(network.parameters()))
    assert {last.depth(key) for key in last.trained} == set(range(len(last.blocks) - last.first))
    frozen = {key: value.clone() for key, value in network.named_parameters() if key not in last.trained}
    pooled = lambda one: one.mean((2, 3))  # noqa: E731
    train = States(last.before(torch.cat((pixels, pixels + 1)))[None], np.array([0, 0, 0, 1, 1, 1]))
    weights, bias = train_last(last, pooled, train, 2, 0, lambda: float("inf"), lambda *_: None)
    assert (weights.shape, bias.shape) == ((256, 2), (2,)) and bool(weights.abs().sum() > 0)
    assert all(torch.equal(value, frozen[key]) for key, value in network.named_parameters() if key in frozen)


def test_the_seed_alone_governs_what_last_blocks_learn(efficientnet: Path) -> None:
    def trained(seed: int) -> bytes:
        network = transformers.AutoModel.from_pretrained(efficientnet).eval()
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(32, 3, 64, 64, generator=generator)
        last = LastBlocks(network, pixels[:1])
        train = States(last.before(pixels)[None], np.arange(32) % 2)
        pooled = lambda one: one.mean((2, 3))  # noqa: E731
        layer = train_last(last, pooled, train, 2, seed, lambda: float("inf"), lambda *_: None)
        return b"".join(value.detach().numpy().tobytes() for value in (*layer, *last.trained.values()))

    first = trained(0)
    torch.rand(1)
    assert trained(0) == first != trained(1)


class OneImageOnly(torch.nn.Module):
    """A network whose blocks are a chain, but whose end goes by how many images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        states = pixel_values.flatten(2)
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(last_hidden_state=states.reshape(len(pixel_values), -1, 8))


def test_a_network_that_runs_in_two_halves_of_one_image_alone_is_not_cut() -> None:
    with pytest.raises(ValueError, match=r"two halves|no chain"):
        LastBlocks(OneImageOnly(), torch.rand(1, 3, 2, 4))


def test_labels_without_images_are_told(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(3)
    rows = [{"text": f"note {i}", "label": f"kind {i % 2}", "split": "train"} for i in range(24)]
    for i in range(4):  # which train has none of
        make_image(i % 2, rng).save(tmp_path / "in" / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": f"kind {i % 2}", "split": "val"})
    (tmp_path / "in" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PlaitError, match="records of train that have image have 0 of the labels in label"):
        plait.train(tmp_path / "in", tmp_path / "run", init_from=str(vit), progress=False)


def test_a_scale_of_pixels_that_the_weights_do_not_fit_is_found(efficientnet: Path) -> None:
    network = transformers.AutoModel.from_pretrained(efficientnet).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(16, 3, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    half, imagenet, plain = USUAL
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.train()
    norm.momentum = None
    with torch.no_grad():  # what it remembers: pixels around a half
        network(pixel_values=(pixels - 0.5) / 0.5)
    norm.eval()
    assert better_scale(network, pixels, half) is None
    assert better_scale(network, pixels, imagenet) == half == better_scale(network, pixels, plain)
    assert better_scale(torch.nn.Sequential(), pixels, imagenet) is None


def test_last_blocks_are_kept_where_they_are_better(efficientnet: Path, tmp_path: Path, plait: Plait) -> None:
    rng = np.random.default_rng(3)
    for i in range(240):
        place = tmp_path / "images" / f"kind {i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        make_image(i % 4, rng).resize((32, 32)).save(place / f"{i}.png")
    run = library.train(tmp_path / "images", tmp_path / "run", init_from=str(efficientnet), progress=False)
    config = read_json(run.best / "config.json")
    measured = config["measured"]
    better = measured["blocks_nats"] < measured["nats"]
    assert (config["blocks"] > 0) == better == (run.best / heads.BLOCKS).exists()
    assert plait("evaluate", run.folder) == 0
    # A checkpoint with other blocks than the encoder's answers by them.
    model = run.model()
    assert isinstance(model, heads.HeadModel) and isinstance(model.encoder, heads.MediaEncoder)
    encoder, asked = model.encoder, [make_image(kind, rng).resize((32, 32)) for kind in range(4)]
    last = LastBlocks(encoder.network, encoder.pixels(asked[:1], Variant()))
    with torch.no_grad():
        for parameter in last.trained.values():
            parameter.mul_(1.5)
    weights = {name: value.detach().clone() for name, value in last.trained.items()}
    encoder.means_only = True
    features = encoder.features(asked)
    width = features.shape[1] // encoder.views
    head = heads.Head(
        config["labels"], rng.normal(size=(width, 4)), np.zeros(4), np.zeros(width), np.ones(width), 1.0,
        np.ones((4, width)), np.zeros(1),
    )  # fmt: skip
    heads._save(head, {}, {**config, "blocks": 2}, weights, tmp_path / "other")
    other = library.load(tmp_path / "other")
    assert isinstance(other, heads.HeadModel) and np.allclose(other.encoder.features(asked), features, atol=1e-4)
    probabilities = {p.label: p.probability for p in other.classify_inputs(asked[:1], top=None)[0]}
    expected = np.exp(head.log_probabilities(features[:1]))[0]
    assert [probabilities[label] for label in config["labels"]] == pytest.approx(expected.tolist(), abs=1e-3)
    # As it is, on wish.
    data, wish = tmp_path / "run" / "data", {"init_from": str(efficientnet), "progress": False}
    frozen = library.train(data, tmp_path / "frozen", freeze=["encoder"], **wish)
    assert "blocks_nats" not in read_json(frozen.best / "config.json")["measured"]
    with pytest.raises(PlaitError, match="the encoder alone can be frozen"):
        library.train(data, tmp_path / "odd", freeze=["backbone"], **wish)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_best_start_is_found_told_and_taken(
    kind: str, bert: Path, vit: Path, tmp_path: Path, plait: Plait, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "vit").symlink_to(vit)
    (shelf / "bert").symlink_to(bert)
    broken = shelf / "broken"  # larger, and so the first choice, but none of its kind
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no such thing"}')
    (broken / "preprocessor_config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes() * 3)
    if kind == "text":
        source = table(tmp_path, 90)
    else:
        source, rng = tmp_path / "images", np.random.default_rng(3)
        for i in range(24):
            (source / f"kind {i % 2}").mkdir(parents=True, exist_ok=True)
            make_image(i % 2, rng).save(source / f"kind {i % 2}" / f"{i}.png")
    name = {"text": "bert", "image": "vit"}[kind]
    options = ("--models", shelf, "--steps", 2, "--size", "tiny")
    assert plait("train", source, "-o", tmp_path / "plain", *options) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{name} ({name}," in told and "To take it: --start best" in told
    assert plait("train", source, "-o", tmp_path / "scratch", *options, "--start", "scratch") == 0
    assert "pretrained" not in capsys.readouterr().out
    for _ in range(2):  # the second time it is trained already
        assert plait("train", source, "-o", tmp_path / "best", "--models", shelf, "--start", "best") == 0
    assert "already trained" in " ".join(capsys.readouterr().out.split())
    assert Path(read_json(tmp_path / "best" / "checkpoints" / "best" / "config.json")["encoder"]).name == name
    for bad in (
        ("--start", "better"),
        ("--start", "best", "--init-from", bert),
        ("--start", "best", "--models", tmp_path / "nowhere"),
    ):
        assert plait("train", source, "-o", tmp_path / "bad", *bad) == 1


def test_a_head_over_an_audio_encoder_hears_each_clip_at_two_speeds(tmp_path: Path) -> None:
    encoder = tmp_path / "whisper"
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=20, vocab_size=60,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(encoder)
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(encoder)
    rng = np.random.default_rng(0)
    for n in range(48):
        place = tmp_path / "in" / f"tone {n % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.wav").write_bytes(tone(n % 3, rng))
    run = plait.train(tmp_path / "in", tmp_path / "run", init_from=str(encoder), progress=False)
    model = run.model()
    assert isinstance(model, heads.HeadModel)
    clips = [tone(n, rng) for n in range(3)]
    assert [found[0].label for found in model.classify_inputs(clips)] == ["tone 0", "tone 1", "tone 2"]
    both = model.encoder.features(clips)
    width = both.shape[1] // 2
    assert len(model.head.mean) == width and model.embed(clips).shape == (3, width)
    wave, rate = decode_audio(clips[0])
    assert np.allclose(model.encoder.features([(wave, round(rate * 0.85))])[0, :width], both[0, width:], atol=1e-4)
