"""What an earlier cache of a split holds, by content: where records were added to a dataset, only the new ones are
tokenised and decoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.samples import Samples, mapped
from plait.data.tokens import Tokens, open_tokens

Encode = Callable[[list[str]], Sequence[Sequence[int]]]


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


class EarlierCache:
    """The files of a split's cache, moved aside while another takes their place, and deleted once that is whole."""

    def __init__(self, cache: Path, split: str) -> None:
        self.folder, self.split = cache / f"earlier-{split}", split
        if (cache / f"{split}.json").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for file in [*cache.glob(f"{split}-*"), cache / f"{split}.json"]:  # the .json last: with it all is there
                file.rename(self.folder / file.name)
        file = self.folder / f"{split}.json"
        self.facts: dict[str, Any] = read_json(file) if file.is_file() else {}

    def tokens(self, column: str, tokenizer: str) -> tuple[Tokens, Known] | None:
        """The ids of a column's texts; None where they are not there, or another tokenizer made them."""
        columns = self.facts.get("texts", [])
        if self.facts.get("tokenizer") != tokenizer or column not in columns:
            return None
        try:
            tokens = open_tokens(self.folder / f"{self.split}-{column}-tokens")
            keys = mapped(self.folder / f"{self.split}-keys.npy")[:, columns.index(column)]
        except (OSError, ValueError, PlaitError):
            return None
        return tokens, Known(keys, tokens.rows)

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


def reusing(encode: Encode, earlier: tuple[Tokens, Known] | None, key_of: Callable[[str], int]) -> Encode:
    """`encode`, but that texts of an earlier cache are looked up there."""
    if earlier is None:
        return encode
    tokens, known = earlier

    def look_up(texts: list[str]) -> Sequence[Sequence[int]]:
        rows = [known.row(key_of(text)) for text in texts]
        encoded = iter(encode([text for text, row in zip(texts, rows, strict=True) if row < 0]))
        return [tokens.samples[row].tolist() if row >= 0 else next(encoded) for row in rows]

    return look_up
