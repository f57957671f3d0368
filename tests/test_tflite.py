"""Export to LiteRT: what is handed over, what is said where it fails, and the whole where the environment exists."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import plait as package
from plait.core.errors import PlaitError
from plait.hf import tflite
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig
from test_classifier_export import RECIPE, make_audio, make_images

QWEN3 = {"position": "rotary", "norm": "rms", "activation": "swiglu", "qk_norm": True, "kv_heads": 2}
GPT2 = {"position": "learned", "norm": "layer", "activation": "gelu", "qk_norm": False, "kv_heads": 4}


def make(switches: dict) -> Checkpoint:
    torch.manual_seed(3)
    text = Text.train(["the cat sat on the mat", "twelve quick foxes jump"] * 4, 280)
    backbone = TransformerConfig(width=48, layers=2, heads=4, head_width=12, hidden=80, max_length=64, **switches)
    levels = {"image": [8, 5, 5, 5]}
    vocabulary = Vocabulary(text=text.size, columns={"caption": "text", "image": "image"}, levels=levels, closers=[])
    settings = {"image": {"levels": levels["image"]}}
    config = ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=16, tied=False, modalities=settings)
    return Checkpoint(Multimodal(config).eval(), text)


def by_definition(model: Multimodal, ids: torch.Tensor) -> np.ndarray:
    """Logits through the model's own rows and head, not through what the export makes of them."""
    with torch.inference_mode():
        head = model.token_embedding if model.lm_head is None else model.lm_head
        return (model.backbone(model.token_embedding.table()[ids]) @ head.table().t()).numpy()


@pytest.mark.parametrize("switches", [QWEN3, GPT2])
def test_the_program_handed_over_computes_the_models_logits(switches, tmp_path):
    checkpoint = make(switches)
    logits = tflite.hand_over(checkpoint, 20, tmp_path)
    ids = torch.from_numpy(np.load(tmp_path / "cases.npz")["input_ids"])[:, 0]
    logits = logits[:, 0]
    assert logits.shape == (3, 20, checkpoint.model.vocabulary.size) and ids.shape == (3, 20)
    wanted = by_definition(checkpoint.model, ids)
    assert np.abs(logits - wanted).max() < 1e-4
    program = torch.export.load(tmp_path / "program.pt2").module()
    with torch.inference_mode():
        assert np.abs(program(ids[:1]).numpy() - wanted[:1]).max() < 1e-4


def test_nothing_of_litert_is_imported_here():
    code = "import sys, plait.hf.tflite; print([m for m in sys.modules if 'litert' in m or m.startswith('jax')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_broken_environment_says_how_to_remake_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tflite.environment_folder()
    assert place.is_relative_to(tmp_path / "cache" / "plait")
    (place / "venv" / "bin").mkdir(parents=True)
    (place / "environment.json").write_text("{}")
    with pytest.raises(PlaitError, match=r"is broken.*rm -r"):  # no Python in it
        tflite.export_tflite(make(QWEN3), tmp_path / "out", 8)
    (place / "venv" / "bin" / "python").symlink_to(sys.executable)  # one without litert-torch
    with pytest.raises(PlaitError, match=r"is broken: ModuleNotFoundError: .*litert_torch.*rm -r"):
        tflite.export_tflite(make(QWEN3), tmp_path / "out", 8)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tflite, "ROOM", (1e18, 1e18))
    with pytest.raises(PlaitError, match="reads 1 to 64"):
        tflite.export_tflite(make(QWEN3), tmp_path / "out", 65)
    with pytest.raises(PlaitError, match="XDG_CACHE_HOME to a folder with more room"):
        tflite.export_tflite(make(QWEN3), tmp_path / "out")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("WARNING: Retrying after connection broken by 'NewConnectionError()'\nERROR: No matching distribution "
         "found for torch==2.13.0", "No package registry answered"),
        ("ERROR: No matching distribution found for litert-torch<0.11,>=0.10", "another version of Python"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk ran full"),
        ("Error: something else\n\n", "could not be made: Error: something else"),
    ],
)  # fmt: skip
def test_what_pip_says_becomes_what_to_do(said, meant):
    assert meant in tflite.why(said)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_whole_classifier_answers_alike(kind, tmp_path):
    if not (tflite.environment_folder() / "environment.json").is_file() and not os.environ.get("PLAIT_TEST_TFLITE"):
        pytest.skip("PLAIT_TEST_TFLITE=1 makes the environment (2 GB, over the network) and runs this")
    {"image": make_images, "audio": make_audio}[kind](tmp_path / "files")
    run = package.train(tmp_path / "files", tmp_path / "run", recipe=RECIPE, progress=False)
    written = package.export(run.folder, tmp_path / "out", to="tflite")
    assert written.difference < 1e-4
    assert (tmp_path / "out" / "classifier.tflite").read_bytes()[4:8] == b"TFL3"
    facts = json.loads((tmp_path / "out" / "classifier.json").read_text())
    inputs = {"pixels": "float32"} if kind == "image" else {"waveform": "float32", "samples": "int32"}
    assert facts["inputs"] == inputs and len(facts["labels"]) == (3 if kind == "image" else 2)
    assert "classifier.tflite" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("switches", [QWEN3, GPT2])
def test_the_graph_gives_the_same_logits(switches, tmp_path):
    ready = (tflite.environment_folder() / "environment.json").is_file()
    if not (ready and switches is QWEN3) and not os.environ.get("PLAIT_TEST_TFLITE"):
        pytest.skip("PLAIT_TEST_TFLITE=1 makes the environment (2 GB, over the network) and runs this")
    checkpoint = make(switches)
    assert tflite.export_tflite(checkpoint, tmp_path / "out", 24) < 1e-4
    assert (tmp_path / "out" / "model.tflite").read_bytes()[4:8] == b"TFL3"
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
