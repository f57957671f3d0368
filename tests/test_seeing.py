"""A language model of others learns to see: the projection first, then low-rank updates of it, with tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import plait as library
from conftest import write_world
from plait.core.errors import PlaitError
from plait.core.files import read_json
from test_heads import vit  # noqa: F401 (a fixture)
from test_huggingface import CASES, make_tokenizer

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]


def test_a_language_model_learns_to_see(vit: Path, tmp_path: Path, plait: Plait) -> None:  # noqa: F811
    base, data = tmp_path / "qwen2", tmp_path / "data"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**CASES["qwen2"][1], "max_position_embeddings": 128, "eos_token_id": 7})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    make_tokenizer().save(str(base / "tokenizer.json"))
    assert plait("prepare", write_world(tmp_path / "files", 32), "-o", data) == 0
    recipe = tmp_path / "recipe.json"
    weights = {"image": 0, "contrastive": 0}
    training = {"steps": 3, "batch_size": 8, "validations": 1, "task": "describe", "weights": weights}
    model = {"init_from": str(base), "image": {"encoder": f"hf:{vit}"}}
    freeze = {"freeze": ["backbone", "token_embedding"]}
    recipe.write_text(json.dumps({"model": model, "training": training | freeze}))
    first = tmp_path / "projector"
    assert plait("train", data, "-o", first, "--recipe", recipe) == 0
    theirs, ours = load_file(base / "model.safetensors"), load_file(first / "checkpoints/last/model.safetensors")
    assert torch.equal(ours["backbone.blocks.0.feed_out.weight"], theirs["model.layers.0.mlp.down_proj.weight"])
    assert any("image.encoder.out" in name for name in ours)
    recipe.write_text(json.dumps({"model": {"init_from": str(first)}, "training": training}))
    second = tmp_path / "lora"
    assert plait("train", data, "-o", second, "--recipe", recipe, "--lora") == 0
    kept = load_file(second / "checkpoints/last/model.safetensors")
    assert "backbone.blocks.0.feed_out.weight" not in kept  # the updates alone
    seeing = library.load(second)
    image = Image.open(tmp_path / "files/media/0.png")
    written = seeing.describe(image)
    most = seeing.checkpoint.generation.max_new_tokens[seeing.column(None, "text", "describe")]
    assert written == seeing.describe(image, max_new_tokens=most)  # it learnt nothing, and need not fill its context
    assert len(written) < len(seeing.describe(image, max_new_tokens=100))
    assert "describe" in seeing.verbs and read_json(second / "run.json")["steps"] == 3
    assert seeing.vocabulary.end == 7  # the base's own, which it writes from the first step on
    assert "embed" not in seeing.verbs  # a contrast of weight 0 makes no space
    losses = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert not any("contrastive" in name for row in losses for name in row)
    with pytest.raises(PlaitError, match="Did you mean max_new_tokens"):
        seeing.describe(image, max_tokens=3)


def test_an_image_begins_as_its_words(vit: Path, tmp_path: Path, plait: Plait) -> None:  # noqa: F811
    """Before a step is worth anything, what an encoder shows of a red image is the embedding of "red"."""
    base, files = tmp_path / "base", tmp_path / "files"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**CASES["qwen2"][1])).save_pretrained(base)
    make_tokenizer().save(str(base / "tokenizer.json"))
    files.mkdir()
    colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    lines = []
    for number in range(150):
        name = list(colours)[number % 3]
        light = 120 + number * 37 % 136
        Image.new("RGB", (16, 16), tuple(light * c for c in colours[name])).save(files / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"something {name}"}) + "\n")
    (files / "metadata.jsonl").write_text("".join(lines))
    recipe = tmp_path / "recipe.json"
    model = {"init_from": str(base), "image": {"encoder": f"hf:{vit}"}}
    training = {"steps": 1, "learning_rate": 1e-9, "task": "describe", "weights": {"image": 0, "contrastive": 0}}
    recipe.write_text(json.dumps({"model": model, "training": training}))
    assert plait("train", files, "-o", tmp_path / "run", "--recipe", recipe, "--lora") == 0
    seeing = library.load(tmp_path / "run")
    network, text = seeing.checkpoint.model, seeing.checkpoint.text
    table = network.token_embedding.table().float()
    words = torch.stack([table[text.encode(f"something {name}")].mean(0) for name in colours])
    pixels = torch.tensor([[200 * c for c in colour] for colour in colours.values()], dtype=torch.uint8)
    images = pixels[:, None, None].expand(3, 16, 16, 3)
    with torch.no_grad():
        shown = network.media["image"].encoder(images, torch.ones(3, dtype=torch.long)).mean(1)
    likeness = torch.nn.functional.cosine_similarity(shown[:, None], (words - words.mean(0))[None], dim=-1)
    assert likeness.argmax(1).tolist() == [0, 1, 2] and float(likeness.diagonal().min()) > 0.8
    assert 0.3 < float(shown.std() / table.std()) < 3  # as large as embeddings are
    # A caption has room for twice the longest; what a schema asks for has as much as it needs.
    red = Image.new("RGB", (16, 16), (200, 0, 0))
    assert seeing.checkpoint.generation.max_new_tokens["text"] < 40
    schema = {
        "type": "object",
        "properties": {"a": {"const": "x" * 60}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert json.loads(seeing.generate([red], to="text", schema=schema)) == {"a": "x" * 60}
    with pytest.raises(PlaitError, match="no column of texts 'caption'"):
        wrong = {"model": model, "training": training, "generation": {"max_new_tokens": {"caption": 3}}}
        library.train(tmp_path / "run/data", tmp_path / "other", recipe=wrong, progress=False)
