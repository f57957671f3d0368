"""Random numbers as a function of integer keys, so that order and augmentation can be repeated."""

from __future__ import annotations

import hashlib

import numpy as np

_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that are a function of the keys alone: integers or integer arrays that broadcast.

    `uniform(seed, epoch, ids, np.arange(4)[:, None])` draws 4 numbers a record, the same whatever batch they are in.
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.int64).view(np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def key_of(text: str) -> int:
    """A stable 63-bit integer for a string, to be used as a key of `uniform` or to split by hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
