"""Canaries among speeches of tinyshakespeare, planted 1, 10 and 100 times, and their exposure.

    python bench/canaries.py DATA/text/tinyshakespeare.txt -o runs/canaries

Takes the speeches of 40 to 400 characters in the first 300,000 characters (1,216 to train, 136 to test), plants 12
canaries, trains 200 steps of 32 (width 64, 2 layers, seed 0) and evaluates. Prints the figures of memorising.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from plait.core.config import load_recipe
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.evaluation.tasks import evaluate
from plait.inference.model import PlaitModel, load
from plait.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/canaries"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speeches = [part.strip().replace("\n", " ") for part in options.source.read_text()[:300_000].split("\n\n")]
    rows = [
        {"text": text, "split": "test" if i % 10 == 9 else "val" if i % 10 == 8 else "train"}
        for i, text in enumerate(speeches)
        if 40 < len(text) < 400
    ]
    files = options.out / "files"
    files.mkdir(parents=True, exist_ok=True)
    (files / "speeches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(files, options.out / "data", workers=0)
    backbone = {"width": 64, "layers": 2, "heads": 4, "context": 96}
    training = {"steps": options.steps, "batch_size": 32, "learning_rate": 3e-3, "canaries": 12}
    recipe = load_recipe(None, {"model": {"backbone": backbone, "text": {"vocabulary": 500}}, "training": training})
    dataset = Dataset.open(options.out / "data")
    train(dataset, options.out / "run", recipe, lambda progress: None)
    model = load(options.out / "run")
    assert isinstance(model, PlaitModel)
    for name, metric in evaluate(model, dataset)[0].items():
        if name.startswith("memorising"):
            print(f"{name}: {metric['value']:.3g} ± {metric['stderr']:.2g} ({metric['n']}); chance {metric['chance']}, "
                  f"baseline {metric['baseline']}")  # fmt: skip


if __name__ == "__main__":
    main()
