"""Explanations held against causes that are known, random maps, and models that have learnt nothing.

    python bench/explain.py planted -o runs/explain
    python bench/explain.py areas runs/fashion runs/spoken_digits/official
    python bench/explain.py words -o runs/explain

`planted` makes three data sets in which one thing alone decides the class (a mark in images of noise, a tone in
noise, a word among others), trains on each, and counts in how many of 200 test cases the strongest region or word is
it. `areas` takes 200 test records of a run: deletion and insertion areas beside those of 3 random maps each, the
completeness gap, and the rank correlation with maps of the same network with shuffled weights. `words` trains on
images of two objects and looks which part of a drawn image depends on which word of the prompt.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr

from plait.core.config import load_recipe
from plait.core.files import read_json
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.explain.methods import adding_up, occlusion
from plait.explain.methods import areas as area
from plait.explain.parts import Part, Question, Words
from plait.explain.plait_models import question
from plait.inference.model import PlaitModel, load
from plait.modalities.audio_files import encode_wav
from plait.training.trainer import train

METHODS = ("occlusion", "integrated-gradients")
CLASSES = ["one", "two", "three", "four"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 150, 50), "black": (20, 20, 20)}
MARKS = list(COLOURS.values())
TONES = [500, 1000, 1800, 2900]  # Hz
TONE = 0.4  # seconds
KEYS = ["apple", "stone", "river", "cloud"]
FILL = ["the", "a", "old", "new", "big", "man", "dog", "walks", "runs", "sees", "near", "far", "house", "road", "then"]


def trained(folder: Path, write: Callable[[Path], None], settings: dict, steps: int) -> PlaitModel:
    """The model of a data set that `write` makes, trained once."""
    run = folder / "run"
    if "finished" not in (read_json(run / "run.json") if (run / "run.json").is_file() else {}):
        if not (folder / "data" / "manifest.json").is_file():
            write(folder / "files")
            prepare(folder / "files", folder / "data", near_duplicates=False, workers=0)
        recipe = load_recipe(None, {**settings, "training": {**settings.get("training", {}), "steps": steps}})
        train(Dataset.open(folder / "data"), run, recipe, lambda progress: None)
    return load(run)


def table(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def name_of(part: str | bytes) -> str:
    return hashlib.sha256(part.encode() if isinstance(part, str) else part).hexdigest()


# --- causes that are known --------------------------------------------------------------------------------------


def marks(folder: Path, n: int = 1400, test: int = 200) -> None:
    """Images of noise with one square of 4 pixels, whose colour is the class."""
    folder.mkdir(parents=True)
    rng, rows, where = np.random.default_rng(0), [], {}
    for i in range(n):
        pixels = rng.integers(90, 166, (28, 28, 3)).astype(np.uint8)
        x, y = (int(v) for v in rng.integers(1, 24, 2))
        pixels[y : y + 4, x : x + 4] = MARKS[i % 4]
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
        split = "test" if i >= n - test else "val" if i >= n - 2 * test else "train"
        rows.append({"file_name": f"{i:04}.png", "label": CLASSES[i % 4], "split": split})
        where[name_of((folder / f"{i:04}.png").read_bytes())] = f"{x} {y}"
    (folder.parent / "where.json").write_text(json.dumps(where))
    table(folder, rows)


def tones(folder: Path, n: int = 2500, test: int = 250) -> None:
    """A second of noise with a tone somewhere in it, whose height is the class. A fifth have none, and say so: else a
    model names the tone that it never learnt where it hears none of the others."""
    folder.mkdir(parents=True)
    rng, rows, where = np.random.default_rng(1), [], {}
    for i in range(n):
        wave = rng.normal(0, 0.02, 8000)
        length = int(TONE * 8000)
        start = int(rng.integers(0, 8000 - length))
        seconds = np.arange(length) / 8000
        height = TONES[i % 5] * rng.uniform(0.98, 1.02) if i % 5 < 4 else 0.0
        wave[start : start + length] += 0.3 * np.sin(2 * np.pi * height * seconds)
        (folder / f"{i:04}.wav").write_bytes(encode_wav(wave.astype(np.float32), 8000))
        split = "test" if i >= n - test else "val" if i >= n - 2 * test else "train"
        rows.append({"file_name": f"{i:04}.wav", "label": [*CLASSES, "none"][i % 5], "split": split})
        if i % 5 < 4:
            where[name_of((folder / f"{i:04}.wav").read_bytes())] = f"{start / 8000} {TONES[i % 5]}"
    (folder.parent / "where.json").write_text(json.dumps(where))
    table(folder, rows)


def sentences(folder: Path, n: int = 3000, test: int = 200) -> None:
    """Sentences of eight words, one of which says the class."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(2), []
    for i in range(n):
        words = rng.choice(FILL, 8).tolist()
        words[int(rng.integers(8))] = KEYS[i % 4]
        split = "test" if i >= n - test else "val" if i >= n - 2 * test else "train"
        rows.append({"text": " ".join(words), "label": CLASSES[i % 4], "split": split})
    table(folder, rows)


