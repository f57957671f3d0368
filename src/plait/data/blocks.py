"""A split's texts as token ids in blocks, so that training begins when the first block is there.

A block is some tens of megabytes of text: row groups from all over the split, every nth one, so that each block is a
small picture of the whole. Which records a block holds depends on the shards alone. A block is there when its .json
is, which is written last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.data.dataset import Dataset
from plait.data.samples import mapped
from plait.data.tokens import Encode, Tokens, open_tokens, write_tokens

BLOCK_BYTES = 32 << 20  # of text in a block, about
AHEAD = 2  # blocks that are made before they are asked for
POLL = 0.05  # seconds


@dataclass(frozen=True)
class BlockPlan:
    """Which records of a split stand in which block.

    Attributes:
        starts: The first record of each row group, by its place in the split, and the number of records (G + 1,).
        count: Blocks. Row group g belongs to block g % count.
    """

    starts: np.ndarray
    count: int

    @cached_property
    def before(self) -> np.ndarray:
        """How many records of its block stand before each row group (G,)."""
        sizes = np.diff(self.starts)
        before = np.zeros(len(sizes), np.int64)
        for block in range(self.count):
            own = slice(block, None, self.count)
            before[own] = np.cumsum(sizes[own]) - sizes[own]
        return before

    def records(self, block: int) -> np.ndarray:
        """The records of a block, ascending places in the split (N,)."""
        groups = range(block, len(self.starts) - 1, self.count)
        return np.concatenate([np.arange(self.starts[g], self.starts[g + 1], dtype=np.int64) for g in groups])

    def find(self, record: int) -> tuple[int, int]:
        """The block of a record, and its place in there."""
        group = int(np.searchsorted(self.starts, record, side="right")) - 1
        return group % self.count, int(self.before[group] + record - self.starts[group])


def plan_blocks(dataset: Dataset, split: str, columns: list[str], block_bytes: int = BLOCK_BYTES) -> BlockPlan:
    """Cut a split into blocks of about so many bytes of text in these columns; one block where it is no more than
    twice as large."""
    known = [dataset.manifest.statistics[column] for column in columns if column in dataset.manifest.statistics]
    share = dataset.manifest.counts.get(split, 0) / max(len(dataset), 1)
    size = share * sum(one.mean * one.records for one in known)
    if size <= 2 * block_bytes:
        return BlockPlan(np.array([0, len(dataset.indices(split))]), 1)
    starts = np.concatenate(([0], np.cumsum(dataset.group_sizes(split))))
    return BlockPlan(starts, min(math.ceil(size / block_bytes), len(starts) - 1))


@dataclass(frozen=True)
class BlockFiles:
    """Where the blocks of a split lie.

    Attributes:
        folder: The cache of a run.
        split: Whose blocks they are.
        columns: Of texts.
        made_of: A hash of the data, the tokenizer and the plan: blocks of another one do not count.
    """

    folder: Path
    split: str
    columns: list[str]
    made_of: str

    def _path(self, block: int, column: str | None = None) -> Path:
        return self.folder / f"{self.split}-{'' if column is None else column + '-'}block-{block:05d}"

    def is_there(self, block: int) -> bool:
        """Whether a block is whole."""
        done = self._path(block).with_suffix(".json")
        try:
            return done.is_file() and read_json(done)["made_of"] == self.made_of
        except PlaitError:
            if done.is_file():
                raise
            return False  # one of other texts, which the process that tokenises deleted meanwhile

    def write(
        self, block: int, cells: Callable[[str], Iterator[pa.Array]], encode: Callable[[str], Encode],
        key_of: Callable[[str], int], vocabulary: int,
    ) -> None:  # fmt: skip
        """Tokenise a block.

        Args:
            block: Its number.
            cells: The texts of a column of the block's records, null where one has none.
            encode: For a column, what turns texts into ids.
            key_of: What tells a text from others, never 0.
            vocabulary: One more than the largest id.
        """
        self._path(block).with_suffix(".json").unlink(missing_ok=True)
        for column in self.columns:
            keys: list[np.ndarray] = []
            texts = _keyed(cells(column), key_of, keys)
            write_tokens(self._path(block, column), texts, encode(column), vocabulary)
            path = self._path(block, column)
            np.save(path.with_name(path.name + ".keys.npy"), np.concatenate([*keys, np.zeros(0, np.int64)]))
        write_json(self._path(block).with_suffix(".json"), {"made_of": self.made_of})

    def open(self, block: int) -> dict[str, Tokens]:
        """Map the texts of a block that is there: column -> ids by place. Raises PlaitError for one that is cut."""
        return {column: open_tokens(self._path(block, column)) for column in self.columns}

    def keys(self, block: int, column: str) -> np.ndarray:
        """The keys of a block's texts (N,), 0 where there is none."""
        path = self._path(block, column)
        return mapped(path.with_name(path.name + ".keys.npy"))


