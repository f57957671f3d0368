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
from plait.core.files import read_json
from test_heads import vit  # noqa: F401 (a fixture)
from test_huggingface import CASES, make_tokenizer

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]


def test_a_language_model_learns_to_see(vit: Path, tmp_path: Path, plait: Plait) -> None:  # noqa: F811
    base, data = tmp_path / "qwen2", tmp_path / "data"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**CASES["qwen2"][1], "max_position_embeddings": 128})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    make_tokenizer().save(str(base / "tokenizer.json"))
    assert plait("prepare", write_world(tmp_path / "files", 32), "-o", data) == 0
    recipe = tmp_path / "recipe.json"
    training = {"steps": 3, "codec_steps": 2, "batch_size": 8, "validations": 1, "task": "describe"}
    model = {"init_from": str(base), "image": {"encoder": f"hf:{vit}", "codec_width": 32}}
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
    assert isinstance(seeing.describe(Image.open(tmp_path / "files/media/0.png")), str)
    assert "describe" in seeing.verbs and read_json(second / "run.json")["steps"] == 3
