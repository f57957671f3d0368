"""Samples on disk: arrays made once from a data set's media, memory-mapped and read at random while training.

Knows arrays, not what they mean: the function that turns a file's bytes into a sample comes from outside.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json


class Samples:
    """Arrays that share all dimensions but the first, back to back in one file; `samples[i]` is a view of one."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat, self.offsets = flat, offsets
        self._longest: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """The number of the first of the longest."""
        if self._longest is None:
            self._longest = int(self.lengths.argmax())
        return self._longest

    @classmethod
    def write(cls, path: Path, arrays: Iterable[np.ndarray]) -> Samples:
        """Store the arrays under `path` in bounded memory, and map them. The .json comes last: with it all is whole.

        Raises PlaitError where they cannot be written.
        """
        facts, raw, places = _files(path)
        offsets, shape, dtype = array("q", [0]), (), np.dtype(np.uint8)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts.unlink(missing_ok=True)
            with raw.open("wb") as file:
                for values in arrays:
                    if len(offsets) == 1:
                        shape, dtype = values.shape[1:], values.dtype
                    offsets.append(offsets[-1] + len(values))
                    file.write(np.ascontiguousarray(values).tobytes())
                file.flush()
                os.fsync(file.fileno())
            with places.open("wb") as file:
                np.save(file, np.frombuffer(offsets, np.int64))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PlaitError(f"Cannot write {raw}: {error.strerror or error}. Free space, then go on.") from error
        write_json(facts, {"shape": list(shape), "dtype": dtype.str})
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Samples:
        """Map what `write` stored. Raises PlaitError naming the file that is missing or cut."""
        facts, raw, places = _files(path)
        sample_facts = read_json(facts)
        try:
            offsets = mapped(places)
            shape, dtype = (int(offsets[-1]), *sample_facts["shape"]), np.dtype(sample_facts["dtype"])
            if not offsets[-1]:  # nothing cannot be mapped
                return cls(np.zeros(shape, dtype), offsets)
            return cls(np.memmap(raw, dtype, "r", shape=shape), offsets)
        except (OSError, ValueError) as error:
            raise PlaitError(f"{raw} is damaged ({error}). Delete {path.parent}; it is made again.") from error


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped: its pages are the file's, which the system takes back when it likes. Raises
    OSError or ValueError where it is missing or cut."""
    array = np.load(path, mmap_mode="r")
    return np.asarray(array)  # without the slower indexing of a memmap


def _files(path: Path) -> tuple[Path, Path, Path]:
    """Facts, values and offsets; a column's name may hold dots."""
    facts, raw, places = (path.with_name(path.name + end) for end in (".json", ".raw", ".offsets.npy"))
    return facts, raw, places
