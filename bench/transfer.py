"""Data of the transfer studies in docs/how-to/transfer.md, and a modality added to a trained model.

    python bench/transfer.py DATA -o runs/transfer
    plait train runs/transfer/mnist/data -o runs/transfer/images --recipe read.yaml --steps 300
    python bench/transfer.py DATA -o runs/transfer --add runs/transfer/images

Makes, from MNIST and the recorded spoken digits of FSDD, prepared: `mnist` (handwritten digits, English names),
`speaker` (yweweler's recordings, 0 to 14 of each digit the test), `chinese` (all speakers, named in Chinese) and
`spoken` (all speakers, English; 0 to 4 the test). With `--add` a run of images learns `spoken`, half of every batch
being its own old records; and without those, for comparison. With `--captions` a model of text alone (the captions of
half of Flickr8k's photos, without the photos) goes on to caption photos of the other half. Three seeds each.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from plait.core.config import load_recipe
from plait.core.files import read_json
from plait.data.dataset import Dataset, SubsetDataset
from plait.data.prepare import prepare
from plait.inference.model import load
from plait.training.trainer import train
from plait.transfer_learning.report import mean_and_error
from plait.transfer_learning.study import Task

EN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ZH = ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九"]
SPEAKER = "yweweler"


def _idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def write(folder: Path, rows: list[tuple[bytes, str, dict[str, str], str]], kind: str) -> None:
    """Files with a table (bytes, name, texts, split), and the dataset of them beside."""
    if (folder / "data" / "manifest.json").is_file():
        return
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    with (files / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        columns = list(rows[0][2])
        table.writerow([f"{kind}_file_name", *columns, "split"])
        for data, name, texts, split in rows:
            (files / name).write_bytes(data)
            table.writerow([name, *(texts[column] for column in columns), split])
    prepare(files, folder / "data", near_duplicates=False, workers=0)


def mnist(source: Path, folder: Path, train: int = 4000, test: int = 1000) -> None:
    rng, rows = np.random.default_rng(0), []
    for name, count, split in (("train", train, "train"), ("t10k", test, "test")):
        images, labels = (_idx(source / f"{name}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
        for place, i in enumerate(rng.permutation(len(labels))[:count]):
            mine = "val" if split == "train" and place % 10 == 0 else split
            file = folder / "one.png"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(file)
            rows.append((file.read_bytes(), f"{split}-{i}.png", {"label": EN[labels[i]]}, mine))
            file.unlink()
    write(folder, rows, "image")


def adding(source: Path, folder: Path, steps: int, seeds: int, limit: int) -> None:
    """A modality added: old abilities before and after, with replay and without."""
    old = Task.of(Dataset.open(read_json(source / "run.json")["dataset"]), None, None)
    new = Task.of(Dataset.open(folder / "spoken" / "data"), None, None)
    known = read_json(source / "run.json")["recipe"]
    before = old.accuracy(load(source), limit, 0)
    print(f"before: {old.read} to {old.answered} {before:.3f} on {limit} test records", flush=True)
    for replay in (0.5, 0.0):
        rows = []
        for seed in range(seeds):
            training = {
                "steps": steps, "seed": seed, "batch_size": 64, "weights": {**known["training"]["weights"], "audio": 0},
                "validations": 4, "replay": {str(old.dataset.path): replay} if replay else {}, "learning_rate": 1e-3,
            }  # fmt: skip
            model = {"size": known["model"]["size"], "image": known["model"]["image"], "init_from": str(source)}
            run = folder / f"added-{replay}-{seed}"
            train(new.dataset, run, load_recipe(None, {"model": model, "training": training}), lambda progress: None)
            made = load(run)
            rows.append((old.accuracy(made, limit, 0), new.accuracy(made, limit, 0)))
            print(f"replay {replay}, seed {seed}: old {rows[-1][0]:.3f}, new {rows[-1][1]:.3f}", flush=True)
        for name, values, least in zip(("old", "new"), np.array(rows).T, (before, 0.1), strict=True):
            mean, error = mean_and_error(values.tolist())
            print(f"replay {replay}: {name} {mean:.3f} ± {error:.3f} (before {least:.3f})", flush=True)


# --- a model of text alone learns to caption --------------------------------------------------------------------

WAYS = {"scratch": {}, "frozen": {"freeze": ["backbone"]}, "lora": {"lora": {}}, "full": {}}
MODEL = {"size": "tiny", "text": {"vocabulary": 1024}, "backbone": {"context": 128}}


def photos(source: Path, folder: Path) -> None:
    """`folder/words`: the five captions of every second training photo; `folder/photos`: the others, of 32 pixels, each
    with its first caption. Validation and test are as published, cut to 200 and 500."""
    if (folder / "photos" / "data" / "manifest.json").is_file():
        return
    with gzip.open(source / "captions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    (folder / "words").mkdir(parents=True, exist_ok=True)
    said, shown = [], []
    left = {"train": 10_000, "val": 200, "test": 500}
    with zipfile.ZipFile(source / "images_128.zip") as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        for place, row in enumerate(rows):
            if row["split"] == "train" and place % 2:
                said += [{"text": text, "split": "val" if place % 20 == 1 else "train"} for text in row["en"]]
            elif left[row["split"]]:
                left[row["split"]] -= 1
                small = io.BytesIO()
                Image.open(archive.open(names[row["file"]])).convert("RGB").resize((32, 32)).save(small, "png")
                name = Path(row["file"]).with_suffix(".png").name
                shown.append((small.getvalue(), name, {"caption": row["en"][0]}, row["split"]))
    lines = [json.dumps(row) + "\n" for row in said]
    (folder / "words" / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare(folder / "words" / "captions.jsonl", folder / "words" / "data", near_duplicates=False, workers=0)
    write(folder / "photos", shown, "image")


def nats(run: Path, dataset: Dataset, count: int) -> tuple[float, float]:
    """Nats a character of the first test captions, with their photos and with their neighbours' photos."""
    model = load(run)
    parts = [record.parts for record in dataset.iterate(dataset.indices("test")[:count])]
    found = []
    for shift in (0, 1):
        total = 0.0
        for place, part in enumerate(parts):
            photo = parts[(place + shift) % len(parts)]["image"]
            total -= model.score([model.context([("image", photo)])], "caption", [part["caption"]])[0, 0]
        found.append(total / sum(len(part["caption"]) for part in parts))
    return found[0], found[1]


