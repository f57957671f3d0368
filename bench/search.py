"""Search measured: exact against numpy, approximate against exact numpy in the same run, and what adding costs.

    python bench/search.py                              # all three
    python bench/search.py --only ann --vectors 1000000
    python bench/search.py --only adding --model runs/demo --images 20000

Vectors are made on the spot and called synthetic: 24 hidden numbers a vector, drawn around one of 2,000 centres, go
through a fixed random network of two layers to 128 and to unit length, so that they lie on a curved surface with dense
and thin places, as embeddings do. Queries are drawn alike and are not in the index. One query at a time, numpy's on one
thread and the index's in turn; the processor time of all threads is what is compared, since a busy machine spoils the
clock of what hands over between threads.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from plait.inference.model import load
from plait.modalities.text import Text
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig
from plait.search import index as search
from plait.search.adding import checksums
from plait.search.index import Index

WIDTH, HIDDEN, CENTRES = 128, 24, 2000
ROUNDS = 2


def make_model(folder: Path) -> Path:
    """A tiny model with random weights whose space has 128 numbers: an index has to have one."""
    torch.manual_seed(0)
    text = Text.train(["a b c d"] * 20, 260)
    backbone = TransformerConfig(width=32, layers=1, heads=2, kv_heads=2, head_width=16, hidden=64, max_length=64)
    vocabulary = {"text": text.size, "columns": {}, "levels": {}, "closers": []}
    model = Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=WIDTH)).eval()
    checkpoints.save(Checkpoint(model, text), folder)
    return folder


class Source:
    """Vectors that can be drawn again and again from one distribution."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.centres = self.rng.normal(size=(CENTRES, HIDDEN)).astype(np.float32)
        self.first = self.rng.normal(size=(HIDDEN, 256)).astype(np.float32) / HIDDEN**0.5
        self.second = self.rng.normal(size=(256, WIDTH)).astype(np.float32) / 16

    def draw(self, count: int) -> np.ndarray:
        """(count, 128) float32 of unit length."""
        hidden = self.centres[self.rng.integers(CENTRES, size=count)]
        hidden = hidden + 0.4 * self.rng.normal(size=hidden.shape).astype(np.float32)
        vectors = np.tanh(hidden @ self.first) @ self.second
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(index: Index, vectors: np.ndarray) -> None:
    """Vectors as an index keeps them, without a model's work."""
    index._create()
    schema = index.table.schema
    for start in range(0, len(vectors), 100_000):
        part = np.ascontiguousarray(vectors[start : start + 100_000])
        ids = [str(start + i) for i in range(len(part))]
        content = [i.encode().rjust(16) for i in ids]
        made = {
            "id": pa.array(ids), "_content": pa.array(content, pa.binary(16)),
            "_vector": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), WIDTH),
            "_check": pa.array(checksums(ids, content, part)),
        }  # fmt: skip
        index.table.add(pa.Table.from_arrays(
            [made.get(field.name, pa.nulls(len(part), field.type)) for field in schema], schema=schema
        ))  # fmt: skip


def recall(index: Index, vectors: np.ndarray, queries: np.ndarray) -> tuple[float, list[float], list[float]]:
    """(recall@10 against brute force; milliseconds of numpy and of the index a query: of all threads' processor time,
    and of the clock), medians."""
    found, exact, taken = [], [], []
    index.find(queries[0], None, 10)  # what is loaded once

    def now() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()]) * 1e3

    for query in queries:
        begun = now()
        near = vectors @ query
        best = np.argpartition(-near, 9)[:10]
        best = best[np.argsort(-near[best])]
        exact.append(now() - begun)
        begun = now()
        hits = index.find(query, None, 10)
        taken.append(now() - begun)
        found.append(len({hit.id for hit in hits} & {str(i) for i in best}) / 10)
    return float(np.mean(found)), np.median(exact, 0).tolist(), np.median(taken, 0).tolist()


def measure(counts: list[int], queries: int, seed: int, model: Path, folder: Path) -> None:
    for count in counts:
        source = Source(seed)
        vectors, asked = source.draw(count), source.draw(queries)
        index = Index(folder / f"{count}", model)
        begun = time.perf_counter()
        with index._writing():
            fill(index, vectors)
        added = time.perf_counter() - begun
        index.compact()
        built = time.perf_counter() - begun - added
        share, exact, taken = recall(index, vectors, asked)
        kind = "ANN" if count > search.EXACT else "exact"
        print(
            f"{count:>9,} vectors, {kind}: recall@10 {share:.4f}; processor time: numpy {exact[0]:.2f} ms, index "
            f"{taken[0]:.2f} ms ({taken[0] / exact[0]:.2f} of it); by the clock {exact[1]:.2f} and {taken[1]:.2f} ms; "
            f"written in {added:.0f} s, indexed in {built:.0f} s"
        )


def adding(run: str, count: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    files = folder / "images"
    files.mkdir()
    for i in range(count):
        image = Image.new("RGB", (96, 96), tuple(int(v) for v in rng.integers(0, 256, 3)))
        pen = ImageDraw.Draw(image)
        for _ in range(4):
            x, y, w, h = (int(v) for v in rng.integers(4, 60, 4))
            pen.ellipse((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        image.save(files / f"{i:06d}.{'jpg' if i % 2 else 'png'}")
    paths, model = sorted(files.iterdir()), load(run)
    model.embed(paths[:256])
    index = Index(folder / "warm", model)  # what is loaded once
    index.add(paths[:64])

    def now() -> np.ndarray:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return np.array([sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()])

    alone, whole = np.zeros(2), np.zeros(2)
    for part in range(ROUNDS):  # in turn, so that a busy machine is busy for both
        some = paths[part * count // ROUNDS : (part + 1) * count // ROUNDS]
        begun = now()
        for at in range(0, len(some), search.BATCH):
            model.embed(some[at : at + search.BATCH])
        alone += now() - begun
        index = Index(folder / f"index-{part}", model)
        begun = now()
        added = index.add(some)
        whole += now() - begun
        assert added.new == len(some), added.rejected[:3]
    share, (used, clock), (used_whole, clock_whole) = alone / whole, alone / count * 1e3, whole / count * 1e3
    print(
        f"{count:,} images of 96 x 96, {run}: embedding alone {used:.2f} ms of processor time an image, with "
        f"adding {used_whole:.2f} ms ({share[0]:.0%} of that rate); by the clock {clock:.2f} and {clock_whole:.2f} ms "
        f"({share[1]:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["exact", "ann", "adding"])
    parser.add_argument("--vectors", type=int, default=1_000_000, help="of the approximate index")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--model", default="runs/demo", help="a run that reads images, for the cost of adding")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        model = make_model(folder / "model")
        if options.only in (None, "exact"):
            measure([1_000, 10_000, 100_000], options.queries, options.seed, model, folder)
        if options.only in (None, "ann"):
            measure([options.vectors], options.queries, options.seed, model, folder)
        if options.only in (None, "adding"):
            adding(options.model, options.images, folder)


if __name__ == "__main__":
    main()
