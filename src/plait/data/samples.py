"""Samples on disk: arrays made once from a data set's media, memory-mapped and read at random while training.

Knows arrays, not what they mean: the function that turns a file's bytes into a sample comes from outside.
"""

from __future__ import annotations

import math
import os
from array import array as NumberArray
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

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
        left = iter(arrays)
        first = next(left, None)
        shape, dtype = ((), np.dtype(np.uint8)) if first is None else (first.shape[1:], first.dtype)
        with SampleWriter(path, shape, dtype) as writer:
            for values in left if first is None else chain([first], left):
                writer.add(values)
            writer.finish()
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
            return cls(_mapped_values(raw, dtype, math.prod(shape)).reshape(shape), offsets)
        except (OSError, ValueError) as error:
            raise PlaitError(f"{raw} is damaged ({error}). Delete {path.parent}; it is made again.") from error


class SampleWriter:
    """Writes arrays back to back, as `Samples.open` reads them. What `keep` was called for is there again for the next
    writer of the same key, if this one is stopped before it `finish`es; `len` is how many arrays there are."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], key: str = "") -> None:
        """`shape` and `dtype` are those of an array's rows. Raises PlaitError where nothing can be written."""
        self.shape, self.dtype, self.key = shape, dtype, key
        self.facts, self.raw, self.places = _files(path)
        self.part, self.part_places = (path.with_name(path.name + end) for end in (".part.json", ".offsets.part"))
        self.row_bytes = dtype.itemsize * math.prod(shape)
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.facts.unlink(missing_ok=True)
            self.offsets = self._kept() if key else NumberArray("q", [0])
            again = len(self.offsets) > 1
            if not again:  # what another key kept is of a file that begins anew here
                self.part.unlink(missing_ok=True)
            self.file = self.raw.open("r+b" if again else "wb")
            self.kept = len(self.offsets) if again else 0  # offsets that are in the file of parts
            if again:
                self.file.truncate(self.total * self.row_bytes)
                self.file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            with self._told():
                self.file.close()
            return
        with suppress(OSError):  # what is under way says why
            self.file.close()

    @property
    def total(self) -> int:
        """Rows of all arrays."""
        return self.offsets[-1]

    def add(self, values: np.ndarray) -> None:
        """Append an array. Raises PlaitError where it cannot be written."""
        with self._told():
            self.file.write(np.ascontiguousarray(values).tobytes())
        self.offsets.append(self.offsets[-1] + len(values))

    def keep(self) -> None:
        """Bring what is there to the disk, for a writer that goes on from here."""
        with self._told():
            self._sync(self.file)
            with self.part_places.open("r+b" if self.kept else "wb") as file:
                file.seek(8 * self.kept)
                file.write(np.frombuffer(self.offsets, np.int64)[self.kept :].tobytes())
                self._sync(file)
            self.kept = len(self.offsets)
            write_json(self.part, {"key": self.key, "offsets": self.kept})

    def finish(self) -> None:
        """All is there. The .json comes last: with it all is whole."""
        with self._told():
            self._sync(self.file)
            with self.places.open("wb") as file:
                np.save(file, np.frombuffer(self.offsets, np.int64))
                self._sync(file)
            write_json(self.facts, {"shape": list(self.shape), "dtype": self.dtype.str})
            self.part.unlink(missing_ok=True)
            self.part_places.unlink(missing_ok=True)

    def _kept(self) -> NumberArray[int]:
        """The offsets of what an earlier writer of this key kept, [0] where there is nothing."""
        nothing = NumberArray("q", [0])
        if not (self.part.is_file() and self.part_places.is_file() and self.raw.is_file()):
            return nothing
        facts = read_json(self.part)
        data = self.part_places.read_bytes()[: 8 * int(facts["offsets"])]
        offsets = NumberArray("q", data)
        whole = len(offsets) == facts["offsets"] > 1 and self.raw.stat().st_size >= offsets[-1] * self.row_bytes
        return offsets if facts["key"] == self.key and whole else nothing

    def _sync(self, file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the system says of a disk, as a PlaitError."""
        try:
            yield
        except OSError as error:
            raise PlaitError(f"Cannot write {self.raw}: {error.strerror or error}. Free space, then go on.") from error


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped: its pages are the file's, which the system takes back when it likes. Raises
    OSError or ValueError where it is missing or cut."""
    array = np.load(path, mmap_mode="r")  # which would keep the file open, where there may be thousands
    values = _mapped_values(path, array.dtype, array.size, array.offset)
    return values.reshape(array.shape, order="F" if np.isfortran(array) else "C")


def _mapped_values(path: Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> np.ndarray:
    """`count` values of a file from `offset` bytes on, mapped; the file itself is closed. Raises OSError or ValueError
    where it is missing or cut."""
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), dtype, count, offset)  # holds the mapping


def _files(path: Path) -> tuple[Path, Path, Path]:
    """Facts, values and offsets; a column's name may hold dots."""
    facts, raw, places = (path.with_name(path.name + end) for end in (".json", ".raw", ".offsets.npy"))
    return facts, raw, places