def _keyed(cells: Iterator[pa.Array], key_of: Callable[[str], int], keys: list[np.ndarray]) -> Iterator[pa.Array]:
    """The cells; puts the keys of their texts into a list."""
    for values in cells:
        keys.append(np.array([0 if v is None else key_of(v) for v in values.to_pylist()], np.int64))
        yield values


class Maker(Protocol):
    """What makes blocks while training uses them."""

    def want(self, block: int) -> None:
        """Have blocks made up to this one."""
        ...

    def check(self) -> None:
        """Raise PlaitError where no more of them will be made."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class ClosedError(Exception):
    """Nobody waits for blocks any more."""


class Blocks:
    """The blocks of a split, of which some may not be there yet."""

    def __init__(self, plan: BlockPlan, files: BlockFiles, maker: Maker | None) -> None:
        """`maker` makes what is missing; None where another process has one."""
        self.plan, self.files, self.maker = plan, files, maker
        self.opened: dict[int, dict[str, Tokens]] = {}
        self.closed = False

    def __len__(self) -> int:
        return self.plan.count

    def __getitem__(self, block: int) -> dict[str, Tokens]:
        """The texts of a block that is there: column -> ids by place."""
        if block not in self.opened:
            self.opened[block] = self.files.open(block)
        return self.opened[block]

    def is_there(self, block: int) -> bool:
        """Whether a block is whole; has the next ones made. Raises PlaitError where it never will be."""
        if block in self.opened:
            return True
        if self.maker is not None and not self.closed:
            self.maker.want(min(block + AHEAD, len(self) - 1))
            self.maker.check()
        return self.files.is_there(block)

    def wait(self, block: int) -> None:
        """Return when a block is there. Raises ClosedError where the blocks are closed, or are meanwhile."""
        while not self.is_there(block):
            if self.closed:
                raise ClosedError
            time.sleep(POLL)

    def close(self) -> None:
        """Make and await no more."""
        self.closed = True
        if self.maker is not None:
            self.maker.close()


class BlockTokens:
    """The token ids of a column by record, as `Tokens` has them, of records whose block is there."""

    def __init__(self, blocks: Blocks, column: str) -> None:
        self.blocks, self.column = blocks, column

    def __len__(self) -> int:
        return int(self.blocks.plan.starts[-1])

    def __getitem__(self, record: int) -> list[int] | None:
        block, place = self.blocks.plan.find(int(record))
        return self.blocks[block][self.column][place]

    def has(self, record: int) -> bool:
        """Whether a record has a text."""
        block, place = self.blocks.plan.find(int(record))
        return self.blocks[block][self.column].has(place)

    @property
    def present(self) -> np.ndarray:
        """(N,) whether a record has a text, once all blocks are there."""
        return self._of_all(lambda tokens: tokens.present, np.dtype(bool))

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each record's text, once all blocks are there."""
        return self._of_all(lambda tokens: tokens.lengths, np.dtype(np.int64))

    def _of_all(self, of: Callable[[Tokens], np.ndarray], kind: np.dtype[Any]) -> np.ndarray:
        values = np.zeros(len(self), kind)
        for block in range(len(self.blocks)):
            values[self.blocks.plan.records(block)] = of(self.blocks[block][self.column])
        return values
