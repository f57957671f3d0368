"""What to expect of a classifier before it is trained: what the default command had on public data of the same kind.

Every line was measured on the processor's clock, one thread, `PLAIT_ISA=avx2`, on records that training and choice
never saw: `python bench/quality.py ROW --data DATA --seed SEED [--seconds SECONDS]`. See docs/benchmarks/quality.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measured:
    """The share of right answers on one public set.

    Attributes:
        kind: What was read: "text", or a modality.
        records, labels: How many the model learnt from.
        seconds: What it was given.
        accuracy, simple: Of the run, and of its linear part alone.
        what: The data, for people.
        row: The row of bench/quality.py, with its seeds.
    """

    kind: str
    records: int
    labels: int
    seconds: float
    accuracy: float
    simple: float
    what: str
    row: str


TABLE = (
    Measured("image", 1000, 9, 90, 0.601, 0.542, "1,000 small photos of 9 things", "photos --seed 1"),
    Measured("image", 59_000, 10, 480, 0.911, 0.866, "59,000 images of 10 kinds of clothes", "fashion --seconds 480"),
    Measured("audio", 1200, 10, 60, 0.859, 0.806, "1,200 spoken digits, new speakers", "digits-*: the mean of five"),
    Measured("text", 10_003, 77, 240, 0.911, 0.911, "10,003 questions of 77 intents", "banking77"),
    Measured("text", 39_555, 7, 240, 0.661, 0.652, "39,555 comments of 7 feelings", "goemotions --seed 1"),
    Measured("text", 5, 5, 10, 0.307, 0.307, "5 sentences, one for each of 5 feelings", "feelings-1 --seconds 10"),
)
FAR = 4.0  # times as many records a label, or as few, from which a figure is said to be of much more or less


@dataclass(frozen=True)
class Expected:
    """The measured set that is most like some data.

    Attributes:
        measured: What was had there.
        ratio: How many times as many records of each label these data have.
    """

    measured: Measured
    ratio: float

    @property
    def amount(self) -> Literal["fewer", "alike", "more"]:
        """Whether these data have far fewer or far more records of each label."""
        return "fewer" if self.ratio < 1 / FAR else "more" if self.ratio > FAR else "alike"


def expected(kind: str, records: int, labels: int) -> Expected | None:
    """The measured set that is most like these data; None where none of this kind was measured.

    Args:
        kind: What is read: "text", or a modality.
        records: Training records that have a label.
        labels: Different ones among them.
    """
    same = [one for one in TABLE if one.kind == kind]
    if not same or not records or not labels:
        return None

    def distance(one: Measured) -> float:
        each = math.log(one.records / one.labels) - math.log(records / labels)
        return abs(each) + abs(math.log(one.labels) - math.log(labels))

    near = min(same, key=distance)
    return Expected(near, (records / labels) / (near.records / near.labels))


def expectation(kind: str, records: int, labels: int) -> str | None:
    """A line for the console about the measured set that is most like these data; the arguments are those of
    `expected`."""
    found = expected(kind, records, labels)
    if found is None:
        return None
    near = found.measured
    other = {"fewer": " You have far fewer of each label: expect less.",
             "more": " You have far more of each label: expect more.", "alike": ""}[found.amount]  # fmt: skip
    return (
        f"To expect: {near.what} gave {near.accuracy:.0%} right after {near.seconds:.0f} s (a linear model "
        f"{near.simple:.0%}); yours may be easier or harder.{other}"
    )
