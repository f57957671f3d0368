"""A language model that is given an encoder of images and learns to caption, beside a model from scratch: which photo a
caption of test is of, by what the first writes about each photo, and by the second's embeddings.

    python bench/captioner.py train MODEL ENCODER --data DATA -o runs/captioner [--minutes 10 | --steps N]
    python bench/captioner.py scratch --data DATA -o runs/scratch [--photos 2000] [--minutes 10]
    python bench/captioner.py written runs/captioner [--limit 300]     # R@10 by its captions, BM25 of the words
        [--captions 5] [--encoder MINILM]        # so many of each photo, all but one drawn; also by their embeddings
    python bench/captioner.py found runs/scratch [--limit 300]         # R@10 by its embeddings

DATA holds flickr8k/captions.jsonl.gz and images_128.zip. MODEL and ENCODER are folders of transformers'.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import resource
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import plait  # isort: skip (before torch, which PLAIT_ISA may cap)

import numpy as np

from plait.data.dataset import Dataset


def write_data(data: Path, folder: Path, photos: int) -> None:
    """The first `photos` of train, a tenth of them for validation, and the test photos, with English captions."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / "flickr8k" / "images_128.zip", folder / "images_128.zip")
    counts: Counter[str] = Counter()
    lines = []
    with gzip.open(data / "flickr8k" / "captions.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            counts[row["split"]] += 1
            if row["split"] not in ("train", "test") or (row["split"] == "train" and counts["train"] > photos):
                continue
            split = "val" if row["split"] == "train" and counts["train"] % 10 == 0 else row["split"]
            lines.append(json.dumps({"file": row["file"], "split": split, "en": row["en"]}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def train(arguments: argparse.Namespace) -> None:
    image: dict[str, Any] = {"encoder": f"hf:{arguments.encoder}", "grid": 2}
    recipe: dict[str, Any] = {
        "data": {"map": {"image": "file", "each": "en"}},
        "model": {"init_from": str(arguments.model), "image": image},
        "training": {"lora": {}, "batch_size": 16, "learning_rate": 3e-4, "weights": {"image": 0, "contrastive": 0}},
    }
    _train(arguments, recipe)


def scratch(arguments: argparse.Namespace) -> None:
    recipe: dict[str, Any] = {
        "data": {"map": {"image": "file", "each": "en"}},
        "model": {"size": "tiny", "text": {"vocabulary": 4096}, "image": {"size": 64, "grid": 4, "flip": True}},
        "training": {
            "batch_size": 128, "learning_rate": 1e-3, "validations": 1,
            "weights": {"image": 0, "text": 0.2, "contrastive": 1},
        },
    }  # fmt: skip
    _train(arguments, recipe)


def _train(arguments: argparse.Namespace, recipe: dict[str, Any]) -> None:
    source = arguments.out.parent / f"{arguments.out.name}-data"
    write_data(arguments.data, source, arguments.photos)
    budget = {"steps": arguments.steps} if arguments.steps else {"minutes": arguments.minutes}
    begun = time.process_time()
    plait.train(source, arguments.out, recipe=recipe, seed=arguments.seed, tell=print, progress=True, **budget)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{time.process_time() - begun:.0f} s of processor time, {peak:.2f} GB at most")


def photos_of(run: Path, limit: int) -> tuple[list[bytes], list[tuple[int, str]]]:
    """Test photos, and their captions with the number of each one's photo."""
    dataset = Dataset.open(run / "data")
    column = next(name for name, kind in dataset.columns.items() if kind == "text")
    numbers: dict[bytes, int] = {}
    said = []
    for record in dataset.iterate(dataset.indices("test").tolist()):
        photo = bytes(record.parts["image"])
        if photo not in numbers and len(numbers) == limit:
            break
        said.append((numbers.setdefault(photo, len(numbers)), str(record.parts[column])))
    return list(numbers), said


def _tell(scores: np.ndarray, said: list[tuple[int, str]]) -> None:
    """R@10 of scores (captions, photos); ties count against."""
    owner = np.array([number for number, _ in said])
    own = scores[np.arange(len(said)), owner]
    rank = (scores >= own[:, None]).sum(1)
    count = scores.shape[1]
    asked = f"{len(said)} captions, {count} photos; chance {10 / count:.3f}"
    print(f"caption -> photo R@10 {(rank <= 10).mean():.3f} ({asked})")


def written(arguments: argparse.Namespace) -> None:
    model = plait.load(str(arguments.run), "cpu")
    photos, said = photos_of(arguments.run, arguments.limit)
    begun = time.process_time()
    captions = [[model.describe(photo)] for photo in photos]
    print(f"{(time.process_time() - begun) / len(photos):.2f} s of processor time a caption")
    print("the first:", *(one[0] for one in captions[:3]), sep="\n  ")
    _tell_captions(captions, said, arguments.encoder)
    if arguments.captions > 1:
        column = model.column(None, "text", "describe")
        more = arguments.captions - 1
        for photo, own in zip(photos, captions, strict=True):
            own += model.write([model.context([photo])], column, n=more)[0]
        print(f"{arguments.captions} captions of each photo, {more} of them drawn:")
        _tell_captions(captions, said, arguments.encoder)


def _tell_captions(captions: list[list[str]], said: list[tuple[int, str]], encoder: Path | None) -> None:
    """R@10 by the words of all captions of a photo, and by the nearest direction of an encoder's mean embedding."""
    queries = [text for _, text in said]
    print("by words (BM25):", end=" ")
    _tell(bm25(queries, [" ".join(own) for own in captions]), said)
    if encoder is not None:
        texts = plait.load(str(encoder), "cpu")
        photos = np.stack([np.asarray(texts.embed(own)).mean(0) for own in captions])
        photos /= np.linalg.norm(photos, axis=1, keepdims=True)
        print("by embeddings:", end=" ")
        _tell(np.asarray(texts.embed(queries)) @ photos.T, said)


def found(arguments: argparse.Namespace) -> None:
    model = plait.load(str(arguments.run), "cpu")
    photos, said = photos_of(arguments.run, arguments.limit)
    _tell(np.asarray(model.embed([text for _, text in said])) @ np.asarray(model.embed(photos)).T, said)


def bm25(queries: list[str], documents: list[str], k: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Scores (queries, documents) of words (Robertson and Zaragoza, 2009)."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = np.array([sum(one.values()) for one in words], float)
    scores = np.zeros((len(queries), len(documents)))
    for row, query in enumerate(queries):
        for word in re.findall(r"\w+", query.lower()):
            counts = np.array([one[word] for one in words], float)
            held = (counts > 0).sum()
            weight = math.log(1 + (len(documents) - held + 0.5) / (held + 0.5))
            scores[row] += weight * counts * (k + 1) / (counts + k * (1 - b + b * lengths / max(lengths.mean(), 1)))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("train", train), ("scratch", scratch)):
        one = commands.add_parser(name)
        if name == "train":
            one.add_argument("model", type=Path)
            one.add_argument("encoder", type=Path)
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("-o", "--out", type=Path, required=True)
        one.add_argument("--photos", type=int, default=2000)
        one.add_argument("--minutes", type=float, default=10.0)
        one.add_argument("--steps", type=int)
        one.add_argument("--seed", type=int, default=0)
        one.set_defaults(work=work)
    for name, work in (("written", written), ("found", found)):
        one = commands.add_parser(name)
        one.add_argument("run", type=Path)
        one.add_argument("--limit", type=int, default=300, help="photos of test")
        if name == "written":
            one.add_argument("--captions", type=int, default=1, help="of each photo")
            one.add_argument("--encoder", type=Path, help="a model of texts to compare captions by")
        one.set_defaults(work=work)
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
