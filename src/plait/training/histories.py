"""Histories of items as sequences: every item of a window is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from plait.config import ItemModelRecipe
from plait.data.catalogue import Catalogue
from plait.data.catalogue import Item as CatalogueItem
from plait.data.dataset import Dataset
from plait.data.histories import TEST, TRAIN, VAL, Histories, read_catalogue, read_histories
from plait.modalities.item import FULL, MOST, Bag, Item, ItemSettings, bag_of, content_of
from plait.model.multimodal import IGNORE, Batch, Multimodal
from plait.runtime import Device, PlaitError, uniform
from plait.training.batches import OFFSET, Sampler, Split, Step, cut_by_length

Embed = Callable[[list[CatalogueItem]], np.ndarray]  # items to (N, E) float32, of unit length

DRAWS = 8192  # items that stand for all where they are too many


@dataclass
class ItemContent:
    """What is known of the items that histories are learnt of, and the settings that follow from it."""

    catalogue: Catalogue
    histories: Histories
    settings: ItemSettings
    vectors: np.ndarray  # (items, content)

    def split(self, name: str) -> HistorySplit:
        return history_split(self.histories, name, len(self.catalogue))

    def fill(self, model: Multimodal) -> None:
        """Give a new model its content and the items' frequencies."""
        assert model.items is not None
        model.items.content.copy_(torch.from_numpy(self.vectors))
        trained = self.histories.items[self.histories.parts == TRAIN]
        model.items.counts.copy_(torch.from_numpy(np.bincount(trained, minlength=self.settings.items)))


def item_content(dataset: Dataset, recipe: ItemModelRecipe, cache: Path, embed: Embed | None) -> ItemContent:
    """The content of the items that stand in training histories: a bag of words, and beside it what `embed` sees in
    them, which is kept in the file `cache`. Raises PlaitError for a catalogue that is too large."""
    catalogue = read_catalogue(dataset).trained()
    known = catalogue.items
    if len(known) > MOST:
        raise PlaitError(
            f"{len(known):,} items; a model has one code an item, and at most {MOST:,}. Leave out the rarest ones, or "
            "those of a weight below data.items.least_weight."
        )
    bag = Bag.fit((bag_of(item) for item in known), recipe.words)
    seen = None
    if recipe.encoder is not None:
        if not cache.exists():
            assert embed is not None, "model.item.encoder needs train(embed=...)"
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, embed(known))
        seen = np.load(cache)
    sampled = recipe.sampled
    if sampled is None:
        sampled = 0 if len(known) <= FULL else DRAWS
    width = len(bag.words) + (0 if seen is None else seen.shape[1])
    settings = ItemSettings(
        items=len(known), content=width, words=bag.words, weights=[round(float(w), 6) for w in bag.weights],
        encoder=recipe.encoder, drop=recipe.drop if width else 0.0, sampled=sampled,
    )  # fmt: skip
    vectors = content_of(known, settings, seen)
    return ItemContent(catalogue, read_histories(dataset), settings, vectors)


@dataclass
class HistorySplit(Split):
    """Histories one after the other. Of history h, the items are `items[starts[h] : starts[h + 1]]`, and what counts
    is predicting those from its place `first[h]` on."""

    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def history_split(histories: Histories, split: str, known: int) -> HistorySplit:
    """What training reads (`split` is train), or what a split holds behind that. Items from number `known` on have
    no row yet, and are left out."""
    wanted = {"train": TRAIN, "val": VAL, "test": TEST}[split]
    usable = (histories.parts <= wanted) & (histories.items < known)
    owner = histories.owners()
    there = np.zeros(len(histories), bool)
    there[owner[usable & (histories.parts == wanted)]] = True
    usable &= there[owner]
    chosen = np.flatnonzero(there)
    counts = np.bincount(owner[usable], minlength=len(histories))[chosen]
    before = np.bincount(owner[usable & (histories.parts < wanted)], minlength=len(histories))[chosen]
    return HistorySplit(
        ids=[histories.users[i] for i in chosen],
        texts={},
        media={},
        rows={},
        items=histories.items[usable].astype(np.int64),
        starts=np.concatenate(([0], np.cumsum(counts))),
        first=before,
    )