def hit(part: Part, weights: np.ndarray, where: str) -> bool:
    """Whether the strongest unit is the cause."""
    best = int(weights.argmax())
    if isinstance(part, Words):
        return part.spot(best) in KEYS
    places = part.cells == best
    if part.name == "image":
        x, y = map(int, where.split())
        return bool(places[y : y + 4, x : x + 4].any())
    start, hertz = map(float, where.split())
    frames = np.flatnonzero(places.any(1)) / 100
    numbers = part.spot(best).replace(",", "").split()
    low, high = float(numbers[4]), float(numbers[6])
    bank = 2595 * np.log10(1 + np.array([low, high, hertz]) / 700)  # a filter reaches into the next band
    width = (bank[1] - bank[0]) / 8
    inside = bank[0] - width <= bank[2] <= bank[1] + width
    return inside and bool(((frames >= start - 0.035) & (frames <= start + TONE + 0.035)).any())  # the window is .032 s


def planted(out: Path, cases: int, only: list[str]) -> None:
    common = {"model": {"size": "tiny"}, "training": {"batch_size": 32, "learning_rate": 2e-3}}
    image = {**common, "training": {**common["training"], "weights": {"image": 0}}}
    audio = {**common, "training": {**common["training"], "weights": {"audio": 0, "contrastive": 1}}}
    for name, write, settings, steps in (
        ("marks", marks, image, 300), ("tones", tones, audio, 600), ("sentences", sentences, common, 500),
    ):  # fmt: skip
        if only and name not in only:
            continue
        model = trained(out / name, write, settings, steps)
        dataset = Dataset.open(out / name / "data")
        file = out / name / "where.json"
        where = json.loads(file.read_text()) if file.is_file() else {}
        column = next(column for column in model.columns if column != "label")
        records = list(dataset.iterate(dataset.indices("test")))
        records = [r for r in records if not where or name_of(r.parts[column]) in where][:cases]
        right = sum(model.classify(record.parts[column])[0][0] == record.parts["label"] for record in records)
        print(f"{name}: accuracy on {len(records)} test records {right / len(records):.3f}")
        for method in METHODS:
            hits, gaps, steps = [], [], []
            for record in records:
                asked = question(model, record.parts[column], record.parts["label"])
                weights = weigh(asked, method, gaps, steps)
                hits.append(hit(asked.parts[0], weights[0], where.get(name_of(record.parts[column]), "")))
            print(
                f"{name}, {method}: the strongest unit is the cause in {np.mean(hits):.1%} of {len(hits)}", flush=True
            )
            if gaps:
                tell_gaps(gaps, steps)


def weigh(asked: Question, method: str, gaps: list[float], steps: list[int]) -> list[np.ndarray]:
    if method == "occlusion":
        return occlusion(asked)
    weights, gap, taken = adding_up(asked)
    gaps.append(gap)
    steps.append(taken)
    return weights


def tell_gaps(gaps: list[float], steps: list[int]) -> None:
    within, first = np.mean(np.array(gaps) <= 0.05), np.mean(np.array(steps) == 64)
    print(f"  completeness gap: median {np.median(gaps):.2%}, {within:.1%} within 5 %", flush=True)
    print(f"  64 steps were enough in {first:.1%}; at most {max(steps)} were taken", flush=True)


# --- random maps, shuffled weights ------------------------------------------------------------------------------


