"""What an evaluation finds: figures, and what people look at beside them. Reports show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, auto

import numpy as np

from plait.evaluation.outcome import Outcome


@dataclass
class ReportItem:
    """One thing to look at or listen to, with what lies next to it (a drawn image's nearest training image)."""

    caption: str = ""
    image: bytes | None = None  # PNG
    audio: bytes | None = None  # WAV
    text: str | None = None
    right: bool | None = None  # framed green or red
    beside: ReportItem | None = None


class GalleryKind(IntEnum):
    """What a gallery shows, in the order in which a report has them."""

    MADE = auto()
    WRITTEN = auto()
    MEMORISED = auto()
    MISTAKES = auto()
    RIGHT = auto()
    RETRIEVAL = auto()
    CODEC = auto()
    OTHER = auto()


@dataclass
class Gallery:
    """Rows of items: a label and what was made for it, a query and what it found."""

    title: str
    note: str
    rows: list[tuple[ReportItem, list[ReportItem]]]
    kind: GalleryKind = GalleryKind.OTHER


@dataclass
class Confusion:
    """Counts (C, C) of truth by prediction."""

    title: str
    labels: list[str]
    counts: np.ndarray
    f1: np.ndarray | None = None  # (C,)


@dataclass(frozen=True)
class Reliability:
    """How often what is believed with some probability is right: bins by that probability."""

    title: str
    error: float  # expected calibration error
    believed: np.ndarray  # (bins,) mean probability, nan where a bin is empty
    right: np.ndarray  # (bins,) share that is right
    counts: np.ndarray  # (bins,)
    coverage: np.ndarray  # (N,) share of the answers that is given, the surest first
    accuracy: np.ndarray  # (N,) share of these that is right


@dataclass(frozen=True)
class Verdict:
    """What an evaluation comes to, as the report opens with it.

    Attributes:
        sentence: the figure that matters beside that of the simple alternative, and which of the two to take.
        next_step: what to do now; a command where there is one.
        better: whether the model is worth having; None where the data do not tell.
        learnt: whether it is clearly better than guessing.
    """

    sentence: str
    next_step: str = ""
    better: bool | None = None
    learnt: bool = True

    def __str__(self) -> str:
        return f"{self.sentence} Next: {self.next_step}" if self.next_step else self.sentence


@dataclass
class Findings:
    """What an evaluation found beside its figures."""

    confusions: list[Confusion] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reliabilities: list[Reliability] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)  # what the verdict rests on, what the run is for first
    verdict: Verdict | None = None
