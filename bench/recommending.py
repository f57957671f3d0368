"""Recommending on known data, through the commands: python bench/recommending.py TASK DATA -o FOLDER [--seed N].

Tasks: ml1m (the SASRec version of MovieLens 1M, leave one out; users marked withheld_last are learnt from and not
asked for), cold (the same with a tenth of the films kept out of training), beauty and toys (Amazon reviews, ids alone),
ml100k and ml100k-time, semantic (ml100k-time with semantic codes), products (emoji, and buyers who do not exist:
bench/make_buyers.py; their images are seen with --encoder RUN, a run of the recipe emoji), large (300,000
products and buyers who do not exist, with semantic codes). DATA is the folder that holds movielens/, amazon/ and
emoji/. `speed` measures training on ML-1M beside this machine's bf16 products in the same process; `adding` the time of
1,000 new items, one recommendation, and keeping them; both want the FOLDER of a task that was run, `speed` that of
ml1m.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.recipes import find_recipe

HERE = Path(__file__).parent.parent
FILMS = """
data:
  items:
    interactions: interactions.txt.gz
    items: items.jsonl
    columns: {id: sas_item}
    untested: users.tsv:withheld_last
    cold: %s
model:
  backbone: {width: 64, layers: 2, heads: 2, context: 200, dropout: 0.2}
  item: {words: 512, drop: %g}
training: {steps: %d, batch_size: 64, learning_rate: 2.0e-3, validations: 4, seed: %d}
"""
GOODS = """
data:
  items: {interactions: interactions.txt}
model:
  backbone: {width: 64, layers: 2, heads: 2, context: 50, dropout: 0.5}
training: {steps: 8000, batch_size: 128, learning_rate: 2.0e-3, validations: 10, seed: %d}
"""


def films(data: Path, folder: Path, seed: int, cold: float) -> None:
    source = data / "movielens"
    for name, to in (
        ("ml-1m_sasrec_minus500.txt.gz", "interactions.txt.gz"),
        ("ml-1m_items.jsonl", "items.jsonl"),
        ("ml-1m_users.tsv", "users.tsv"),
    ):
        shutil.copy(source / name, folder / "source" / to)
    (folder / "recipe.yaml").write_text(FILMS % (cold, 0.3 if cold else 0.1, 700 if cold else 1600, seed))


def goods(data: Path, folder: Path, seed: int, name: str) -> None:
    with zipfile.ZipFile(data / "amazon" / "s3rec_beauty_sports_toys.zip") as file:
        (folder / "source" / "interactions.txt").write_bytes(file.read(name))
    (folder / "recipe.yaml").write_text(GOODS % seed)


def hundred(data: Path, folder: Path, seed: int, split: str) -> None:
    shutil.copy(data / "movielens" / "ml-100k.zip", folder / "source")
    recipe = find_recipe("movielens").read_text(encoding="utf-8")
    recipe = recipe.replace("items: {}", f"items: {{split: {split}}}")
    (folder / "recipe.yaml").write_text(recipe.replace("training:\n", f"training:\n  seed: {seed}\n"))


def shop(data: Path, folder: Path, seed: int, encoder: str = "") -> None:
    make = [sys.executable, HERE / "bench" / "make_buyers.py", data / "emoji", "-o", folder / "source"]
    subprocess.run([*map(str, make), "--seed", str(seed)], check=True)
    recipe = find_recipe("products").read_text(encoding="utf-8")
    if encoder:
        recipe = recipe.replace("  item: {drop: 0.85}", f"  item: {{drop: 0.85, encoder: {encoder}}}")
    (folder / "recipe.yaml").write_text(recipe.replace("training:\n", f"training:\n  seed: {seed}\n"))


def semantic(data: Path, folder: Path, seed: int) -> None:
    hundred(data, folder, seed, "time")
    recipe = (folder / "recipe.yaml").read_text()
    recipe = recipe.replace("item: {words: 512}", "item: {words: 512, codes: semantic}")
    (folder / "recipe.yaml").write_text(recipe.replace("steps: 2000", "steps: 400\n  validations: 4"))


LARGE = """
data:
  items: {interactions: interactions.csv, items: items.csv}
