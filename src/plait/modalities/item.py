"""Items: films, products, whatever a history is made of. A history is a sequence, and the next item its next token.

An item's row is what its content says, projected, plus a row that was learnt from histories; a new item has the first
alone. Some learnt rows are hidden in every training step, so that what the content says suffices where it must. Rows
serve on both sides: what is read, and what is predicted. They live beside the vocabulary, from its size on, so that a
catalogue grows without moving an id.

A catalogue too large for that has semantic codes: what the content says, quantised in a few steps, each of what the
one before left over, and a last code that tells apart those that came out alike. They are tokens of the vocabulary,
one space a step, and no item has a row of its own (Rajput et al., "Recommender Systems with Generative Retrieval",
2023).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.core.errors import PlaitError
from plait.modalities.base import Role

MOST = 200_000  # items, with one code each
FULL = 30_000  # items up to which every one of them is weighed against the next
STD = 0.02  # of rows, at the start
STEPS = 3  # of quantisation
REDUCED = 256  # numbers that content is reduced to before
SAMPLE = 16_384  # items by which codes are fitted
ROUNDS = 12  # of k-means
ALIKE = 4096  # items that may come out alike
SPREAD = 0.1  # of what projects content: enough that what is alike in content begins alike


class Described(Protocol):
    """What is known of an item, as far as it becomes numbers here."""

    title: str | None
    text: str | None
    categories: list[str]
    more: dict[str, str | int | float | None]  # further cells of its row


class Known(BaseModel):
    """How what is known of items becomes numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: int = Field(ge=1, description="How many there are.")
    content: int = Field(0, description="Width of what the content says; 0 where nothing is known of the items.")
    words: list[str] = Field([], description="Words of the bag, in the order of its columns.")
    weights: list[float] = Field([], description="Weights of these words.")
    encoder: str | None = Field(None, description="The model whose embeddings are part of the content.")

    @property
    def levels(self) -> list[int]:
        """None: items have no codec with FSQ digits."""
        return []


class ItemSettings(Known):
    """What fixes the items of a model that has one code an item."""

    drop: float = Field(0.1, ge=0, lt=1, description="Share of the learnt rows that a step hides.")
    sampled: int = Field(0, ge=0, description="Items drawn to stand for all in the softmax; 0: all of them.")


class ItemCodesSettings(Known):
    """What fixes the items of a model that has semantic codes of them."""

    reduced: int = Field(ge=1, description="Width of the content once it is reduced, which is what is quantised.")
    sizes: list[int] = Field(description="Values of each code; the last tells apart what is alike.")

    @property
    def code_levels(self) -> dict[str, list[int]]:
        """Space of the vocabulary -> its levels, one space a code."""
        return {f"item:{number}": [size] for number, size in enumerate(self.sizes, 1)}


ItemsSettings = ItemSettings | ItemCodesSettings


class Item(nn.Module):
    """The rows of a catalogue; see the top of this file."""

    name: ClassVar[str] = "item"
    role: ClassVar[Role] = "rows"
    optimizer_groups: ClassVar = {"free": "no_decay"}  # a row belongs to one item alone
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

    @property
    def sampled(self) -> int:
        """Items that are drawn to stand for all in the softmax; 0: all of them."""
        return self.settings.sampled

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