class HistorySampler(Sampler):
    """Windows of histories, of the context's length at most; where they are cut moves from epoch to epoch."""

    split: HistorySplit

    def _items(self) -> np.ndarray:
        lengths = np.diff(self.split.starts)
        windows = np.where(self.split.first > 0, 1, -(-lengths // self.context))  # else the end alone matters
        records = np.repeat(np.arange(len(windows)), windows)
        return np.stack([records, np.arange(len(records)) - np.repeat(np.cumsum(windows) - windows, windows)], 1)

    def build(self, epochs: np.ndarray, items: np.ndarray) -> Step:
        """The batches that items (N, 2) of epochs (N,), a history and a window of it each, become."""
        records, windows = items[:, 0], items[:, 1]
        split, context = self.split, self.context
        lengths = split.starts[records + 1] - split.starts[records]
        slack = -(-lengths // context) * context - lengths
        moved = (uniform(self.seed, epochs, records, OFFSET) * (slack + 1)).astype(np.int64) * (lengths > context)
        tail = split.first[records] > 0
        begin = np.where(tail, np.maximum(lengths - context, 0), np.maximum(windows * context - moved, 0))
        end = np.where(tail, lengths, np.minimum((windows + 1) * context - moved, lengths))
        order = np.argsort(end - begin, kind="stable")
        sizes = (end - begin)[order].tolist()
        batches, span_records = [], []
        cuts = cut_by_length(sizes, self.worth)
        for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True):
            some = order[start:stop]
            batches.append(self._batch(records[some], begin[some], end[some]))
            span_records.append(np.zeros(0, np.int64))
        return Step(batches, span_records, records)

    def _batch(self, records: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Batch:
        """Sequences that predict the items of places `begin` to `end`, each from the one before it."""
        split, base, opener = self.split, self.vocabulary.size, self.vocabulary.opener(Item.name)
        lengths = end - begin
        tokens = np.full((len(records), int(lengths.max(initial=1))), self.vocabulary.pad)
        targets = np.full(tokens.shape, IGNORE)
        for row, (record, first, stop) in enumerate(zip(records, begin, end, strict=True)):
            at = split.starts[record]
            ids = split.items[at + first : at + stop] + base
            tokens[row, 1 : len(ids)] = ids[:-1]
            tokens[row, 0] = split.items[at + first - 1] + base if first else opener
            skipped = max(split.first[record] - first, 0)
            targets[row, skipped : len(ids)] = ids[skipped:]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(lengths), {}, [])


@torch.no_grad()
def ranking(model: Multimodal, device: Device, sampler: HistorySampler, most: int = 4096) -> float:
    """NDCG@10 of the last item of at most `most` histories of a split, among all items that the history lacks: what a
    model of histories is chosen by. Its likelihood gets worse on val long before its ranking does."""
    assert model.items is not None
    training, base, found = model.training, model.vocabulary.size, []
    model.eval()
    with device.autocast():
        items = model.items.rows()
        table = model.reading(items)
    for number in range(min(sampler.steps_per_epoch, -(-most // sampler.batch_size))):
        for batch in sampler.step(number).batches:
            asked = batch.targets != IGNORE
            rows = asked.any(1).nonzero()[:, 0]
            places = (asked.shape[1] - 1 - asked.flip(1).int().argmax(1))[rows]
            wanted = batch.targets[rows, places] - base
            with device.autocast():
                hidden = model(batch.to(device.torch), table)[rows, places]
            scores = (hidden.float() @ items.float().t()).cpu()
            mine = scores.gather(1, wanted[:, None])
            before = batch.tokens[rows] - base
            known = (before >= 0) & (torch.arange(before.shape[1]) <= places[:, None])
            row, place = known.nonzero(as_tuple=True)
            scores[row, before[row, place]] = -torch.inf
            better = (scores > mine).sum(1)
            found += [1 / math.log2(rank + 2) if rank < 10 else 0.0 for rank in better.tolist()]
    model.train(training)
    return float(np.mean(found)) if found else 0.0
