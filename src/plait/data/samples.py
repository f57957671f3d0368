"""Samples on disk: arrays made once from a data set's media, memory-mapped and read at random while training.

Knows arrays, not what they mean: the function that turns a file's bytes into a sample comes from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


class Samples:
    """Arrays that share all dimensions but the first, back to back in one file; `samples[i]` is a view of one."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat, self.offsets = flat, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def write(cls, path: Path, arrays: Iterable[np.ndarray]) -> Samples:
        """Store the arrays under `path` (two .npy files) in bounded memory, and map them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        offsets, shape, dtype = [0], None, None
        raw = path.with_suffix(".raw")
        with raw.open("wb") as file:
            for array in arrays:
                if shape is None:
                    shape, dtype = array.shape[1:], array.dtype
                offsets.append(offsets[-1] + len(array))
                file.write(np.ascontiguousarray(array).tobytes())
        np.save(path.with_suffix(".offsets.npy"), np.array(offsets))
        if shape is None or dtype is None or offsets[-1] == 0:
            raw.unlink()
            return cls(np.zeros((0, *(shape or ())), dtype or np.uint8), np.array(offsets))
        return cls(np.memmap(raw, dtype, "r", shape=(offsets[-1], *shape)), np.array(offsets))