def shuffled(model: PlaitModel, seed: int = 0) -> PlaitModel:
    """The same network with the numbers of each tensor in a random order (Adebayo et al., 2018)."""
    checkpoint = copy.copy(model.checkpoint)
    checkpoint.model = copy.deepcopy(model.checkpoint.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return PlaitModel(checkpoint, "cpu")


def areas(runs: list[Path], cases: int, randoms: int = 3) -> None:
    for run in runs:
        model = load(run)
        dataset = Dataset.open(read_json(run / "run.json")["dataset"])
        order = np.sort(np.random.default_rng(0).permutation(dataset.indices("test"))[:cases])
        media = [column for column, kind in model.columns.items() if kind != "text"]
        label = next(column for column in model.labels if model.labels[column])
        records = [r for r in dataset.iterate(order) if any(c in r.parts for c in media) and label in r.parts]
        blind = shuffled(model)
        for method in METHODS:
            worth: dict[str, list[float]] = {"deletion": [], "insertion": []}
            gaps, steps, ranks = [], [], []
            for i, record in enumerate(records):
                column = next(c for c in media if c in record.parts)
                value = (column, record.parts[column])
                asked = question(model, value, model.classify(value)[0][0], column=label)
                weights = weigh(asked, method, gaps, steps)
                found = area(asked, weights, seed=i, randoms=randoms)
                worth["deletion"].append(float(np.mean(found.random_deletion)) - found.deletion)
                worth["insertion"].append(found.insertion - float(np.mean(found.random_insertion)))
                if i < 50:
                    other = weigh(question(blind, value, asked.answer, column=label), method, [], [])
                    ranks.append(spearmanr(weights[0], other[0]).statistic)
            print(f"{run.name}, {method}, {len(records)} test records:")
            for name, gain in worth.items():
                error = np.std(gain, ddof=1) / np.sqrt(len(gain))
                print(f"  {name} area better than random maps by {np.mean(gain):.4f} ± {error:.4f}"
                      f" ({np.mean(gain) / error:.1f} standard errors)")  # fmt: skip
            error = np.std(ranks, ddof=1) / np.sqrt(len(ranks))
            print(f"  rank correlation with shuffled weights {np.mean(ranks):+.3f} ± {error:.3f}, {len(ranks)} records")
            if gaps:
                tell_gaps(gaps, steps)


# --- which word drew what ---------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle")


def objects(folder: Path, n: int = 20000, test: int = 200) -> None:
    """Images of two objects, and sentences that name them: "red circle left, blue square right". In train every sixth
    colour and shape goes unsaid, so that the likelihood with a word left out means something."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(3), []
    kinds = list(itertools.product(COLOURS, SHAPES))
    for i in range(n):
        image = Image.new("RGB", (32, 32), "white")
        pen, said = ImageDraw.Draw(image), []
        for side, left in (("left", 1), ("right", 17)):
            colour, shape = kinds[int(rng.integers(len(kinds)))]
            x, y = left + int(rng.integers(0, 4)), int(rng.integers(2, 19))
            box = (x, y, x + 10, y + 10)
            if shape == "circle":
                pen.ellipse(box, fill=COLOURS[colour])
            elif shape == "square":
                pen.rectangle(box, fill=COLOURS[colour])
            else:
                pen.polygon([(x + 5, y), (x, y + 10), (x + 10, y + 10)], fill=COLOURS[colour])
            split = "test" if i >= n - test else "val" if i >= n - 2 * test else "train"
            kept = [word for word in (colour, shape) if split != "train" or rng.random() > 1 / 6]
            said.append(" ".join([*kept, side]))
        image.save(folder / f"{i:04}.png")
        rows.append({"file_name": f"{i:04}.png", "caption": ", ".join(said), "split": split})
    table(folder, rows)


def which_word(out: Path, cases: int, steps: int) -> None:
    settings = {
        "model": {"size": "tiny", "image": {"rotate": 0, "scale": 0, "shift": 0, "codec_width": 48, "codec_blocks": 0}},
        "training": {
            "batch_size": 32,
            "learning_rate": 2e-3,
            "augment_targets": False,
            "codec_steps": 1200,
            "validations": 8,
            "weights": {"caption": 0, "contrastive": 0},  # drawn alone
        },
    }
    model = trained(out / "objects", objects, settings, steps)
    dataset = Dataset.open(out / "objects" / "data")
    rows: dict[str, list[bool]] = {"colour": [], "shape": []}
    shares, right = [], []
    for i, record in enumerate(dataset.iterate(dataset.indices("test")[-cases:], ["caption"])):
        words = record.parts["caption"].replace(",", "").split()
        found = model.explain(record.parts["caption"], to="image", seed=i)
        drawn = found.written.sample
        ink = (255 - drawn.astype(int)).max(-1) > 60
        for place, name in ((0, "colour"), (1, "shape"), (3, "colour"), (4, "shape")):
            half = np.zeros_like(ink)
            half[:, :16] = place < 3
            half[:, 16:] = place >= 3
            there = ink & half
            if not there.any():
                continue
            lost = found.regions[place].reshape(found.region_grid)
            cells = there.reshape(lost.shape[0], 4, lost.shape[1], 4).any((1, 3))
            best = np.unravel_index(lost.argmax(), lost.shape)
            rows[name].append(bool(cells[best]))
            positive = lost.clip(min=0)
            shares.append(positive[cells].sum() / max(positive.sum(), 1e-9))
            if name == "colour":
                mean = np.median(drawn[there].astype(float), 0)
                nearest = [float(np.abs(mean - colour).sum()) for colour in COLOURS.values()]
                right.append(list(COLOURS)[int(np.argmin(nearest))] == words[place])
    for name, hits in {**rows, "all": rows["colour"] + rows["shape"]}.items():
        share, error = np.mean(hits), np.std(hits) / np.sqrt(len(hits))
        print(
            f"{name} words: what depends most on a word lies on its object in {share:.1%} ± {error:.1%} of {len(hits)}"
        )
    print(f"share of a word's whole loss on its object: {np.mean(shares):.3f}")
    print(f"objects drawn in the colour asked for: {np.mean(right):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "areas", "words"))
    parser.add_argument("runs", type=Path, nargs="*", help="of areas")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/explain"))
    parser.add_argument("--only", nargs="*", help="of planted: marks, tones, sentences")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="of words' training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "planted":
        planted(options.out, options.cases, options.only or [])
    elif options.what == "areas":
        areas(options.runs, options.cases)
    else:
        which_word(options.out, min(options.cases, 100), options.steps)


if __name__ == "__main__":
    main()
