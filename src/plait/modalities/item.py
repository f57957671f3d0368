"""Items: films, products, whatever a history is made of. A history is a sequence, and the next item its next token.

An item's row is what its content says, projected, plus a row that was learnt from histories; a new item has the first
alone. Some learnt rows are hidden in every training step, so that what the content says suffices where it must. Rows
serve on both sides: what is read, and what is predicted. They live beside the vocabulary, from its size on, so that a
catalogue grows without moving an id.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.data.catalogue import Item as Known

MOST = 200_000  # items, with one code each
FULL = 30_000  # items up to which every one of them is weighed against the next
STD = 0.02  # of rows, at the start
SPREAD = 0.1  # of what projects content: enough that what is alike in content begins alike


class ItemSettings(BaseModel):
    """What fixes the items of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: int = Field(ge=1, le=MOST)
    content: int = 0  # width of what the content says; 0 where nothing is known of the items
    words: list[str] = []  # of the bag, in the order of its columns
    weights: list[float] = []  # of these words
    encoder: str | None = None  # the model whose embeddings are part of the content
    drop: float = Field(0.1, ge=0, lt=1)  # share of the learnt rows that a step hides
    sampled: int = Field(0, ge=0)  # items that are drawn to stand for all in the softmax; 0: all of them

    @property
    def levels(self) -> list[int]:
        """None: the codes of items are no part of the vocabulary."""
        return []


class Item(nn.Module):
    """The rows of a catalogue; see the top of this file."""

    name: ClassVar[str] = "item"
    variable_length: ClassVar[bool] = False

    def __init__(self, settings: ItemSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.free = nn.Parameter(torch.randn(settings.items, width) * STD)
        self.register_buffer("counts", torch.zeros(settings.items))  # how often each stands in the training histories
        self.register_buffer("content", torch.zeros(settings.items, settings.content, dtype=torch.float16))
        self.project = nn.Linear(settings.content, width, bias=False) if settings.content else None
        if self.project is not None:
            nn.init.normal_(self.project.weight, std=SPREAD)

    counts: Tensor
    content: Tensor

    def __len__(self) -> int:
        return len(self.free)

    def placed(self) -> Tensor:
        """What the content alone says of each item, (items, D)."""
        assert self.project is not None
        return self.project(self.content.to(self.project.weight.dtype))

    def rows(self) -> Tensor:
        """The rows of all items, (items, D); in training some have no learnt part."""
        if self.project is None:
            return self.free
        free: Tensor = self.free
        if self.training and self.settings.drop:
            free = free * (torch.rand(len(free), 1, device=free.device) >= self.settings.drop)
        return free + self.placed()

    @torch.no_grad()
    def grow(self, content: np.ndarray) -> None:
        """Append items that no history knows, by their content (N, C)."""
        more = torch.as_tensor(content, dtype=self.content.dtype, device=self.content.device)
        self.free = nn.Parameter(torch.cat((self.free, self.free.new_zeros(len(more), self.free.shape[1]))))
        self.content = torch.cat((self.content, more))
        self.counts = torch.cat((self.counts, self.counts.new_zeros(len(more))))
        self.settings = self.settings.model_copy(update={"items": len(self.free)})


# --- what words say ---------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; of Chinese and the like, its characters."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", text)


class Bag:
    """A bag of words weighted by rarity (TF-IDF): what of an item can be said without a model."""

    def __init__(self, words: list[str], weights: list[float]) -> None:
        self.words, self.weights = words, np.asarray(weights, np.float32)
        self.place = {word: i for i, word in enumerate(words)}

    @classmethod
    def fit(cls, bags: Iterable[list[str]], most: int) -> Bag:
        """Of the words that at least two items have, the `most` frequent ones."""
        counts: Counter[str] = Counter()
        total = 0
        for bag in bags:
            counts.update(set(bag))
            total += 1
        kept = [(word, n) for word, n in sorted(counts.items(), key=lambda e: (-e[1], e[0])) if 1 < n < total][:most]
        return cls([word for word, _ in kept], [math.log(total / n) for _, n in kept])

    def vectors(self, bags: list[list[str]]) -> np.ndarray:
        """(N, words) float32, of unit length, or zero where no word is known."""
        found = np.zeros((len(bags), len(self.words)), np.float32)
        for row, bag in zip(found, bags, strict=True):
            for word, n in Counter(bag).items():
                if (place := self.place.get(word)) is not None:
                    row[place] = (1 + math.log(n)) * self.weights[place]
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)


def bag_of(item: Known) -> list[str]:
    """The words of an item's title and text, and its categories and decade as words of their own."""
    year = item.more.get("year")
    decade = [f"decade:{year // 10 * 10}"] if isinstance(year, int) else []
    categories = [f"category:{category.lower()}" for category in item.categories]
    return [*words_of(item.title or ""), *words_of(item.text or ""), *categories, *decade]


def content_of(items: list[Known], settings: ItemSettings, seen: np.ndarray | None) -> np.ndarray:
    """The content of items, (N, C): a bag of words, and beside it what an encoder sees in them."""
    bag = Bag(settings.words, settings.weights).vectors([bag_of(item) for item in items])
    return bag if seen is None else np.concatenate((bag, seen), 1)
