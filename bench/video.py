"""Ten kinds of short clips, shapes that move and tones: how many are classified rightly, and whether a search by words
finds the moment in longer ones.

    python bench/video.py                      # 600 clips of 2 s, 40 longer ones of 5 moments
    python bench/video.py --clips 200 --minutes 2

Six kinds differ in what is seen (a shape and where it goes), four in what is heard; the rest is drawn
at random. The commands are those of `plait`: prepare, train, evaluate, index add, search.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

import plait

SIZE, FPS, RATE, SECONDS = 96, 12, 16_000, 2.0
SHAPES = ("circle", "square", "triangle")
WAYS = {"right": (1, 0), "down": (0, 1)}
TONES = ("high tone", "low tone", "rising tone", "pulsing tone")
SEEN = tuple(f"{shape} going {way}" for shape in SHAPES for way in WAYS)
KINDS = (*SEEN, *TONES)


def frames(kind: str, rng: np.random.Generator, seconds: float) -> list[np.ndarray]:
    """The frames of a kind, (SIZE, SIZE, 3) each."""
    shape = kind.split()[0] if kind in SEEN else "cross"
    way = np.array(WAYS[kind.split()[-1]] if kind in SEEN else rng.normal(0, 0.5, 2))
    ground, colour = rng.integers(0, 120, 3), tuple(int(v) for v in rng.integers(130, 256, 3))
    radius, start = rng.uniform(0.12, 0.2) * SIZE, rng.uniform(0.25, 0.75, 2) * SIZE
    start = np.where(np.abs(way) > 0.9, 0.1 * SIZE, start)
    noise = rng.normal(0, 8, (SIZE, SIZE, 3))
    found = []
    for n in range(round(seconds * FPS)):
        image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        x, y = start + way * 0.8 * SIZE * (n / FPS % SECONDS) / SECONDS
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        elif shape == "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
        else:
            pen.line((box[0], y, box[2], y), fill=colour, width=8)
            pen.line((x, box[1], x, box[3]), fill=colour, width=8)
        found.append(np.asarray(image))
    return found


def sound(kind: str, rng: np.random.Generator, seconds: float) -> np.ndarray:
    """The sound of a kind, float32."""
    at = np.arange(round(seconds * RATE)) / RATE
    noise = rng.normal(0, 0.01, len(at))
    if kind in SEEN:
        return (noise * rng.uniform(0.5, 8)).astype(np.float32)
    pitch = {"high tone": rng.uniform(1800, 2600), "low tone": rng.uniform(150, 260)}.get(kind, rng.uniform(500, 800))
    hertz = pitch * (1 + (at % SECONDS) / SECONDS * 1.5) if kind == "rising tone" else np.full(len(at), pitch)
    wave = np.sin(2 * np.pi * np.cumsum(hertz) / RATE) * rng.uniform(0.2, 0.6)
    wave *= (np.sin(2 * np.pi * 4 * at) > 0) if kind == "pulsing tone" else 1
    return (wave + noise).astype(np.float32)


def write(path: Path, images: list[np.ndarray], wave: np.ndarray) -> None:
    """An MP4 of H.264 and AAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=FPS), out.add_stream("aac", rate=RATE)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        for image in images:
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode())
        block = av.AudioFrame.from_ndarray((wave[None] * 32767).astype(np.int16), format="s16", layout="mono")
        block.sample_rate = RATE
        out.mux(audio.encode(block))
        out.mux(audio.encode())


def make(folder: Path, clips: int, longer: int) -> dict[str, list[str]]:
    """Clips in a folder a kind; longer ones of five moments each, whose kinds are returned by name."""
    rng = np.random.default_rng(0)
    for n in range(clips):
        kind = KINDS[n % len(KINDS)]
        write(folder / "clips" / kind / f"{n:04d}.mp4", frames(kind, rng, SECONDS), sound(kind, rng, SECONDS))
    told = {}
    for n in range(longer):
        kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[:5]]
        images = [image for kind in kinds for image in frames(kind, rng, SECONDS)]
        write(folder / "longer" / f"{n:03d}.mp4", images, np.concatenate([sound(k, rng, SECONDS) for k in kinds]))
        told[f"{n:03d}.mp4"] = kinds
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--longer", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plait-video-"))
    try:
        told = make(folder, options.clips, options.longer)
        dataset = plait.prepare(folder / "clips", folder / "data")
        print(dataset, flush=True)
        run = plait.train(dataset, folder / "run", minutes=options.minutes)
        figures = plait.evaluate(run)
        for name in ("accuracy", "zero_shot_accuracy"):
            print(f"{name}: {json.dumps(figures[f'recognition/video-label/{name}'])}", flush=True)
        index = plait.Index(folder / "index", folder / "run")
        index.add([folder / "longer"])
        near = right = asked = 0
        for name, kinds in told.items():
            for place, kind in enumerate(kinds):
                hit = index.search(kind, 1, f"source LIKE '%{name}'", "vector")[0]
                start = hit.start or 0.0
                asked += 1
                near += abs(start - SECONDS * place) <= 1.0
                right += kinds[min(int((start + (hit.stop or start)) / 2 // SECONDS), 4)] == kind
        print(f"moments by words: {near / asked:.1%} within 1 s, {right / asked:.1%} inside, of {asked}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
