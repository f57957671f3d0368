"""A small world made on the spot: four shapes as images, four tones as audio clips, their names in two languages."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as `plait` does; read when torch loads
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the tests, and with them the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from plait.modalities.audio_files import encode_wav  # isort: skip before torch: PLAIT_ISA may cap what torch uses

import torch

torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and what they start inherits that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

EN = ["red disc", "blue disc", "red bar", "blue bar"]
ZH = ["红圆", "蓝圆", "红条", "蓝条"]

RECIPE = """
model:
  backbone: {width: 48, layers: 2, heads: 4, context: 96}
  text: {vocabulary: 280}
  image: {stem: 16, codec_width: 32, codec_blocks: 1, rotate: 0}
  audio: {stem: 8, codec_width: 32}
training:
  steps: 160
  codec_steps: 60
  batch_size: 24
  learning_rate: 4.0e-3
"""


def make_image(kind: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (16, 16), "white")
    x, y = (int(v) for v in rng.integers(1, 5, 2))
    box = (x, y, x + 9, y + 9) if kind < 2 else (x, y + 3, x + 10, y + 6)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if kind < 2 else pen.rectangle)(box, fill=("red", "blue")[kind % 2])
    return image


def tone(kind: int, rng: np.random.Generator) -> bytes:
    seconds = np.arange(int(8000 * rng.uniform(0.15, 0.3))) / 8000
    wave = np.sin(2 * np.pi * 300 * 1.7**kind * rng.uniform(0.97, 1.03) * seconds) * 0.5
    return encode_wav((wave + rng.normal(0, 0.01, len(wave))).astype(np.float32), 8000)


def write_world(folder: Path, n: int = 160) -> Path:
    """Files with `metadata.jsonl`: n images with both names, n audio clips with one."""
    rng = np.random.default_rng(0)
    (folder / "media").mkdir(parents=True)
    rows = []
    for i in range(n):
        kind = i % 4
        split = "test" if i % 8 >= 6 else "val" if i % 8 == 5 else "train"
        make_image(kind, rng).save(folder / "media" / f"{i}.png")
        (folder / "media" / f"{i}.wav").write_bytes(tone(kind, rng))
        rows.append({"image_file_name": f"media/{i}.png", "en": EN[kind], "zh": ZH[kind], "split": split})
        name = {"en": EN[kind]} if i % 3 else {"zh": ZH[kind]}
        rows.append({"audio_file_name": f"media/{i}.wav", **name, "split": split})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def plait(monkeysession: pytest.MonkeyPatch) -> Callable[..., int]:
    """The real command line in this process; returns its exit code."""
    from plait import cli

    def run(*arguments: object) -> int:
        monkeysession.setattr(sys, "argv", ["plait", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def monkeysession() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "files")


@pytest.fixture(scope="session")
def trained(world: Path, plait: Callable[..., int]) -> Path:
    """A run trained on the small world through the real commands, and evaluated."""
    run = world.parent / "run"
    recipe = world.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert plait("prepare", world, "-o", world.parent / "data") == 0
    assert plait("train", world.parent / "data", "-o", run, "--recipe", recipe) == 0
    assert plait("evaluate", run, "--reference-seconds", 1) == 0
    return run
