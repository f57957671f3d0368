"""Probabilities to act on: calibration, "none of these", several labels, wrong labels, decisions beside MiniLM.

    python bench/decisions.py fashion --data SHARED_DATA --seed 0 --out decisions.jsonl

Each row is an ordinary run of `plait.train` (or what is said there), measured on held-out data; a line is appended to
the file. A row that stands there for the same seed and minutes is not measured again. Time budgets are processor
seconds, so that a busy machine changes nothing but how long one waits.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

time.perf_counter = time.process_time  # before anything else asks for the time

from plait.core import isa  # noqa: E402

isa.cap()  # PLAIT_ISA, before torch loads

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import average_precision_score, roc_auc_score  # noqa: E402

import plait  # noqa: E402
from plait.classifiers.classifier import Features  # noqa: E402
from plait.classifiers.held_out import held_out_log_probabilities  # noqa: E402
from plait.classifiers.several import f1_scores, thresholds_of  # noqa: E402
from plait.evaluation.metrics import calibration  # noqa: E402
from plait.evaluation.predictors import as_matrix  # noqa: E402

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLOTHES = ["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


@dataclass
class Row:
    """What a row is measured with."""

    data: Path
    work: Path
    seed: int
    minutes: float
    minilm: str | None
    init_from: str | None


def figures(ood_in: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, float]:
    """AUROC, and the share refused where 95 % of what is known is kept."""
    cut = float(np.quantile(ood_in, 0.95))
    found = {}
    for name, scores in others.items():
        truth = np.concatenate([np.zeros(len(ood_in)), np.ones(len(scores))])
        found[f"auroc {name}"] = float(roc_auc_score(truth, np.concatenate([ood_in, scores])))
        found[f"refused {name}"] = float((scores > cut).mean())
    return found


def known(model: Any, inputs: list[Any], truth: list[str]) -> tuple[dict[str, float], np.ndarray]:
    """Accuracy, ECE, accuracy at 90 and 80 % coverage; and the unlikeness of the inputs."""
    answers = [
        one for start in range(0, len(inputs), 256) for one in model.classify_inputs(inputs[start : start + 256])
    ]
    right = np.array([one[0].label == label for one, label in zip(answers, truth, strict=True)])
    believed = np.array([one[0].probability for one in answers])
    order = np.argsort(-believed, kind="stable")
    found = {"n": len(truth), "accuracy": float(right.mean()), "ece": calibration(believed, right)[0]}
    draws = np.random.default_rng(0).random((200, len(believed))) < believed
    chance = [calibration(believed, draw)[0] for draw in draws]
    found["ece of 95 in 100 perfect ones"] = float(np.quantile(chance, 0.95))
    for share in (0.9, 0.8):
        found[f"accuracy at {share:.0%}"] = float(right[order[: round(share * len(order))]].mean())
    found["said to be none"] = float(np.mean([one.none_of_these for one in answers]))
    return found, unlikeness(answers)


def unlikeness(answers: list[Any]) -> np.ndarray:
    return np.array([one.ood_score for one in answers], float)


def unlike(model: Any, inputs: list[Any]) -> np.ndarray:
    answers = [
        one for start in range(0, len(inputs), 256) for one in model.classify_inputs(inputs[start : start + 256])
    ]
    return unlikeness(answers)


def idx(folder: Path, start: str, most: int) -> tuple[list[Image.Image], np.ndarray]:
    """Images and classes of idx files whose names start so."""
    pixels = next(folder.glob(f"{start}*images*"))
    classes = next(folder.glob(f"{start}*labels*"))
    values = np.frombuffer(gzip.decompress(pixels.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)[:most]
    truth = np.frombuffer(gzip.decompress(classes.read_bytes()), np.uint8, offset=8)[:most]
    return [Image.fromarray(one) for one in values], truth.astype(int)


def photos(folder: Path, most: int) -> list[Image.Image]:
    found = []
    with tarfile.open(folder / "cifar10_jpeg.tar.gz") as archive:
        for member in archive:
            if member.isfile() and "test/" in member.name and member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                found.append(Image.open(io.BytesIO(file.read())).convert("L"))
    rng = np.random.default_rng(0)
    return [found[i] for i in rng.choice(len(found), most, False)]


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(count)]


def image_run(row: Row, folder: str, names: list[str]) -> tuple[Any, list[Image.Image], list[str]]:
    """A model of 12,000 training images, and 3,000 of the test."""
    source = row.work / "in"
    images, classes = idx(row.data / folder, "train", 12_000)
    for number, (image, label) in enumerate(zip(images, classes.tolist(), strict=True)):
        place = source / names[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png", compress_level=0)
    data = plait.prepare(source, row.work / "data", workers=0, near_duplicates=False, progress=False)
    run = plait.train(data, row.work / "run", minutes=row.minutes, seed=row.seed, progress=False, tell=print)
    test, truth = idx(row.data / folder, "t10k", 3000)
    return run.model(), test, [names[label] for label in truth]


def fashion(row: Row) -> dict[str, float]:
    """Calibration; digits and noise are none of these."""
    model, test, truth = image_run(row, "fashion_mnist", CLOTHES)
    found, inside = known(model, test, truth)
    others = {"digits": idx(row.data / "mnist", "t10k", 1000)[0], "noise": noise(300)}
    return found | figures(inside, {name: unlike(model, images) for name, images in others.items()})


def digits(row: Row) -> dict[str, float]:
    """Photos and noise are none of these."""
    model, test, truth = image_run(row, "mnist", DIGITS)
    found, inside = known(model, test, truth)
    others = {"photos": photos(row.data / "cifar10", 1000), "noise": noise(300)}
    return found | figures(inside, {name: unlike(model, images) for name, images in others.items()})


def voice(row: Row) -> dict[str, float]:
    """Seven spoken digits of known speakers are learnt; the other three are other words."""
    source = row.work / "in"
    test: list[tuple[Path, str]] = []
    with zipfile.ZipFile(row.data / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".wav"):
                continue
            digit, _, take = Path(name).stem.split("_")
            held = int(take) < 5 or int(digit) > 6
            place = row.work / "test" if held else source / DIGITS[int(digit)]
            place.mkdir(parents=True, exist_ok=True)
            (place / Path(name).name).write_bytes(archive.read(name))
            if held:
                test.append((place / Path(name).name, DIGITS[int(digit)]))
    run = plait.train(source, row.work / "run", minutes=row.minutes, seed=row.seed, progress=False, tell=print)
    model = run.model()
    mine = [(path, label) for path, label in test if label in DIGITS[:7]]
    found, inside = known(model, [path for path, _ in mine], [label for _, label in mine])
    return found | figures(
        inside, {"other words": unlike(model, [path for path, label in test if label in DIGITS[7:]])}
    )


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def intents(row: Row, name: str) -> dict[str, float]:
    """From scratch, or beside MiniLM with a logistic regression; CLINC150 has questions outside of all intents."""
    folder = row.data / "intents"
    train, test = rows_of(folder / f"{name}_train.csv"), rows_of(folder / f"{name}_test.csv")
    if row.minilm is not None:
        return minilm(row, name, train, test)
    val = rows_of(folder / f"{name}_val.csv") if name == "clinc150" else []
    row.work.mkdir(exist_ok=True)
    with (row.work / "in.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "intent", "split"])
        table.writerows([*one, "train"] for one in train)
        table.writerows([*one, "val"] for one in val)
    run = plait.train(
        row.work / "in.csv", row.work / "run", minutes=row.minutes, seed=row.seed, init_from=row.init_from,
        progress=False, tell=print,
    )  # fmt: skip
    model = run.model()
    found, inside = known(model, [one[0] for one in test], [one[1] for one in test])
    begun = time.process_time()
    for one in test[:200]:
        model.classify_inputs([one[0]])
    found["ms"] = (time.process_time() - begun) / 200 * 1000
    if name == "clinc150":
        outside = [one[0] for one in rows_of(folder / "clinc150_oos_test.csv")]
        found |= figures(inside, {"out of scope": unlike(model, outside)})
    return found


def minilm(row: Row, name: str, train: list[list[str]], test: list[list[str]]) -> dict[str, float]:
    """The public baseline: embeddings of MiniLM as plait loads it, and scikit-learn's logistic regression."""
    model = plait.load(str(row.minilm))
    inside = model.embed_inputs([one[0] for one in train])
    fitted = LogisticRegression(C=10, max_iter=300).fit(inside, [one[1] for one in train])
    chances = fitted.predict_proba(model.embed_inputs([one[0] for one in test]))
    believed, right = chances.max(1), fitted.classes_[chances.argmax(1)] == np.array([one[1] for one in test])
    begun = time.process_time()
    for one in test[:100]:
        fitted.predict_proba(model.embed_inputs([one[0]]))
    found = {"n": len(test), "accuracy": float(right.mean()), "ece": calibration(believed, right)[0]}
    found["ms"] = (time.process_time() - begun) / 100 * 1000
    if name == "clinc150":
        outside = rows_of(row.data / "intents" / "clinc150_oos_test.csv")
        others = fitted.predict_proba(model.embed_inputs([one[0] for one in outside])).max(1)
        found |= figures(-believed, {"out of scope": -others})
    return found


