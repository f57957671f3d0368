"""What to expect of a model before it is trained: what the default command had on public data of the same kind, at
several budgets.

Every figure was measured on the processor's clock, one thread, `PLAIT_ISA=avx2`, on records that training and choice
never saw: `python bench/quality.py ROW --data DATA --seed SEED --seconds SECONDS`. See docs/benchmarks/quality.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Point:
    """What was had after so many seconds; `row` is that of bench/quality.py, with its seed."""

    seconds: float
    value: float
    row: str


@dataclass(frozen=True)
class Measured:
    """What was had on one public set.

    Attributes:
        kind: What was read: "text" or a modality with labels; else the task.
        records, labels: How many the model learnt from; of tasks without labels, 1.
        simple: What the simple alternative has.
        what: The data, for people.
        points: What the run had, by budget, the shortest first.
        figure: The share of right answers; nats a character, of which fewer are better; or another share, named.
    """

    kind: str
    records: int
    labels: int
    simple: float
    what: str
    points: tuple[Point, ...]
    figure: str = "right"

    @property
    def seconds(self) -> float:
        """The longest budget that was measured."""
        return self.points[-1].seconds

    @property
    def accuracy(self) -> float:
        """What was had with it."""
        return self.points[-1].value

    def shown(self, value: float) -> str:
        """A figure for people."""
        if self.figure == "nats":
            return f"{value:.2f} nats a character"
        return f"{value:.0%} {self.figure}"


TABLE = (
    Measured(
        "image", 1000, 9, 0.542, "1,000 small photos of 9 things",
        (
            Point(20, 0.581, "photos --seed 0"),
            Point(90, 0.611, "photos, the mean of seeds 0 and 1"),
            Point(240, 0.629, "photos --seed 0"),
        ),
    ),
    Measured(
        "image", 59_000, 10, 0.866, "59,000 images of 10 kinds of clothes", (Point(480, 0.911, "fashion --seed 0"),)
    ),
    Measured(
        "audio", 1200, 10, 0.799, "1,200 spoken digits, new speakers", (Point(60, 0.866, "digits-*: the mean of five"),)
    ),
    Measured(
        "audio", 320, 10, 0.838, "320 recordings of 10 kinds of sounds", (Point(600, 0.85, "esc10-1 --seed 0"),)
    ),
    Measured("text", 10_003, 77, 0.911, "10,003 questions of 77 intents", (Point(240, 0.911, "banking77 --seed 0"),)),
    Measured("text", 39_555, 7, 0.652, "39,555 comments of 7 feelings", (Point(240, 0.661, "goemotions --seed 1"),)),
    Measured("text", 5, 5, 0.307, "5 sentences, one of each of 5 feelings", (Point(10, 0.307, "feelings-1 --seed 0"),)),
    Measured(
        "language", 1_000_000, 1, 1.779, "a million characters of plays",
        (Point(60, 1.839, "shakespeare --seed 0"), Point(360, 1.684, "shakespeare --seed 0")), "nats",
    ),
)  # fmt: skip
SHORT = 0.6  # of the shortest budget that was measured, below which less is to be expected
NEAR = 1.3  # times a budget, up to which another one counts as reached
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


def expectation(kind: str, records: int, labels: int, seconds: float | None = None) -> str | None:
    """A line for the console about the measured set that is most like these data.

    Args:
        kind, records, labels: As of `expected`.
        seconds: What the run is given; None where that is not known.
    """
    found = expected(kind, records, labels)
    if found is None:
        return None
    line = describe_expected(found.measured, seconds)
    if found.measured.figure != "right":
        return line
    return line + {"fewer": " You have far fewer of each label: expect less.",
                   "more": " You have far more of each label: expect more.", "alike": ""}[found.amount]  # fmt: skip


def describe_expected(near: Measured, seconds: float | None) -> str:
    """What was had on a public set in the time that a run is given, and what a longer time gave there."""
    points = near.points
    reached = [point for point in points if seconds is None or point.seconds <= NEAR * seconds]
    point = reached[-1] if reached else points[0]
    line = (
        f"To expect: {near.what} gave {near.shown(point.value)} after {_duration(point.seconds)} (the simple "
        f"alternative {near.shown(near.simple)}); yours may be easier or harder."
    )
    if seconds is not None and seconds < SHORT * points[0].seconds:
        line += f" {_duration(seconds)} are less: expect less, or give more (--minutes)."
    if point is not points[-1]:
        line += f" {_duration(points[-1].seconds)} gave {near.shown(points[-1].value)} there."
    return line


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.3g} minutes"
