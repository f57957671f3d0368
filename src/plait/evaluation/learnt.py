"""Whether a run that writes texts has learnt anything, said at its end: beside how often each token stands alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from plait.data.dataset import Dataset
from plait.modalities.text import Text

MOST = 2000  # texts of a split that tokens are counted in
OBJECTIVE = "loss/text"


def describe_texts(run: Path, dataset: Dataset) -> str | None:
    """A line where the loss on val, or on train where val is too small to validate on, is no better than that of a
    unigram model of train's tokens on the same split; None where it is."""
    tokenizer = run / "tokenizer.json"
    measured = next((found for split in ("val", "train") if (found := _last_loss(run, split)) is not None), None)
    if measured is None or not tokenizer.is_file():
        return None
    split, last = measured
    plain = _unigram_nats(Text.load(tokenizer), dataset, split)
    if plain is None or last < plain:
        return None
    return (
        f"Nothing was learnt: {last:.2f} nats a token on {split}, where how often each token stands alone has "
        f"{plain:.2f}. Train longer (--minutes), or give more text."
    )


def _last_loss(run: Path, split: str) -> tuple[str, float] | None:
    """The split, and its newest loss of texts."""
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    losses = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut
            continue
        if row["split"] == split and OBJECTIVE in row:
            losses.append(row[OBJECTIVE])
    return (split, float(losses[-1])) if losses else None


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
