"""What default commands give on public data: one command a row, whose line is appended to a file.

    python bench/quality.py ROW --data DATA --seed N [--seconds S] [--out quality.jsonl]
    python bench/quality.py --list

DATA is a folder with the public sets (cifar10/, fsdd/, fashion_mnist/, intents/, emotions/, movielens/, amazon/, text/,
esc10/, flickr8k/), as their authors publish them or packed; nothing of it is part of this project. Every row writes its
files into a temporary folder, trains with `plait train FILES -o RUN --minutes M` (`--task` where the row says so) and
asks the run about records that training and choice have never seen.

Time is the processor's: the clock by which training plans is the process's own, threads added up, so that a busy
machine changes nothing but how long one waits. "Three minutes of two cores" are 360 of these seconds. A row that stands
in the file for the same seconds and seed is not measured again, so that a list of commands goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import json
import math
import platform
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

time.perf_counter = time.process_time  # before anything else asks for the time

from plait.core import isa  # noqa: E402

isa.cap()  # PLAIT_ISA, before torch loads

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.metrics import f1_score  # noqa: E402

import plait.cli  # noqa: E402
from plait.inference.opinions import opinion_scores  # noqa: E402

Figures = dict[str, float]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPEAKERS = ["nicolas", "yweweler", "jackson", "theo", "george"]


@dataclass(frozen=True)
class Task:
    """What a row is given: the public sets, a folder of its own, and how long it may train."""

    data: Path
    folder: Path
    seed: int
    seconds: float

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def train(self, source: Path, *more: object) -> None:
        """The default command on a source."""
        command("train", source, "-o", self.run, "--minutes", self.seconds / 60, "--seed", self.seed, *more)


@dataclass(frozen=True)
class Row:
    """A row of the table: how it is measured, and its processor seconds where none are named."""

    measure: Callable[[Task], Figures]
    seconds: float


def command(*arguments: object) -> None:
    """A command of plait, in this process."""
    try:
        sys.argv = ["plait", *map(str, arguments)]
        plait.cli.main()
    except SystemExit as end:
        if end.code:
            raise


# --- recognition ------------------------------------------------------------------------------------------------


def compared(model: Any, inputs: list[Any], truth: list[str]) -> Figures:
    """How often the run's first classifier is right, and each of its opinions alone; "simple" is the linear one."""
    classifier = model.checkpoint.classifiers[0]
    names, wanted = np.array(classifier.labels), np.array(truth)
    if classifier.features.kind == "text":
        samples = inputs
    else:
        modality = model.modality(classifier.source)
        samples = [modality.windows(value)[0] for value in inputs]
    scores = opinion_scores(model, classifier, samples, list(dict.fromkeys(["linear", *classifier.mixture.used])))
    said = names[classifier.mixture.log_probabilities(scores).argmax(1)]
    simple = names[scores["linear"].argmax(1)]
    right = said == wanted
    return {
        "value": float(right.mean()), "stderr": float(right.std() / math.sqrt(len(right))),
        "simple": float((simple == wanted).mean()), "n": len(wanted),
        "macro_f1": float(f1_score(wanted, said, average="macro")),
        "simple_macro_f1": float(f1_score(wanted, simple, average="macro")),
        **{f"{name} alone": float((names[one.argmax(1)] == wanted).mean()) for name, one in scores.items()},
    }  # fmt: skip


def asked(task: Task, inputs: list[Any], truth: list[str]) -> Figures:
    return compared(plait.load(task.run), inputs, truth)


def of_folders(task: Task, train: Path, new: Path) -> Figures:
    """Class folders to train on, and class folders to ask about."""
    task.train(train)
    paths = sorted(path for path in new.rglob("*") if path.is_file())
    return asked(task, paths, [path.parent.name for path in paths])


def of_table(task: Task, rows: list[tuple[str, str]], new: list[tuple[str, str]]) -> Figures:
    """Texts with their labels to train on, and others to ask about."""
    path = task.folder / "train.csv"
    write_csv(path, ("text", "label"), rows)
    task.train(path)
    return asked(task, [text for text, _ in new], [label for _, label in new])


