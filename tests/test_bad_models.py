"""Models that cannot be used: what is wrong is told at once, and nothing is left half loaded or half written."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import plait as library
from conftest import make_image
from plait.core.errors import PlaitError
from test_heads import bert, table, vit  # noqa: F401 (fixtures)
from test_huggingface import CASES, make_tokenizer

transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**CASES["qwen2"][1])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for n in range(12):
        place = folder / f"kind {n % 2}"
        place.mkdir(parents=True, exist_ok=True)
        make_image(n % 2, rng).save(place / f"{n}.png")
    return folder


def told(call: Callable[[], object]) -> str:
    """The message of a PlaitError that comes within five seconds."""
    begun = time.process_time()
    with pytest.raises(PlaitError) as caught:
        call()
    assert time.process_time() - begun < 5
    return str(caught.value)


def too_large(folder: Path) -> None:
    """Weights of 4 TB, by the header: the file itself is a hole."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with file.open("r+b") as handle:
        handle.truncate(8 + len(header) + 4 * 10**12)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_truncated_weights(language: Path, bert: Path, vit: Path, tmp_path: Path) -> None:  # noqa: F811
    for name, folder in (("language", language), ("text", bert), ("image", vit)):
        cut(bad := copied(folder, tmp_path / name))
        if name != "image":
            assert str(bad) in told(lambda bad=bad: library.load(bad))
    source, run = images(tmp_path / "in"), tmp_path / "run"
    message = told(lambda: library.train(source, run, init_from=str(tmp_path / "image"), progress=False))
    assert str(tmp_path / "image") in message
    assert not (run / "run.json").exists() and not (run / "checkpoints").exists()
    library.train(source, run, init_from=str(vit), progress=False)  # the same folder serves afterwards
    assert library.load(run).classify(next(source.rglob("*.png")))


def test_encoders_too_large_for_memory(bert: Path, vit: Path, tmp_path: Path) -> None:  # noqa: F811
    for folder, source in ((bert, table(tmp_path, 30)), (vit, images(tmp_path / "in"))):
        try:
            too_large(bad := copied(folder, tmp_path / folder.name))
        except OSError:
            pytest.skip("this disk has no files with holes")
        run = tmp_path / f"run of {folder.name}"
        message = told(lambda s=source, r=run, b=bad: library.train(s, r, init_from=str(b), progress=False))
        assert "take 4400.0 GB" in message and "GB are free" in message
        assert not (run / "run.json").exists()


def test_a_gguf_file_of_a_kind_that_is_not_read(language: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    library.export(str(language), tmp_path / "out", to="gguf")
    file = next((tmp_path / "out").glob("*.gguf"))
    library.load(file)
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "qwen2")
    writer.add_block_count(1)
    kind = gguf.GGMLQuantizationType.TQ1_0
    size = gguf.GGML_QUANT_SIZES[kind][1]
    writer.add_tensor("token_embd.weight", np.zeros((4, size), np.uint8), raw_shape=(4, size), raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert "is of type TQ1_0, which is not read" in told(lambda: library.load(tmp_path / "odd.gguf"))
    file.write_bytes(file.read_bytes()[:-64])
    assert "cut short" in told(lambda: library.load(file))
    file.write_bytes(b"GGUF" + bytes(20))
    assert "no GGUF file that can be read" in told(lambda: library.load(file))


def test_a_tokenizer_that_disagrees_with_its_vocabulary(
    language: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Added tokens beyond the table are left out with a note; transformers fails only where a text has one."""
    rows = json.loads((language / "config.json").read_text())["vocab_size"]
    more = copied(language, tmp_path / "more")
    tokenizer = json.loads((more / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    taken = len(tokenizer["model"]["vocab"])
    first = max(taken, max((token["id"] for token in tokenizer["added_tokens"]), default=0) + 1)
    for n in range(rows - first + 2):
        tokenizer["added_tokens"].append({"id": first + n, "content": f"<added {n}>", "special": True, **flags})
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = library.load(more)
    assert f"the model {rows}: the last are left out" in caplog.text
    plain = library.load(language).generate("a b", max_new_tokens=4)
    assert re.sub("<added [0-9]+>", "", str(model.generate("a b", max_new_tokens=4))) == plain
    assert "<added" in model.generate(f"<added {rows - first + 1}>", max_new_tokens=1)  # its letters are read
    words = copied(language, tmp_path / "words")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{n}": taken + n for n in range(rows)}
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"config.json has a vocabulary of {rows}" in told(lambda: library.load(words))


def test_a_model_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/nothing-of-this-name", str(tmp_path / "nowhere"), "a/b/c"):
        assert name.split("/")[-1] in told(lambda name=name: library.load(name))
    with pytest.raises(PlaitError, match="exist"):
        library.train(table(tmp_path, 30), tmp_path / "run", init_from=str(tmp_path / "gone"), progress=False)
    assert not (tmp_path / "run" / "run.json").exists()
