"""Near-duplicates planted among images, audio clips and texts made on the spot: how many are found, how many are wrong.

    python bench/near_duplicates.py                       # 300 copies among 10,000 of each
    python bench/near_duplicates.py --images emoji.zip  # and among the images of an archive, whose own likenesses
                                                          # then count as wrong

`plait prepare` does the work: originals go to train, copies to test. A pair of duplicates.jsonl is right where it is an
original and its copy.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFilter

from plait.data.prepare import prepare
from plait.modalities.audio_files import encode_wav, resample
from plait.modalities.image_files import decode_image, encode_png


def make_image(rng: np.random.Generator) -> Image.Image:
    """A scene: a sky, a ground, things of several shapes, texture and light. No two share more than a palette."""
    width, height = (int(v) for v in rng.integers(96, 257, 2))
    corners = Image.fromarray(rng.integers(40, 230, (3, 3, 3), np.uint8))
    image = corners.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 12))):
        x, y = rng.uniform(-0.1, 1, 2) * (width, height)
        a, b = rng.uniform(0.05, 0.5, 2) * (width, height)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape = rng.integers(4)
        if shape == 0:
            pen.ellipse((x, y, x + a, y + b), fill=colour)
        elif shape == 1:
            pen.rectangle((x, y, x + a, y + b), fill=colour, outline="black")
        elif shape == 2:
            pen.polygon([(x, y), (x + a, y + b / 3), (x + a / 2, y + b)], fill=colour)
        else:
            pen.line([(x, y), (x + a, y + b), (x + a / 2, y - b)], fill=colour, width=int(rng.integers(2, 9)))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2))))
    noise = rng.normal(0, rng.uniform(0, 12), (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def image_copy(image: Image.Image, kind: int, rng: np.random.Generator) -> bytes:
    """The image resized, re-encoded, or cut by 5 % at its sides, then saved as JPEG or WebP."""
    width, height = image.size
    if kind == 0:
        factor = float(rng.choice([0.4, 0.5, 0.7, 1.5, 2.0]))
        image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    elif kind == 2:
        left, top = (int(rng.uniform(0, 0.05) * side) for side in image.size)
        image = image.crop((left, top, left + round(0.95 * width), top + round(0.95 * height)))
    out = io.BytesIO()
    image.save(out, str(rng.choice(["JPEG", "WEBP"])), quality=int(rng.integers(35, 90)))
    return out.getvalue()


def make_audio(rng: np.random.Generator, rate: int = 16000) -> np.ndarray:
    """Something like speech: syllables of a gliding voice through moving resonances, hisses and gaps."""
    parts = []
    voice = rng.uniform(80, 260)
    for _ in range(int(rng.integers(2, 8))):
        size = int(rng.uniform(0.08, 0.35) * rate)
        at = np.arange(size) / rate
        if rng.random() < 0.25:
            wave = rng.normal(0, 0.2, size)
            wave = np.convolve(wave, rng.normal(0, 1, 9), "same") * 0.3
        else:
            pitch = voice * (1 + rng.uniform(-0.2, 0.2) * at / at[-1] + 0.05 * np.sin(2 * np.pi * 5 * at))
            phase = 2 * np.pi * np.cumsum(pitch) / rate
            peaks = rng.uniform([250, 800, 2000], [900, 2200, 3500])
            wave = np.zeros(size)
            for n in range(1, 24):
                level = sum(np.exp(-(((n * voice - peak) / 150) ** 2)) for peak in peaks) + 0.02
                wave += level * np.sin(n * phase)
        wave *= np.hanning(size) ** 0.4 * rng.uniform(0.3, 1)
        parts += [wave, np.zeros(int(rng.uniform(0, 0.12) * rate))]
    wave = np.concatenate(parts)
    wave = wave / np.abs(wave).max() * rng.uniform(0.3, 0.9) + rng.normal(0, 0.002, len(wave))
    return wave.astype(np.float32)


def encoded(wave: np.ndarray, rate: int, form: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.clip(wave, -1, 1), rate, format=form)
    return out.getvalue()


def audio_copy(wave: np.ndarray, kind: int, rng: np.random.Generator, rate: int = 16000) -> bytes:
    """The audio at another sampling rate, re-encoded and louder or softer, cut by 5 %, or begun later."""
    if kind == 0:
        to = int(rng.choice([8000, 11025, 22050]))
        wave, rate = resample(wave, rate, to), to
    elif kind == 2:
        start = rng.uniform(0, 0.05)
        wave = wave[int(start * len(wave)) : int((start + 0.95) * len(wave))]
    elif kind == 3:
        silence = rng.normal(0, 0.001, int(rng.uniform(0.02, 0.4) * rate)).astype(np.float32)
        wave = np.concatenate([silence, wave])
    return encoded(wave * rng.uniform(0.5, 1.0), rate, str(rng.choice(["OGG", "MP3", "FLAC"])))


def words(rng: np.random.Generator) -> list[str]:
    """A vocabulary of 5,000 made-up words."""
    syllables = ["ka", "lo", "mi", "ren", "tu", "sha", "vel", "or", "in", "das", "pe", "qui", "bra", "zon", "e", "ist"]
    return ["".join(rng.choice(syllables, int(rng.integers(1, 5)))) for _ in range(5000)]


def text(rng: np.random.Generator, vocabulary: list[str]) -> str:
    """A paragraph; frequencies fall as in real language (Zipf)."""
    places = np.minimum(rng.zipf(1.3, int(rng.integers(20, 120))) - 1, len(vocabulary) - 1)
    return " ".join(vocabulary[n] for n in places).capitalize() + "."


def text_copy(value: str, kind: int, rng: np.random.Generator, vocabulary: list[str]) -> str:
    """The text with another case and other punctuation, some words changed, or cut by 5 %."""
    parts = value.split()
    if kind == 0:
        return "“" + ",  ".join(parts).upper() + "”"
    if kind == 1:
        for n in rng.choice(len(parts), max(len(parts) // 30, 1), replace=False):
            parts[n] = str(rng.choice(vocabulary))
    else:
        size = max(round(0.95 * len(parts)), 1)
        start = int(rng.integers(0, len(parts) - size + 1))
        parts = parts[start : start + size]
    return " ".join(parts)


def write(folder: Path, kind: str, count: int, copies: int, archive: Path | None) -> dict[str, str]:
    """Files in folder/train and folder/test; returns copy -> original."""
    rng = np.random.default_rng(2026)
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
    vocabulary = words(rng)
    given = zipfile.ZipFile(archive) if archive else None
    names = [name for name in given.namelist() if name.endswith((".png", ".jpg"))] if given else []
    total = min(count - copies, len(names)) if given else count - copies
    chosen = set(rng.choice(total, copies, replace=False).tolist())
    truth: dict[str, str] = {}
    ending = {"image": "png", "audio": "wav", "text": "txt"}[kind]
    for n in range(total):
        # An original in train, another in val: copies lie in test.
        split = "val" if n % 10 == 9 else "train"
        name, kept = f"{split}/{n:05d}.{ending}", len(truth)
        copy = f"test/copy{kept:03d}"
        if kind == "image":
            image = decode_image(given.read(names[n])) if given else make_image(rng)
            (folder / name).write_bytes(encode_png(image))
            made: bytes = image_copy(image.convert("RGB"), kept % 3, rng) if n in chosen else b""
            copy += ".jpg"
        elif kind == "audio":
            wave = make_audio(rng)
            (folder / name).write_bytes(encode_wav(wave, 16000))
            made = audio_copy(wave, kept % 4, rng) if n in chosen else b""
            copy += ".ogg"
        else:
            value = text(rng, vocabulary)
            (folder / name).write_text(value)
            made = text_copy(value, kept % 3, rng, vocabulary).encode() if n in chosen else b""
            copy += ".txt"
        if n in chosen:
            (folder / copy).write_bytes(made)
            truth[copy] = name
    return truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--only", choices=["image", "audio", "text"])
    parser.add_argument("--images", type=Path, help="an archive of images in place of made ones")
    options = parser.parse_args()
    print("| what | things | planted | recall | precision | pairs | prepare |\n| --- |" + " ---: |" * 6)
    for kind in [options.only] if options.only else ["image"] if options.images else ["image", "audio", "text"]:
        folder = Path(tempfile.mkdtemp(prefix="plait-near-"))
        try:
            truth = write(folder / "in", kind, options.count, options.copies, options.images)
            begun = time.perf_counter()
            prepare(folder / "in", folder / "out")
            seconds = time.perf_counter() - begun
            found = set()
            for line in (folder / "out" / "duplicates.jsonl").read_text().splitlines():
                pair = json.loads(line)
                found.add(frozenset(pair[side]["source"].split(":")[0] for side in ("first", "second")))
            wanted = {frozenset(pair) for pair in truth.items()}
            recall, precision = len(found & wanted) / len(wanted), len(found & wanted) / max(len(found), 1)
            print(f"| {kind} | {options.count:,} | {len(wanted)} | {recall:.1%} | {precision:.1%} | {len(found)} | "
                  f"{seconds:.0f} s |", flush=True)  # fmt: skip
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
