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


def share_right(run: Path, folder: Path, column: str | None = None) -> dict[str, float]:
    """The share of files under a folder of class folders whose first prediction is their folder's name; beside it,
    that of the linear opinion alone, and of how many."""
    import numpy as np

    model = plait.load(run)
    answers = [(path.parent.name, model.classify(path, column=column)) for path in files(folder)]
    right = np.array([truth == found[0].label for truth, found in answers])
    simple = np.array([truth == found for truth, found in linear_answers(model, folder)])
    return {"value": float(right.mean()), "simple": float(simple.mean()), "n": len(right)}


def linear_answers(model: Any, folder: Path) -> list[tuple[str, str]]:
    """The truth and what the linear opinion says, for files in class folders."""
    classifier = model.checkpoint.classifiers[0]
    paths = files(folder)
    samples = [model.modality(classifier.source).windows(path)[0] for path in paths]
    said = classifier.linear_scores(samples).argmax(1)
    return [(path.parent.name, classifier.labels[i]) for path, i in zip(paths, said, strict=True)]


def photos(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` holds `train/CLASS/` and `new/CLASS/`; accuracy on the new ones."""
    command("train", data / "train", "-o", run, "--minutes", seconds / 60, "--seed", seed)
    return share_right(run, data / "new")


def labelled_texts(data: Path, run: Path, seed: int, seconds: float) -> dict[str, float]:
    """`data` holds train.csv and, elsewhere in it, new/test.csv, of two columns: a text and its label."""
    import numpy as np
    from sklearn.metrics import f1_score

    command("train", data / "train.csv", "-o", run, "--minutes", seconds / 60, "--seed", seed)
    model = plait.load(run)
    with (data / "new" / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    texts, truth = [row[0] for row in rows], np.array([row[1] for row in rows])
    classifier = model.checkpoint.classifiers[0]
    names = np.array(classifier.labels)
    scores = opinion_scores(model, classifier, texts, list(dict.fromkeys(["linear", *classifier.mixture.used])))
    said = names[classifier.mixture.log_probabilities(scores).argmax(1)]
    simple = names[scores["linear"].argmax(1)]
    found = {"value": float((said == truth).mean()), "simple": float((simple == truth).mean()), "n": len(truth)}
    return found | {
        "macro_f1": float(f1_score(truth, said, average="macro")),
        "simple_macro_f1": float(f1_score(truth, simple, average="macro")),
    }


ROWS = {"photos": photos, "digits": photos, "intents": labelled_texts, "emotions": labelled_texts}


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
