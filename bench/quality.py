"""What default commands give on public data, a row each, in processor seconds; lines are appended to a file.

    python bench/quality.py photos --data CIFAR_FOLDER --seed 0 --seconds 90 --out quality.jsonl

Time is the processor's: the clock that training plans by is the process's own, so that a busy machine changes nothing
but how long one waits. A row that stands in the file for the same seconds and seed is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

time.perf_counter = time.process_time  # before anything else asks for the time

from plait.core import isa  # noqa: E402

isa.cap()  # PLAIT_ISA, before torch loads

import numpy as np  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

import plait.cli  # noqa: E402
from plait.inference.opinions import opinion_scores  # noqa: E402


def command(*arguments: object) -> None:
    """A command of plait, in this process."""
    try:
        sys.argv = ["plait", *map(str, arguments)]
        plait.cli.main()
    except SystemExit as end:
        if end.code:
            raise


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def share_right(run: Path, folder: Path) -> dict[str, float]:
    """The share of files under a folder of class folders whose likeliest label is their folder's name; beside it, that
    of the linear opinion alone, and of how many."""
    model = plait.load(run)
    classifier = model.checkpoint.classifiers[0]
    paths = files(folder)
    samples = [model.modality(classifier.source).windows(path)[0] for path in paths]
    return compared(model, classifier, samples, [path.parent.name for path in paths])


def compared(model: Any, classifier: Any, inputs: list[Any], truth: list[str]) -> dict[str, float]:
    """How often the classifier is right on inputs, and the linear opinion alone; by accuracy and macro F1."""
    names, wanted = np.array(classifier.labels), np.array(truth)
    scores = opinion_scores(model, classifier, inputs, list(dict.fromkeys(["linear", *classifier.mixture.used])))
    said = names[classifier.mixture.log_probabilities(scores).argmax(1)]
    simple = names[scores["linear"].argmax(1)]
    return {
        "value": float((said == wanted).mean()), "simple": float((simple == wanted).mean()), "n": len(wanted),
        "macro_f1": float(f1_score(wanted, said, average="macro")),
        "simple_macro_f1": float(f1_score(wanted, simple, average="macro")),
        **{f"{name} alone": float((names[one.argmax(1)] == wanted).mean()) for name, one in scores.items()},
    }  # fmt: skip


def photos(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` holds `train/CLASS/` and `new/CLASS/`; accuracy on the new ones."""
    command("train", data / "train", "-o", run, "--minutes", seconds / 60, "--seed", seed)
    return share_right(run, data / "new")


def labelled_texts(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` holds train.csv and, elsewhere in it, new/test.csv, of two columns: a text and its label."""
    command("train", data / "train.csv", "-o", run, "--minutes", seconds / 60, "--seed", seed)
    model = plait.load(run)
    with (data / "new" / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return compared(model, model.checkpoint.classifiers[0], [row[0] for row in rows], [row[1] for row in rows])


def recommendation(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` is a file or folder of interactions; HR@10 of each user's last item, beside directed co-occurrence."""
    command("train", data, "-o", run, "--minutes", seconds / 60, "--seed", seed)
    found = plait.evaluate(run, progress=False)
    hits = found["recommendation/item-item/hr_at_10"]
    return {"value": hits.value, "stderr": hits.stderr, "simple": hits.baseline, "n": hits.n}


def language(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` is one file of text, whose last tenth is held out; nats a character, beside an n-gram model."""
    command("train", data, "-o", run, "--minutes", seconds / 60, "--seed", seed)
    found = plait.evaluate(run, split="val", progress=False)
    bits = found["language/text/bits_per_byte"].value
    other = found["language/text/bits_per_byte_ngrams"].value
    nats = found["language/text/nats_per_character"]
    return {"value": nats.value, "simple": nats.value * other / bits, "n": nats.n}


ROWS = {"photos": photos, "digits": photos, "intents": labelled_texts, "emotions": labelled_texts,
        "films": recommendation, "text": language}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=sorted(ROWS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=90.0, help="processor seconds of training")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    given = parser.parse_args()
    key = {"row": given.row, "data": given.data.name, "seed": given.seed, "seconds": given.seconds}
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if any(all(line.get(name) == value for name, value in key.items()) for line in done):
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        found = ROWS[given.row](given.data.resolve(), Path(folder) / "run", given.seed, given.seconds)
        shutil.rmtree(folder, ignore_errors=True)
    line = {**key, **found, "whole": round(time.process_time() - begun, 1), "machine": platform.processor()}
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line)


if __name__ == "__main__":
    main()