def write_csv(path: Path, heading: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heading)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cifar(task: Task, some: Callable[[str, str, list[str]], list[str]]) -> Figures:
    """Of each (split, class) the files that `some` takes."""
    path = task.data / "cifar10" / "cifar10_jpeg.tar.gz"
    by_class: dict[tuple[str, str], list[str]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                split, label = member.name.split("/")[-3:-1]
                by_class.setdefault((split, label), []).append(member.name)
    chosen = {name for (split, label), names in by_class.items() for name in some(split, label, sorted(names))}
    with tarfile.open(path) as archive:  # as a stream: its members are in no order that could be asked for
        for member in archive:
            if member.name in chosen:
                split, label, name = member.name.split("/")[-3:]
                content = archive.extractfile(member)
                assert content is not None
                write(task.folder / split / label / name, content.read())
    return of_folders(task, task.folder / "train", task.folder / "test")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def photos(task: Task) -> Figures:
    """1,000 of CIFAR-10 (JPEG) in nine class folders; 900 of its test images are new."""

    def some(split: str, label: str, names: list[str]) -> list[str]:
        count = 100 if split == "test" else 111 + (label == "airplane")
        return [] if label == "frog" else random.Random(f"{split} {label}").sample(names, count)

    return cifar(task, some)


def cifar10(task: Task) -> Figures:
    """CIFAR-10 (JPEG), whole."""
    return cifar(task, lambda split, label, names: names)


def digits(task: Task, speaker: str) -> Figures:
    """1,200 spoken digits of four speakers, named as they are published; all 500 of the fifth are new."""
    choice = random.Random(0)
    with zipfile.ZipFile(task.data / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        for name in sorted(archive.namelist()):
            parts = re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", Path(name).name)
            if not parts:
                continue
            new = parts[2] == speaker
            if new or choice.random() < 0.6:  # 1,200 of 2,000
                place = task.folder / ("new" if new else "train") / DIGITS[int(parts[1])] / Path(name).name
                write(place, archive.read(name))
    return of_folders(task, task.folder / "train", task.folder / "new")


def fashion(task: Task) -> Figures:
    """The 59,000 images in their published files, and the official 10,000."""
    folder, source = task.folder / "train", task.data / "fashion_mnist"
    folder.mkdir()
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        shutil.copy(source / f"train59k-{name}", folder / f"train-{name}")
    task.train(folder)
    images = np.frombuffer(gzip.decompress((source / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((source / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return asked(task, list(images.reshape(-1, 28, 28)), [str(label) for label in labels])


def environment(task: Task, fold: int) -> Figures:
    """ESC-10: four folds to train on, one to ask about."""
    with zipfile.ZipFile(task.data / "esc10" / "esc10_16k_ogg.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        for row in read_csv(task.data / "esc10" / "esc10.csv"):
            place = "new" if int(row["fold"]) == fold else "train"
            content = archive.read(inside[row["filename"]])
            write(task.folder / place / row["category"] / row["filename"], content)
    return of_folders(task, task.folder / "train", task.folder / "new")


def pairs_of(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    return [(row[text], row[label]) for row in read_csv(path)]


def few(rows: list[tuple[str, str]], count: int | None, seed: int) -> list[tuple[str, str]]:
    """So many records of each label, drawn by the seed; all where it is None."""
    if count is None:
        return rows
    by_label: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        by_label.setdefault(row[1], []).append(row)
    choice = random.Random(seed)
    return [row for group in by_label.values() for row in choice.sample(group, count)]


def banking(task: Task, examples: int | None = None) -> Figures:
    """BANKING77, of each intent all or some examples; asked about the 2,464 of its test split that are here."""
    train, test = (
        pairs_of(task.data / "intents" / f"banking77_{s}.csv", "text", "category") for s in ("train", "test")
    )
    return of_table(task, few(train, examples, task.seed), test)


def clinc(task: Task) -> Figures:
    """CLINC150 within its 150 intents; asked about the 3,600 of its test split that are here."""
    source = task.data / "intents"
    train, test = (pairs_of(source / f"clinc150_{split}.csv", "text", "intent") for split in ("train", "test"))
    return of_table(task, train, test)


def emotions(task: Task) -> Figures:
    """GoEmotions, seven classes, records of one label."""

    def read(split: str) -> list[tuple[str, str]]:
        rows = pairs_of(task.data / "emotions" / f"goemotions_{split}.csv", "text", "emotions")
        return [row for row in rows if "|" not in row[1]]

    return of_table(task, read("train"), read("test"))


def synthetic(task: Task, name: str, examples: int | None = None) -> Figures:
    """Requests and their intents, or sentences and how people feel; see make_conversations.py."""
    import make_conversations

    rows = list(getattr(make_conversations, name)())
    text, label = (key for key in rows[0] if key != "split")
    known = [(row[text], row[label]) for row in rows if row["split"] != "test"]
    new = [(row[text], row[label]) for row in rows if row["split"] == "test"]
    return of_table(task, few(known, examples, task.seed), new)


# --- histories --------------------------------------------------------------------------------------------------


EVERYBODY = 30_000  # users who are asked about; by default 2,000 are


def recommended(task: Task, source: Path) -> Figures:
    """HR@10 and NDCG@10 of each user's last item among all, beside directed co-occurrence."""
    task.train(source)
    found = plait.evaluate(task.run, limit=EVERYBODY, progress=False)
    hits, gain = (found[f"recommendation/item-item/{name}"] for name in ("hr_at_10", "ndcg_at_10"))
    assert hits.value is not None and gain.value is not None
    return {
        "value": hits.value, "stderr": hits.stderr or math.nan, "simple": hits.baseline or math.nan, "n": hits.n or 0,
        "ndcg": gain.value, "ndcg_stderr": gain.stderr or math.nan, "simple_ndcg": gain.baseline or math.nan,
    }  # fmt: skip


def films(task: Task) -> Figures:
    """ml-100k, as it is published."""
    return recommended(task, task.data / "movielens" / "ml-100k.zip")


def many_films(task: Task) -> Figures:
    """ML-1M as SASRec has it; users whose last item is withheld are learnt from and not asked about."""
    source = task.folder / "source"
    source.mkdir()
    for name, to in (
        ("ml-1m_sasrec_minus500.txt.gz", "interactions.txt.gz"),
        ("ml-1m_items.jsonl", "items.jsonl"),
        ("ml-1m_users.tsv", "users.tsv"),
    ):
        shutil.copy(task.data / "movielens" / name, source / to)
    recipe = task.folder / "recipe.yaml"
    items = "{interactions: interactions.txt.gz, items: items.jsonl, columns: {id: sas_item}, "
    recipe.write_text(f"data:\n  items: {items}untested: 'users.tsv:withheld_last'}}\n")
    prepared = task.folder / "prepared"
    command("prepare", source, "-o", prepared, "--recipe", recipe)
    return recommended(task, prepared)


def goods(task: Task, name: str) -> Figures:
    """Amazon reviews, ids alone."""
    source = task.folder / name
    with zipfile.ZipFile(task.data / "amazon" / "s3rec_beauty_sports_toys.zip") as archive:
        source.write_bytes(archive.read(name))
    return recommended(task, source)


# --- texts ------------------------------------------------------------------------------------------------------


def shakespeare(task: Task) -> Figures:
    """Tiny Shakespeare: the first nine tenths are given, the last tenth is predicted, in nats a character."""
    text = (task.data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    border = int(0.9 * len(text))
    source = task.folder / "shakespeare.txt"
    source.write_text(text[:border], encoding="utf-8")
    task.train(source)
    return continued(task, text[:border], [text[border:]])


def poetry(task: Task) -> Figures:
    """Chinese poems: those of test, in nats a character and bits."""
    with gzip.open(task.data / "text" / "chinese_poetry.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    poems = {split: ["\n".join(row["lines"]) for row in rows if row["split"] == split] for split in ("train", "test")}
    source = task.folder / "poems.csv"
    write_csv(source, ("text",), ([poem] for poem in poems["train"]))
    task.train(source, "--task", "language")
    return continued(task, "\n".join(poems["train"]), poems["test"])


def continued(task: Task, past: str, texts: list[str]) -> Figures:
    """Nats a character of texts, beside an n-gram model of bytes that learnt the same text. Tokens are summed over, and
    their texts are the characters to the last one, so that nats of tokens are nats of characters."""
    from plait.evaluation.alternatives import GramModel
    from plait.evaluation.language import text_nats

    model = plait.load(task.run).plait_model
    assert model is not None
    nats = sum(text_nats(model, "text", text) for text in texts)
    characters = sum(map(len, texts))
    grams = GramModel(past.encode())
    simple = sum(grams.nats(text.encode()) for text in texts)
    value = nats / characters
    return {"value": value, "simple": simple / characters, "n": characters, "bits": value / math.log(2)}


# --- search -----------------------------------------------------------------------------------------------------


def captioned(data: Path) -> list[dict[str, Any]]:
    with gzip.open(data / "flickr8k" / "captions.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_photos(data: Path, folder: Path, rows: list[dict[str, Any]], caption: bool) -> None:
    """Photos, and beside them a table with the first caption of each where it is wanted."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(data / "flickr8k" / "images_128.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        for row in rows:
            (folder / Path(row["file"]).name).write_bytes(archive.read(inside[Path(row["file"]).name]))
    if caption:
        table = ((Path(row["file"]).name, row["en"][0]) for row in rows)
        write_csv(folder / "metadata.csv", ("file_name", "caption"), table)


def search(task: Task) -> Figures:
    """1,500 captioned photos; a second caption of 200 of them is the query: R@10 of their photo."""
    rows = random.Random(0).sample([row for row in captioned(task.data) if row["split"] == "train"], 1500)
    queries = [(row["en"][1], Path(row["file"]).name) for row in rows[:200]]
    write_photos(task.data, task.folder / "photos", rows, caption=True)
    task.train(task.folder / "photos")
    found = {}
    with_words = plait.Index(task.folder / "words.index", task.run)
    with_words.add([str(task.folder / "photos")])
    for way in ("hybrid", "words", "vector"):
        found[way] = [hit(with_words.search(query, 10, by=way), name) for query, name in queries]
    write_photos(task.data, task.folder / "bare", rows, caption=False)
    bare = plait.Index(task.folder / "bare.index", task.run)
    bare.add([str(task.folder / "bare")])
    found["without captions"] = [hit(bare.search(query, 10), name) for query, name in queries]
    difference = np.array(found["hybrid"], float) - np.array(found["words"], float)
    return {
        "value": float(np.mean(found["hybrid"])), "simple": float(np.mean(found["words"])), "n": len(queries),
        "lead_stderr": float(difference.std(ddof=1) / math.sqrt(len(queries))), "chance": 10 / len(rows),
        **{name: float(np.mean(hits)) for name, hits in found.items()},
        "without captions stderr": float(np.std(found["without captions"]) / math.sqrt(len(queries))),
    }  # fmt: skip


def hit(hits: list[Any], name: str) -> bool:
    """Whether the photo of this name is among what was found."""
    return any(name in one.source for one in hits)


def flickr8k(task: Task) -> Figures:
    """Captions in two languages and their photos: R@10 of either by the other among the 1,000 of test."""
    folder = task.folder / "photos"
    folder.mkdir()
    shutil.copy(task.data / "flickr8k" / "images_128.zip", folder)
    (folder / "captions.jsonl").write_bytes(
        gzip.decompress((task.data / "flickr8k" / "captions.jsonl.gz").read_bytes())
    )
    task.train(folder, "--recipe", "flickr8k")
    model = plait.load(task.run)
    rows = [row for row in captioned(task.data) if row["split"] == "test"]
    with zipfile.ZipFile(folder / "images_128.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        pixels = [archive.read(inside[Path(row["file"]).name]) for row in rows]
    seen = np.concatenate([model.embed(pixels[at : at + 100]) for at in range(0, len(pixels), 100)])
    found: Figures = {"n": len(rows), "chance": 10 / len(rows)}
    for language in ("en", "zh"):
        owner = np.repeat(np.arange(len(rows)), [len(row[language]) for row in rows])
        near = seen @ model.embed([text for row in rows for text in row[language]]).T
        found[f"{language} caption to photo"] = float(((near > near[owner, np.arange(len(owner))]).sum(0) < 10).mean())
        best = np.argpartition(-near, 9, axis=1)[:, :10]
        found[f"{language} photo to caption"] = float((owner[best] == np.arange(len(rows))[:, None]).any(1).mean())
    return {"value": found["en caption to photo"], **found}


# --- the table --------------------------------------------------------------------------------------------------

GOODS = {"beauty": "Beauty.txt", "sports": "Sports_and_Outdoors.txt", "toys": "Toys_and_Games.txt"}
ROWS = {
    "photos": Row(photos, 90),
    **{f"digits-{name}": Row(functools.partial(digits, speaker=name), 60) for name in SPEAKERS},
    "fashion": Row(fashion, 240),
    "banking77": Row(banking, 240),
    "banking77-5": Row(functools.partial(banking, examples=5), 240),
    "clinc150": Row(clinc, 240),
    "goemotions": Row(emotions, 240),
    "intents": Row(functools.partial(synthetic, name="intents"), 60),
    "feelings": Row(functools.partial(synthetic, name="feelings"), 60),
    "feelings-5": Row(functools.partial(synthetic, name="feelings", examples=5), 60),
    "feelings-1": Row(functools.partial(synthetic, name="feelings", examples=1), 60),
    "ml100k": Row(films, 150),
    "ml1m": Row(many_films, 3600),
    **{name: Row(functools.partial(goods, name=file), 3600) for name, file in GOODS.items()},
    "shakespeare": Row(shakespeare, 360),
    "poetry": Row(poetry, 360),
    "cifar10": Row(cifar10, 2400),
    **{f"esc10-{fold}": Row(functools.partial(environment, fold=fold), 600) for fold in range(1, 6)},
    "search": Row(search, 240),
    "flickr8k": Row(flickr8k, 3600),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--data", type=Path, help="the folder with the public sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="processor seconds of training, in place of the row's own")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--list", action="store_true", help="show the rows with their seconds")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:18} {row.seconds:5.0f} s" for name, row in ROWS.items()))
        return
    if options.row is None or options.data is None:
        parser.error("name a ROW, and with --data the folder of the public sets")
    row = ROWS[options.row]
    key = {"row": options.row, "seed": options.seed, "seconds": options.seconds or row.seconds}
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if any(all(line.get(name) == value for name, value in key.items()) for line in done):
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        found = row.measure(Task(options.data.resolve(), Path(folder), options.seed, key["seconds"]))
    level = isa.level()
    line = {
        **key, **found, "whole": round(time.process_time() - begun, 1), "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(), "instructions": level.name if level else "none",
    }  # fmt: skip
    with options.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line)


if __name__ == "__main__":
    main()
