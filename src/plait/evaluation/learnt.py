"""Whether a run that writes texts has learnt anything: beside how often each token stands alone; or has learnt the
texts of train by heart, and little else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.data.dataset import Dataset
from plait.modalities.text import Text

MOST = 2000  # texts of a split that tokens are counted in
OBJECTIVE = "loss/text"
FAR, LEAST = 2.0, 1.0  # by heart: val is so many times train, and so many nats a token above it


@dataclass(frozen=True)
class ByHeart:
    """A run that learnt the texts of train by heart: its losses at the end, in nats a token.

    Attributes:
        train: Of the steps since the validation before the last.
        val: Of the last validation.
        pretrained: Whether it began from a pretrained model.
    """

    train: float
    val: float
    pretrained: bool = False

    def __str__(self) -> str:
        return (
            f"The texts of train were learnt by heart: {self.train:.2f} nats a token on them at the end, "
            f"{self.val:.2f} on val."
        )

    @property
    def advice(self) -> str:
        """What to do now: it is not to train longer."""
        base = "" if self.pretrained else ", or begin from a pretrained model (--init-from)"
        return f"there is too little text to learn from, and longer training makes it worse: give more text{base}."


def by_heart(run: Path, pretrained: bool = False) -> ByHeart | None:
    """What a run learnt by heart; None where val is not far above train, or one of them was not measured."""
    train, val = _losses(run, "train"), _losses(run, "val")
    if not val:
        return None
    end = val[-1].step
    before = max((loss.step for loss in val if loss.step < end), default=-1)
    recent = [loss.nats for loss in train if before < loss.step <= end]
    if not recent:
        return None
    found = ByHeart(float(np.mean(recent)), val[-1].nats, pretrained)
    return found if found.val > FAR * found.train and found.val - found.train > LEAST else None


def describe_texts(run: Path, dataset: Dataset) -> str | None:
    """A line where the texts of train were learnt by heart, or where the loss on val, or on train where val is too
    small to validate on, is no better than that of a unigram model of train's tokens on the same split; None else."""
    if (memorised := by_heart(run)) is not None:
        return f"{memorised} {memorised.advice[0].upper()}{memorised.advice[1:]}"
    tokenizer = run / "tokenizer.json"
    measured = next((split for split in ("val", "train") if _losses(run, split)), None)
    if measured is None or not tokenizer.is_file():
        return None
    last = _losses(run, measured)[-1].nats
    plain = _unigram_nats(Text.load(tokenizer), dataset, measured)
    if plain is None or last < plain:
        return None
    return (
        f"Nothing was learnt: {last:.2f} nats a token on {measured}, where how often each token stands alone has "
        f"{plain:.2f}. Train longer (--minutes), or give more text."
    )


@dataclass(frozen=True)
class _Loss:
    """A loss of texts in a run's log."""

    step: int
    nats: float


def _losses(run: Path, split: str) -> list[_Loss]:
    """The losses of texts on a split, oldest first."""
    log = run / "log.jsonl"
    if not log.is_file():
        return []
    losses = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut
            continue
        if row["split"] == split and OBJECTIVE in row:
            losses.append(_Loss(int(row["step"]), float(row[OBJECTIVE])))
    return losses


def _unigram_nats(text: Text, dataset: Dataset, split: str) -> float | None:
    """-log P of a token of a split by the counts of train, one added to each; None where either has no text."""
    train, held_out = _counts(text, dataset, "train"), _counts(text, dataset, split)
    if not train.sum() or not held_out.sum():
        return None
    chances = (train + 1) / (train + 1).sum()
    return float(-(held_out * np.log(chances)).sum() / held_out.sum())


def _counts(text: Text, dataset: Dataset, split: str) -> np.ndarray:
    """How often each token stands in texts of a split (V,), of columns that hold no conversations."""
    counts = np.zeros(text.size)
    indices = dataset.indices(split)
    indices = indices[:: max(math.ceil(len(indices) / MOST), 1)]
    for column, kind in dataset.columns.items():
        if kind != "text" or column in dataset.manifest.chats:
            continue
        for values in dataset.cells(column, indices):
            for value in values.to_pylist():
                if value is not None:
                    np.add.at(counts, text.encode(value), 1)
    return counts