def captions(source: Path, out: Path, ways: list[str], steps: int, seeds: int, limit: int) -> None:
    photos(source, out)
    text, dataset = out / "text", Dataset.open(out / "photos" / "data")
    if not (text / "run.json").is_file() or "finished" not in read_json(text / "run.json"):
        training = {"steps": 300, "batch_size": 16, "validations": 4}
        recipe = load_recipe(None, {"model": MODEL, "training": training})
        train(Dataset.open(out / "words" / "data"), text, recipe, lambda progress: None)
    pairs = dataset.indices("train")
    for count in (100, len(pairs)):
        for way in ways:
            rows = []
            for seed in range(seeds):
                chosen = np.sort(np.random.default_rng(seed).permutation(pairs)[:count])
                weights = {"image": 0, "contrastive": 0}
                training = {"steps": steps, "seed": seed, "batch_size": 32, "weights": weights, "validations": 4}
                begun = {} if way == "scratch" else {"init_from": str(text)}
                recipe = load_recipe(None, {"model": {**MODEL, **begun}, "training": {**training, **WAYS[way]}})
                run = out / f"{way}-{count}-{seed}"
                train(SubsetDataset(dataset, {"train": chosen}), run, recipe, lambda progress: None)
                rows.append(nats(run, dataset, limit))
            (own, error), (other, _) = (mean_and_error(list(values)) for values in zip(*rows, strict=True))
            print(f"{count} photos, {way}: {own:.3f} ± {error:.3f} nats a character; with another photo {other:.3f}",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with mnist/ and fsdd/")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--add", type=Path, help="a run of images that learns audio clips")
    parser.add_argument("--steps", type=int, default=200, help="of --add and --captions")
    parser.add_argument("--seeds", type=int, default=3, help="of both")
    parser.add_argument("--limit", type=int, default=1000, help="test records of --add and --captions")
    parser.add_argument("--captions", action="store_true", help="only a text model that learns to caption")
    parser.add_argument("--ways", default="scratch,frozen,full", help="of --captions; also lora")
    options = parser.parse_args()
    if options.captions:
        ways, place = options.ways.split(","), options.source / "flickr8k"
        captions(place, options.out / "captions", ways, options.steps, options.seeds, options.limit)
        return
    mnist(options.source / "mnist", options.out / "mnist")
    speaker, chinese, spoken = [], [], []
    with zipfile.ZipFile(options.source / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        for name in sorted(archive.namelist()):
            found = re.fullmatch(r"(?:.*/)?(\d)_([a-z]+)_(\d+)\.wav", name)
            if not found:
                continue
            digit, who, number = int(found[1]), found[2], int(found[3])
            data, file = archive.read(name), Path(name).name
            split = "test" if number < 5 else "val" if number < 8 else "train"
            chinese.append((data, file, {"zh": ZH[digit]}, split))
            spoken.append((data, file, {"en": EN[digit]}, split))
            if who == SPEAKER:
                alone = "test" if number < 15 else "val" if number < 18 else "train"
                speaker.append((data, file, {"en": EN[digit]}, alone))
    write(options.out / "speaker", speaker, "audio")
    write(options.out / "chinese", chinese, "audio")
    write(options.out / "spoken", spoken, "audio")
    if options.add:
        adding(options.add, options.out, options.steps, options.seeds, options.limit)


if __name__ == "__main__":
    main()
