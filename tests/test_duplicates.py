"""Near-duplicates: found, told from what is merely alike, listed, left out; and a prepare that is killed goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw, ImageFilter

from plait.data.dataset import Dataset
from plait.data.fingerprints import text_print
from plait.data.near import near_audio, near_images, near_texts
from plait.data.prepare import prepare
from plait.modalities.audio_files import audio_fingerprint, decode_audio, encode_wav
from plait.modalities.image_files import encode_png, image_fingerprint

ROOT = Path(__file__).parents[1]


def scene(n: int, size: int = 96) -> Image.Image:
    small = np.random.default_rng(n).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(small).resize((size, size * 3 // 4), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def song(n: int, rate: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(n)
    at = np.arange(rate // 5) / rate
    notes = [np.hanning(len(at)) * np.sin(2 * np.pi * pitch * at) for pitch in rng.uniform(150, 2500, (6, 2)).sum(1)]
    return (np.concatenate(notes) * 0.5 + rng.normal(0, 0.002, 6 * len(at))).astype(np.float32)


def pairs(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> set[tuple[int, int]]:
    return set(zip(found[0].tolist(), found[1].tolist(), strict=True))


def test_copies_are_found_and_others_are_not() -> None:
    images = [scene(n) for n in range(60)]
    wide, high = images[0].size
    images += [images[3].resize((40, 30)), Image.open(io.BytesIO(saved(images[5], "JPEG", quality=40))),
               images[7].crop((4, 3, wide, high)), images[9].convert("RGBA")]  # fmt: skip
    prints = np.stack([np.frombuffer(image_fingerprint(image), np.uint8) for image in images])
    assert pairs(near_images(prints)) == {(3, 60), (5, 61), (7, 62), (9, 63)}
    clips = [(song(n), 16000) for n in range(40)]
    out = io.BytesIO()
    soundfile.write(out, song(4), 16000, format="OGG")
    clips += [decode_audio(out.getvalue()), (np.pad(song(6), (3000, 500)), 16000), (song(8)[800:] * 0.4, 16000)]
    assert pairs(near_audio([audio_fingerprint(*audio) for audio in clips])) == {(4, 40), (6, 41), (8, 42)}
    rng = np.random.default_rng(0)
    texts = [" ".join(str(rng.integers(1000)) for _ in range(60)) for _ in range(50)]
    texts += [texts[2].replace(" ", ", ").upper(), texts[4][: int(0.95 * len(texts[4]))]]
    signs = np.stack([np.frombuffer(text_print(text), "<u4") for text in texts])
    assert pairs(near_texts(signs)) == {(2, 50), (4, 51)}
    assert text_print("too short") == audio_fingerprint(np.zeros(800, np.float32), 8000) == b""


def test_where_all_are_alike_none_is_a_copy() -> None:
    """Strokes in a black square, as digits are: 80,000 pairs, hundreds of them near, and each its own."""
    rng = np.random.default_rng(0)
    prints = []
    for _ in range(400):
        canvas = np.zeros((28, 28), np.uint8)
        image = Image.fromarray(canvas)
        ImageDraw.Draw(image).line([tuple(rng.uniform(4, 24, 2)) for _ in range(3)], fill=255, width=3, joint="curve")
        prints.append(image_fingerprint(image.filter(ImageFilter.GaussianBlur(1.2))))
    assert len(near_images(np.stack([np.frombuffer(p, np.uint8) for p in prints]))[0]) < 40


def write_files(source: Path) -> None:
    """Thirty images, ten audio clips and ten texts in train; copies of three images and an audio clip in test."""
    for split in ("train", "val", "test"):
        (source / split).mkdir(parents=True)
        (source / split / "own.png").write_bytes(encode_png(scene(200 + len(split))))
    for n in range(30):
        (source / f"train/{n}.png").write_bytes(encode_png(scene(n)))
    for n in range(10):
        (source / f"train/s{n}.wav").write_bytes(encode_wav(song(n), 16000))
        (source / f"test/{n}.png").write_bytes(encode_png(scene(100 + n)))
    for n in (1, 2, 3):
        (source / f"test/copy{n}.jpg").write_bytes(saved(scene(n, 128), "JPEG", quality=60))
    (source / "test/copy4.wav").write_bytes(encode_wav(np.pad(song(4), (2000, 0)), 16000))
    (source / "test/same.png").write_bytes(encode_png(scene(5)))


def test_near_duplicates_are_listed_marked_and_left_out(tmp_path: Path, plait: Callable[..., int]) -> None:
    write_files(tmp_path / "in")
    assert plait("prepare", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.near_duplicates == {"test/train": 4} and dataset.manifest.overlap == {"test/train": 1}
    seen = {dataset.ids[n] for n in np.flatnonzero(dataset.seen())}
    copies = {"test/copy1.jpg", "test/copy2.jpg", "test/copy3.jpg", "test/copy4.wav", "test/same.png"}
    assert seen == copies
    lines = [json.loads(line) for line in (tmp_path / "out/duplicates.jsonl").read_text().splitlines()]
    assert [line["distance"] for line in lines if line["kind"] == "record"] == [0]  # one is there twice, byte for byte
    lines = [line for line in lines if line["kind"] != "record"]
    assert {line["second"]["id"] for line in lines} == copies and {line["first"]["split"] for line in lines} == {
        "train"
    }
    assert {line["kind"] for line in lines} == {"image", "audio"} and sum(line["distance"] == 0 for line in lines) == 1
    assert "Duplicates" in (tmp_path / "out/report.html").read_text()

    assert plait("prepare", tmp_path / "in", "-o", tmp_path / "out", "--drop-near-duplicates", "--workers", 1) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.dropped == 5 and dataset.manifest.counts["test"] == 16 and not dataset.seen().any()
    assert dataset.manifest.near_duplicates == dataset.manifest.overlap == {}
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rejects} == {
        "train/1.png",
        "train/2.png",
        "train/3.png",
        "train/5.png",
        "train/s4.wav",
    }
    assert all("near-duplicate of 'test/" in row["reason"] for row in rejects)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path, how: signal.Signals) -> None:
    """With one process, with two, and killed after some chunks: the same files."""
    source = tmp_path / "in"
    source.mkdir()
    for n in range(1100):
        (source / f"{n:04d}.png").write_bytes(encode_png(scene(n % 1050, 24)) if n % 97 else b"bad")
    command = [sys.executable, "-m", "plait", "prepare", str(source), "-o", str(tmp_path / "out"), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    chunks = tmp_path / ".out.partial/chunks"
    for _ in range(5):  # on a busy machine it may be done before it is stopped
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not list(chunks.glob("*.arrow")) and process.poll() is None:
                time.sleep(0.002)  # until the first chunk is there
            process.send_signal(how)
            said = process.communicate()[1].decode()
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode != 0 and not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in chunks.glob("*.arrow")}
    assert kept and ("the same command goes on" in said) == (how is signal.SIGINT)
    prepare(source, tmp_path / "out", workers=2)
    prepare(source, tmp_path / "whole", workers=1)
    prepare(source, tmp_path / "none", workers=0)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") == digests(tmp_path / "none")
    assert not list(tmp_path.glob(".*"))


def test_a_decoder_that_crashes_takes_one_file_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that ends its process: a module on the path, loaded by the process that checks."""
    source = tmp_path / "in"
    source.mkdir()
    for n in range(5):
        (source / f"{n}.png").write_bytes(encode_png(scene(n)))
    (source / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nCRASH")
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom PIL import Image\nreal = Image.open\n"
        "def opened(file, *a, **k):\n"
        "    if b'CRASH' in file.getvalue(): os.kill(os.getpid(), 9)\n"
        "    return real(file, *a, **k)\n"
        "Image.open = opened\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    prepare(source, tmp_path / "out", workers=1)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert rejects == [{"file": "2.png", "line": None, "kind": "crashed", "reason": "the decoder crashed"}]
    assert len(Dataset.open(tmp_path / "out")) == 4
