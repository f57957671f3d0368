"""What a text is like, in a few hundred bytes that survive small changes. Media have theirs in their modality's file.

Light, since it runs in the processes that check records: numpy, and nothing of the rest of Plait.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import numpy as np

PERMUTATIONS = 128
_SHINGLE, _TEXT = 5, 1 << 16  # characters


@lru_cache(maxsize=1)
def _lenders() -> np.ndarray:
    """(PERMUTATIONS, PERMUTATIONS): for each bin the order in which it asks the others for a value."""
    rng = np.random.Generator(np.random.PCG64(1997))
    return np.stack([rng.permutation(PERMUTATIONS) for _ in range(PERMUTATIONS)])


def plain(text: str) -> str:
    """The text without what a copy may change: case, encoding of accents, punctuation, spaces."""
    text = text[:_TEXT]
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def text_print(text: str) -> bytes:
    """A sketch of a text's runs of five characters, 128 x uint32: the share of places in which two sketches agree
    estimates the share of runs that two texts have in common. Empty where the text is too short.

    One hash function throws all runs into 128 bins, of each of which the least is kept (Li, Owen and Zhang, 2012); an
    empty bin borrows from another, in an order of its own (Shrivastava, 2017).
    """
    codes = np.frombuffer(plain(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < 4 * _SHINGLE:
        return b""
    with np.errstate(over="ignore"):
        runs = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
        for n in range(_SHINGLE):
            runs = (runs ^ codes[n : n + len(runs)]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
    hashes = np.sort((runs >> np.uint64(32)).astype(np.uint32))
    borders = np.arange(PERMUTATIONS + 1, dtype=np.uint64) * ((1 << 32) // PERMUTATIONS)
    first = np.searchsorted(hashes, borders)
    filled = first[1:] > first[:-1]
    least = hashes[np.minimum(first[:-1], len(hashes) - 1)]
    empty = np.flatnonzero(~filled)
    if len(empty):
        lenders = _lenders()[empty]
        least[empty] = least[lenders[np.arange(len(empty)), filled[lenders].argmax(1)]]
    return least.tobytes()
