"""What an earlier cache of a split holds, by content: where records were added to a dataset, only the new ones are
tokenised and decoded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.rng import key_of
from plait.data.blocks import BlockFiles
from plait.data.samples import Samples, mapped
from plait.data.tokens import Encode, Tokens, open_tokens


class Known:
    """Rows by the key of their content."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """`keys` (N,) int64 and the rows (N,) that they stand for; a row below 0 is none."""
        there = rows >= 0
        order = np.argsort(keys[there], kind="stable")
        self.keys, self.rows = keys[there][order], rows[there][order]

    def row(self, key: int) -> int:
        """The row of a key, -1 where it is not known."""
        place = int(np.searchsorted(self.keys, key))
        return int(self.rows[place]) if place < len(self.keys) and self.keys[place] == key else -1


def text_key(text: str) -> int:
    """What tells a text from others; never 0, which is none."""
    return key_of(text) | 1


@dataclass(frozen=True)
class EarlierTokens:
    """The ids of a column's texts, in one store or one a block; `known` numbers them one store after another."""

    stores: list[Samples]
    known: Known

    @classmethod
    def of(cls, tokens: list[Tokens], keys: list[np.ndarray]) -> EarlierTokens:
        """`keys` (N,) are those of the texts of each store's records."""
        first = np.cumsum([0, *(len(one.samples) for one in tokens)])
        rows = [np.where(one.rows >= 0, one.rows + start, -1) for one, start in zip(tokens, first, strict=False)]
        nothing = np.zeros(0, np.int64)
        return cls(
            [one.samples for one in tokens], Known(np.concatenate([*keys, nothing]), np.concatenate([*rows, nothing]))
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(store) for store in self.stores])

    def ids(self, key: int) -> list[int] | None:
        """The ids of the text with this key; None where it is not known."""
        row = self.known.row(key)
        if row < 0:
            return None
        store = int(np.searchsorted(self._ends, row, side="right"))
        samples = self.stores[store]
        ids: list[int] = samples[row - int(self._ends[store]) + len(samples)].tolist()
        return ids


def set_aside(cache: Path, split: str) -> None:
    """Move the files of a split's cache to where `EarlierCache` looks for them: another one takes their place."""
    if not (cache / f"{split}.json").is_file():
        return  # stopped in writing: what is there already lies aside
    folder = _aside(cache, split)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in [*cache.glob(f"{split}-*"), cache / f"{split}.json"]:  # the .json last: with it all is there
        file.rename(folder / file.name)


def _aside(cache: Path, split: str) -> Path:
    return cache / f"earlier-{split}"


class EarlierCache:
    """A split's cache that was set aside, to be deleted once the new one is whole."""

    def __init__(self, cache: Path, split: str) -> None:
        self.folder, self.split = _aside(cache, split), split
        file = self.folder / f"{split}.json"
        self.facts: dict[str, Any] = read_json(file) if file.is_file() else {}

    def tokens(self, column: str, tokenizer: str) -> EarlierTokens | None:
        """The ids of a column's texts; None where they are not there, or another tokenizer made them."""
        columns = self.facts.get("texts", [])
        if self.facts.get("tokenizer") != tokenizer or column not in columns:
            return None
        try:
            if "blocks" in self.facts:
                files = BlockFiles(self.folder, self.split, columns, self.facts["made_of"])
                whole = [block for block in range(self.facts["blocks"]) if files.is_there(block)]
                stores, keys = [files.open(b)[column] for b in whole], [files.keys(b, column) for b in whole]
            else:
                stores = [open_tokens(self.folder / f"{self.split}-{column}-tokens")]
                keys = [mapped(self.folder / f"{self.split}-keys.npy")[:, columns.index(column)]]
        except (OSError, ValueError, PlaitError):
            return None
        return EarlierTokens.of(stores, keys)

    def samples(self, column: str, settings: str) -> tuple[Samples, Known, np.ndarray] | None:
        """A column's samples and which of them were cut; None where they are not there, or were fitted otherwise."""
        if self.facts.get("media", {}).get(column) != settings:
            return None
        stem = self.folder / f"{self.split}-{column}"
        try:
            samples = Samples.open(stem)
            keys, cut = (np.load(stem.with_name(f"{stem.name}-{what}.npy")) for what in ("keys", "cut"))
        except (OSError, ValueError, PlaitError):
            return None
        return samples, Known(keys, np.arange(len(keys))), cut

    def close(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def reusing(encode: Encode, earlier: EarlierTokens | None) -> Encode:
    """`encode`, but that texts of an earlier cache are looked up there."""
    if earlier is None:
        return encode

    def look_up(texts: list[str]) -> Sequence[Sequence[int]]:
        known = [earlier.ids(text_key(text)) for text in texts]
        encoded = iter(encode([text for text, ids in zip(texts, known, strict=True) if ids is None]))
        return [next(encoded) if ids is None else ids for ids in known]

    return look_up