model:
  backbone: {width: 64, layers: 2, heads: 2, context: 64, dropout: 0.1}
  item: {words: 512}
training: {steps: 800, batch_size: 128, learning_rate: 2.0e-3, validations: 2, seed: %d}
"""


def large(data: Path, folder: Path, seed: int, items: int = 300_000, users: int = 60_000) -> None:
    """Products of a brand, a colour, a thing and a style. A buyer is true to a brand and a style, and goes from thing
    to thing in an order that all buyers share; most products are bought once or twice."""
    rng = np.random.default_rng(seed)
    parts = {"brand": 120, "colour": 20, "thing": 60, "style": 24}
    values = {name: rng.integers(0, count, items) for name, count in parts.items()}
    with (folder / "source" / "items.csv").open("w") as file:
        file.write("id,title\n")
        for i in range(items):
            title = " ".join(f"{name}{values[name][i]}" for name in parts)
            file.write(f"p{i},{title}\n")
    order = np.lexsort((values["thing"], values["style"], values["brand"]))
    shelf = values["brand"][order] * parts["style"] + values["style"][order]
    starts = np.searchsorted(shelf, np.arange(parts["brand"] * parts["style"] + 1))
    with (folder / "source" / "interactions.csv").open("w") as file:
        file.write("user,item,time\n")
        for user in range(users):
            here = user % (len(starts) - 1)
            things = values["thing"][order[starts[here] : starts[here + 1]]]
            thing = int(rng.integers(parts["thing"]))
            for step in range(12):
                at = np.flatnonzero(things == thing)
                if len(at):
                    file.write(f"u{user},p{order[starts[here] + rng.choice(at)]},{step}\n")
                thing = (thing * 7 + 11) % parts["thing"] if rng.random() < 0.9 else int(rng.integers(parts["thing"]))
    (folder / "recipe.yaml").write_text(LARGE % seed)


def speed(folder: Path, rounds: int = 9) -> dict[str, float]:
    """CPU seconds of steps and of square bf16 products, in turns; medians. Only what is of use counts as work: no
    padding, and of attention the half that lies in the past."""
    import torch

    from plait.core.config import load_recipe
    from plait.core.device import choose_device, keep_memory, threads
    from plait.data.dataset import Dataset
    from plait.model.multimodal import Multimodal
    from plait.recommend.sampler import HistorySampler
    from plait.recommend.source import open_histories
    from plait.training.batches import PASS
    from plait.training.build import model_config
    from plait.training.distributed import Group, Network
    from plait.training.losses import LossModule, step_losses
    from plait.training.optimizer import make_optimizer

    torch.set_num_threads(threads())
    keep_memory()
    recipe, dataset = load_recipe(folder / "recipe.yaml"), Dataset.open(folder / "data")
    device = choose_device("cpu", training=True)
    content = open_histories(dataset, recipe, folder / "none", device)
    model = Multimodal(model_config(recipe, dataset, 256, None, brought=content.settings))
    content.fill(model)
    model.train()
    split, backbone, settings = content.split("train"), model.config.backbone, recipe.training
    sampler = HistorySampler(
        split, model.vocabulary, {}, settings.batch_size or 64, backbone.max_length, 0, 0.0, False, worth=PASS
    )
    network, optimizer = Network(LossModule(model, device)), make_optimizer([model], 1e-3, 0.05, (0.9, 0.98))
    weights = sum(p.numel() for block in model.backbone.blocks for p in block.parameters() if p.ndim > 1)

    def work(number: int) -> tuple[float, int]:
        step = sampler.step(number)
        optimizer.zero_grad(set_to_none=True)
        _, seen = step_losses(network, [step], split, Group(), True, {}, number)
        network.clip_grad_norm(1.0)
        optimizer.step()
        squares = sum(float((batch.lengths.double() ** 2).sum()) for batch in step.batches)
        per_place = weights + len(content.catalogue) * backbone.width
        return 6 * seen * per_place + 6 * backbone.layers * backbone.width * squares, seen

    a = torch.randn(2048, 2048).bfloat16()
    rates, peaks, tokens = [], [], []
    for turn in range(rounds + 1):
        begun = time.process_time()
        for _ in range(8):
            a @ a
        peak = 8 * 2 * 2048**3 / (time.process_time() - begun)
        begun = time.process_time()
        done, seen = np.sum([work(3 * turn + i) for i in range(3)], 0)
        spent = time.process_time() - begun
        if turn:  # the first one warms up
            peaks.append(peak), rates.append(done / spent), tokens.append(seen / spent)
    return {
        "peak_gflops": float(np.median(peaks)) / 1e9,
        "training_gflops": float(np.median(rates)) / 1e9,
        "share_of_peak": float(np.median(np.array(rates) / np.array(peaks))),
        "places_per_second": float(np.median(tokens)),
        "epoch_seconds": float((split.starts[-1]) / np.median(tokens)),
    }


def adding(folder: Path, count: int = 1000) -> dict[str, float]:
    """Seconds until a run is loaded, 1,000 new items have joined, one of them was recommended, the grown model was
    kept, and loaded again."""
    from plait.inference.model import load

    model: Any = load(folder / "run", "cpu")
    items = model.catalogue.items
    table, grown = folder / "new.jsonl", folder / "grown"
    shutil.rmtree(grown, ignore_errors=True)
    with table.open("w") as file:
        for i in range(count):
            old = items[i % len(items)]
            new = {"id": f"new{i}", "title": f"{old.title} again", "categories": old.categories, **old.more}
            file.write(json.dumps(new) + "\n")
    clock = [time.perf_counter()]
    model = load(folder / "run", "cpu")
    clock.append(time.perf_counter())
    model.add_items(table)
    clock.append(time.perf_counter())
    history = [item.id for item in items[:3]]
    model.recommend(history=history, where="id like 'new%'", k=1)
    clock.append(time.perf_counter())
    model.save_catalogue(grown)
    clock.append(time.perf_counter())
    assert load(grown, "cpu").recommend(history=history, where="id like 'new%'", k=1)
    clock.append(time.perf_counter())
    return dict(zip(("load", "add", "recommend", "save", "load and recommend"), np.diff(clock).tolist(), strict=True))


LIMIT = {"semantic": 2000, "large": 500}  # targets asked for, drawn by the seed
TASKS = {
    "ml1m": lambda *a: films(*a, 0.0),
    "cold": lambda *a: films(*a, 0.1),
    "beauty": lambda *a: goods(*a, "Beauty.txt"),
    "toys": lambda *a: goods(*a, "Toys_and_Games.txt"),
    "ml100k": lambda *a: hundred(*a, "leave-one-out"),
    "ml100k-time": lambda *a: hundred(*a, "time"),
    "products": shop,
    "semantic": semantic,
    "large": large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=[*TASKS, "speed", "adding"])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="", help="of products: a run or model that sees their images")
    options = parser.parse_args()
    folder = options.out
    if options.task in ("speed", "adding"):
        print(json.dumps((speed if options.task == "speed" else adding)(folder), indent=1))
        return
    (folder / "source").mkdir(parents=True, exist_ok=True)
    extra = [options.encoder] if options.encoder else []
    TASKS[options.task](options.data, folder, options.seed, *extra)
    recipe = folder / "recipe.yaml"
    plait = [sys.executable, "-m", "plait"]
    for command in (
        ["prepare", folder / "source", "-o", folder / "data", "--recipe", recipe],
        ["train", folder / "data", "-o", folder / "run", "--recipe", recipe],
        ["evaluate", folder / "run", *(["--limit", LIMIT[options.task]] if options.task in LIMIT else [])],
    ):
        begun = time.perf_counter()
        subprocess.run([*plait, *map(str, command)], check=True)
        print(f"{command[0]}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