class ItemCodes(nn.Module):
    """The semantic codes of a catalogue, and what makes those of a new item. Nothing of it is trained."""

    name: ClassVar[str] = "item_codes"
    role: ClassVar[Role] = "codes"
    variable_length: ClassVar[bool] = False

    table: Tensor  # (items, codes) below the sizes; no two rows are the same
    counts: Tensor
    mean: Tensor
    basis: Tensor
    centres: Tensor  # (steps, K, reduced)

    def __init__(self, settings: ItemCodesSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("table", torch.zeros(settings.items, len(settings.sizes), dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(settings.items))  # how often each stands in the training histories
        self.register_buffer("mean", torch.zeros(settings.content))
        self.register_buffer("basis", torch.zeros(settings.content, settings.reduced))
        steps = len(settings.sizes) - 1
        self.register_buffer("centres", torch.zeros(steps, settings.sizes[0], settings.reduced))

    def __len__(self) -> int:
        return len(self.table)

    @torch.no_grad()
    def grow(self, content: np.ndarray) -> None:
        """Append items that no history knows, by their content (N, C). Raises PlaitError where what they are is so
        common that no code is left."""
        reduced = (torch.as_tensor(content, dtype=torch.float32, device=self.mean.device) - self.mean) @ self.basis
        codes = quantise(reduced, self.centres).tolist()
        places, counts = torch.unique(self.table[:, :-1], dim=0, return_counts=True)
        taken = Counter({tuple(place): n for place, n in zip(places.tolist(), counts.tolist(), strict=True)})
        size, most = self.settings.sizes[-2], self.settings.sizes[-1]
        rows = []
        for row in codes:
            for step in range(size):  # where there is no room left, a neighbouring code is taken
                place = (*row[:-1], (row[-1] + step) % size)
                if taken[place] < most:
                    break
            else:
                raise PlaitError(f"More than {size * most:,} items are alike to this model. Train it again with them.")
            rows.append([*place, taken[place]])
            taken[place] += 1
        self.table = torch.cat((self.table, self.table.new_tensor(rows)))
        self.counts = torch.cat((self.counts, self.counts.new_zeros(len(rows))))
        self.settings = self.settings.model_copy(update={"items": len(self.table)})


def item_rows(modalities: nn.ModuleDict) -> Item | None:
    """The items of a model that has a row for each."""
    parts = [part for name, part in modalities.items() if name == Item.name]
    return parts[0] if parts else None  # type: ignore[return-value]


def item_codes(modalities: nn.ModuleDict) -> ItemCodes | None:
    """The items of a model that has semantic codes of them."""
    parts = [part for name, part in modalities.items() if name == ItemCodes.name]
    return parts[0] if parts else None  # type: ignore[return-value]


def quantise(reduced: Tensor, centres: Tensor) -> Tensor:
    """(N, P) to (N, steps) integers: the nearest of the centres (steps, K, P), each of what the one before left."""
    left, codes = reduced, []
    for book in centres:
        nearest = torch.cat([torch.cdist(part, book).argmin(1) for part in left.split(8192)])
        codes.append(nearest)
        left = left - book[nearest]
    return torch.stack(codes, 1)


@torch.no_grad()
def fit_codes(count: int, content: Callable[[np.ndarray], np.ndarray], seed: int) -> dict[str, Tensor]:
    """The buffers of `ItemCodes` for `count` items, whose `content` is had by number, (N,) to (N, C). It is reduced to
    the directions in which a sample of the items differs most, and these are quantised by residual k-means.

    Raises PlaitError where too many items cannot be told apart.
    """
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=rng)[:SAMPLE].numpy()
    sample = torch.from_numpy(content(chosen))
    mean = sample.mean(0)
    sample = sample - mean
    _, directions = torch.linalg.eigh(sample.t() @ sample)
    basis = directions[:, -REDUCED:].contiguous()
    parts = np.array_split(np.arange(count), -(-count // 8192))
    reduced = torch.cat([(torch.from_numpy(content(part)) - mean) @ basis for part in parts])
    size = int(2 ** min(max(round(math.log2(count) / 2), 3), 8))
    left, centres = reduced[chosen], []
    for _ in range(STEPS):
        centre = left[torch.randint(len(left), (size,), generator=rng)].clone()
        for _ in range(ROUNDS):
            nearest = torch.cdist(left, centre).argmin(1)
            held = torch.bincount(nearest, minlength=size)
            sums = torch.zeros_like(centre).index_add_(0, nearest, left)
            centre = torch.where(held[:, None] > 0, sums / held[:, None].clamp(min=1), centre)
        left = left - centre[torch.cdist(left, centre).argmin(1)]
        centres.append(centre)
    codebooks = torch.stack(centres)
    codes = quantise(reduced, codebooks)
    _, place, alike = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    if int(alike.max()) > ALIKE:
        raise PlaitError(
            f"{int(alike.max()):,} items are alike in all that is known of them, so semantic codes cannot tell them "
            "apart. Give the items table titles, texts or categories, or name a model.item.encoder."
        )
    order = torch.argsort(place, stable=True)
    last = torch.empty_like(place)
    last[order] = torch.arange(count) - (torch.cumsum(alike, 0) - alike)[place[order]]
    table = torch.cat((codes, last[:, None]), 1).int()
    return {"table": table, "mean": mean, "basis": basis, "centres": codebooks}


def sizes_of(codes: dict[str, Tensor]) -> list[int]:
    """The sizes of codes that were fitted; the last has room for new items."""
    steps, size, _ = codes["centres"].shape
    alike = int(codes["table"][:, -1].max()) + 1
    return [size] * steps + [max(8, 2 ** math.ceil(math.log2(2 * alike)))]


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
        matrix = np.zeros((len(bags), len(self.words)), np.float32)
        for row, bag in zip(matrix, bags, strict=True):
            for word, n in Counter(bag).items():
                if (place := self.place.get(word)) is not None:
                    row[place] = (1 + math.log(n)) * self.weights[place]
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)


def bag_of(item: Described) -> list[str]:
    """The words of an item's title and text, and its categories and decade as words of their own."""
    year = item.more.get("year")
    decade = [f"decade:{year // 10 * 10}"] if isinstance(year, int) else []
    categories = [f"category:{category.lower()}" for category in item.categories]
    return [*words_of(item.title or ""), *words_of(item.text or ""), *categories, *decade]


def content_of(items: Sequence[Described], settings: Known, seen: np.ndarray | None) -> np.ndarray:
    """The content of items, (N, C): a bag of words, and beside it what an encoder sees in them."""
    bag = Bag(settings.words, settings.weights).vectors([bag_of(item) for item in items])
    return bag if seen is None else np.concatenate((bag, seen), 1)
