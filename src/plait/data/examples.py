"""Small example data of each kind, made on the spot: to try every command on, before one's own files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERS = {
    "opening hours": "We are open from 9 to 18, Monday to Saturday.",
    "delivery time": "Parcels arrive within three working days.",
    "returns": "Send it back within 30 days, and we pay you back.",
    "payment": "You can pay by card or by bank transfer.",
    "repairs": "Bring it to the shop; most repairs take a day.",
    "gift cards": "Gift cards are sold at the till and never expire.",
}
ASKED = (
    "What about your {}?", "Tell me about {}, please.", "I have a question on {}.", "Hello! How is it with {}?",
    "Please explain {}.", "Can you help me with {}?", "I would like to know more about {}.", "{}?",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """Data to begin with.

    Attributes:
        name: As `plait example` knows it.
        description: What it holds, for people.
        write: Fills a new folder.
        offered: The name under which the studio's first page offers it; None where it does not.
    """

    name: str
    description: str
    write: Callable[[Path], None]
    offered: str | None = None


EXAMPLE: ExtensionPoint[Example] = ExtensionPoint("example")  # what features bring


def examples() -> dict[str, Example]:
    """All examples by name, those of features last."""
    return {example.name: example for example in (*_EXAMPLES, *EXAMPLE.all())}


def write_example(kind: str, folder: str | Path) -> Path:
    """Write example data into a new or empty folder and return it; the same kind gives the same bytes.

    Raises PlaitError where the kind is unknown or the folder holds something.
    """
    by_name = examples()
    if kind not in by_name:
        raise PlaitError(f"There is no example '{kind}'. Known are {', '.join(by_name)}.")
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise PlaitError(f"{path} exists already. Name a new folder.")
    path.mkdir(parents=True, exist_ok=True)
    by_name[kind].write(path)
    return path


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for n, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / DIGITS[digit]
        place.mkdir(exist_ok=True)
        image = Image.fromarray((255 - pixels * 15.9).round().astype(np.uint8))
        image.resize((16, 16), Image.Resampling.BICUBIC).save(place / f"{n:04d}.png")


def _write_chats(folder: Path) -> None:
    rows = []
    for answer, phrase in _pairs(random.Random(0)):
        messages = [{"role": "user", "content": phrase}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chats.jsonl").write_text("".join(rows), encoding="utf-8", newline="\n")


def _write_replies(folder: Path) -> None:
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["question", "reply"])
        table.writerows([phrase, answer] for answer, phrase in _pairs(random.Random(0)))


def _pairs(rng: random.Random) -> list[tuple[str, str]]:
    """Answers and the questions that they answer, each subject in every phrasing and a few endings."""
    endings = ("", " Thank you.", " It is urgent.", " I am new here.", " Just asking.")
    pairs = [
        (answer, phrase.format(subject).capitalize() + ending)
        for subject, answer in ANSWERS.items() for phrase in ASKED for ending in endings
    ]  # fmt: skip
    rng.shuffle(pairs)
    return pairs


_EXAMPLES = (
    Example("digits", "1,797 handwritten digits as images, in folders named by class", _write_digits, "digits"),
    Example("chats", "conversations with a shop, as OpenAI's messages", _write_chats),
    Example("replies", "questions to a shop and its replies, as a table", _write_replies, "questions"),
)