def emotions(row: Row, column: str) -> dict[str, float]:
    """GoEmotions: macro F1 with thresholds fitted on dev, beside a logistic regression a label on the same features."""
    folder = row.data / "emotions"
    parts = {split: rows_of(folder / f"goemotions_{split}.csv") for split in ("train", "dev", "test")}
    place = 1 if column == "emotions" else 2
    row.work.mkdir(exist_ok=True)
    with (row.work / "in.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "labels", "split"])
        for split, rows in parts.items():
            table.writerows([one[0], one[place], split] for one in rows if split != "test")
    recipe = {"data": {"map": {"labels": "labels"}}}
    run = plait.train(
        row.work / "in.csv", row.work / "run", recipe=recipe, task="recognise", minutes=row.minutes, seed=row.seed,
        progress=False, tell=print,
    )  # fmt: skip
    (one,) = run.model().plait_model.checkpoint.predictors
    texts = {split: [line[0] for line in rows] for split, rows in parts.items()}
    wanted = {
        split: as_matrix([line[place].replace("|", ";") for line in rows], one.labels) for split, rows in parts.items()
    }
    said = one.probabilities(texts["test"]) >= one.thresholds
    found = {"n": len(said), "labels": len(one.labels), "macro_f1": float(f1_scores(wanted["test"], said).mean())}
    features = Features.fit("text", texts["train"])
    rows = {split: features(values) for split, values in texts.items()}
    chances = {split: np.zeros(values.shape) for split, values in wanted.items()}
    for label in range(len(one.labels)):
        fitted = LogisticRegression(solver="liblinear").fit(rows["train"], wanted["train"][:, label])
        for split in ("dev", "test"):
            chances[split][:, label] = fitted.predict_proba(rows[split])[:, 1]
    fitted_on_dev = thresholds_of(chances["dev"], wanted["dev"])
    found["macro_f1 of logistic regression"] = float(f1_scores(wanted["test"], chances["test"] >= fitted_on_dev).mean())
    found["the same, threshold a half"] = float(f1_scores(wanted["test"], chances["test"] >= 0.5).mean())
    return found


def planted(row: Row, what: str) -> dict[str, float]:
    """5 % of the labels are made wrong: average precision of the review's order, by records held out alone."""
    if what == "fashion":
        images, classes = idx(row.data / "fashion_mnist", "train", 10_000)
        inputs: list[Any] = [np.asarray(one)[..., None] for one in images]
        count, kind = 10, "image"
    else:
        rows = rows_of(row.data / "intents" / f"{what}_train.csv")
        names = sorted({one[1] for one in rows})
        inputs, classes = [one[0] for one in rows], np.array([names.index(one[1]) for one in rows])
        count, kind = len(names), "text"
    rng = np.random.default_rng(row.seed)
    wrong = np.zeros(len(classes), bool)
    wrong[rng.choice(len(classes), len(classes) // 20, False)] = True
    given = np.where(wrong, (classes + rng.integers(1, count, len(classes))) % count, classes)
    features = Features.fit(kind, inputs)
    logs = held_out_log_probabilities(features(inputs), given, count, row.seed)
    rows_ = np.arange(len(given))
    others = logs.copy()
    others[rows_, given] = -np.inf
    odds = others.max(1) - logs[rows_, given]
    return {
        "n": len(given),
        "planted": int(wrong.sum()),
        "average precision": float(average_precision_score(wrong, odds)),
    }


ROWS: dict[str, Callable[[Row], dict[str, float]]] = {
    "fashion": fashion, "digits": digits, "voice": voice,
    "banking77": lambda row: intents(row, "banking77"), "clinc150": lambda row: intents(row, "clinc150"),
    "emotions-7": lambda row: emotions(row, "emotions"), "emotions-28": lambda row: emotions(row, "fine_emotions"),
    **{f"planted-{what}": (lambda row, what=what: planted(row, what)) for what in ("fashion", "banking77", "clinc150")},  # type: ignore[misc]
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=sorted(ROWS))
    parser.add_argument("--data", type=Path, required=True, help="the folder of the public data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, the processor's")
    parser.add_argument("--minilm", help="intents: MiniLM and a logistic regression in place of a run; its folder")
    parser.add_argument("--init-from", help="intents: the encoder that a run begins from")
    parser.add_argument("--keep", type=Path, help="a folder in which data and run are kept")
    parser.add_argument("--out", type=Path, default=Path("decisions.jsonl"))
    given = parser.parse_args()
    key = {"row": given.row, "seed": given.seed, "minutes": given.minutes, "minilm": given.minilm is not None,
           "init_from": given.init_from and Path(given.init_from).name}  # fmt: skip
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if any(all(line.get(name) == value for name, value in key.items()) for line in done):
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = given.keep or Path(scratch) / "work"
        found = ROWS[given.row](Row(given.data, work, given.seed, given.minutes, given.minilm, given.init_from))
    line = {
        **key,
        **{name: round(value, 4) for name, value in found.items()},
        "isa": os.environ.get("PLAIT_ISA", "native"),
    }
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
