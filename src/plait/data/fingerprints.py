"""What a text is like, in a few hundred bytes that survive small changes. Media have theirs in their modality's file.

Light, since it runs in the processes that check records: numpy, and nothing of the rest of Plait.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np

PERMUTATIONS = 128
_SHINGLE, _TEXT = 5, 1 << 16  # characters


@lru_cache(maxsize=1)
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    factors, offsets = np.random.Generator(np.random.PCG64(1997)).integers(0, 1 << 32, (2, PERMUTATIONS, 1), np.uint32)
    return factors | np.uint32(1), offsets


def plain(text: str) -> str:
    """The text without what a copy may change: case, encoding of accents, punctuation, spaces."""
    text = unicodedata.normalize("NFKC", text[:_TEXT]).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def text_print(text: str) -> bytes:
    """MinHash (Broder, 1997) of a text's runs of five characters: 128 x uint32. Empty where that is too short."""
    codes = np.frombuffer(plain(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < 4 * _SHINGLE:
        return b""
    with np.errstate(over="ignore"):
        runs = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
        for n in range(_SHINGLE):
            runs = (runs ^ codes[n : n + len(runs)]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
        hashes = (runs >> np.uint64(32)).astype(np.uint32)
        factors, offsets = _permutations()
        least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
        for start in range(0, len(hashes), 256):
            least = np.minimum(least, (hashes[start : start + 256] * factors + offsets).min(1))
    return least.tobytes()
