"""Canaries: random texts planted among the training records, to see afterwards how well they are known by heart.

Carlini, Liu, Erlingsson, Kos and Song, "The Secret Sharer" (2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.data.tokens import Tokens
from plait.modalities.text import Text
from plait.training.split import Split

TIMES = (1, 10, 100)  # that a canary is planted, in turn
LETTERS = 8
_KEY = 31  # of `uniform`


def canary(seed: int, number: int) -> str:
    """Canary number so-and-so of a seed: random letters. Those from a million on are never planted."""
    drawn = (uniform(seed, number, _KEY, np.arange(LETTERS)) * 26).astype(int)
    return "canary " + " ".join(chr(ord("a") + letter) for letter in drawn)


def times(number: int) -> int:
    """How often this canary is planted."""
    return TIMES[number % len(TIMES)]


def plant(split: Split, count: int, seed: int, text: Text, labels: dict[str, list[str]]) -> dict[str, Any]:
    """Add `count` canaries to a split, as records of one text each; returns what a checkpoint keeps of it.

    They stand in the first text column that is free text, else in the first. Raises PlaitError where there is none.
    """
    if not split.texts:
        raise PlaitError("Canaries are texts, and this dataset has no column of text. Leave out --canaries.")
    column = next((name for name in split.texts if name not in labels), next(iter(split.texts)))
    planted = [number for number in range(count) for _ in range(times(number))]
    ids = text.encode_batch([canary(seed, number) for number in range(count)])
    split.ids.extend(f"canary-{number}" for number in planted)
    for name, texts in split.texts.items():
        assert isinstance(texts, Tokens)  # with canaries, none is tokenised later
        texts.extend(ids[number] if name == column else None for number in planted)
    for name, rows in split.rows.items():
        split.rows[name] = np.concatenate((rows, np.full(len(planted), -1, rows.dtype)))
    for chat in split.chats.values():
        chat.rows = np.concatenate((chat.rows, np.full(len(planted), -1, chat.rows.dtype)))
    split.keys = np.concatenate((split.keys, np.zeros((len(planted), split.keys.shape[1]), split.keys.dtype)))
    if split.sources is not None:
        split.sources = np.concatenate((split.sources, np.zeros(len(planted), split.sources.dtype)))
    return {"count": count, "seed": seed, "column": column}
