"""Histories of items as sequences: every item of a window is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes

from plait.core.config import Recipe
from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.modalities.item import (
    FULL,
    MOST,
    Bag,
    Item,
    ItemCodesSettings,
    ItemSettings,
    ItemsSettings,
    Known,
    bag_of,
    content_of,
    fit_codes,
    sizes_of,
)
from plait.model.multimodal import IGNORE, Batch, Multimodal, bucket_length
from plait.recommend.catalogue import Catalogue
from plait.recommend.catalogue import Item as CatalogueItem
from plait.recommend.write_histories import TEST, TRAIN, VAL, Histories, read_catalogue, read_histories
from plait.training.batches import OFFSET, Sampler, Split, Step, cut_by_length

Embed = Callable[[list[CatalogueItem]], np.ndarray]  # items to (N, E) float32, of unit length

DRAWS = 8192  # items that stand for all where they are too many


@dataclass
class ItemContent:
    """What is known of the items that histories are learnt of, and the settings that follow from it."""

    catalogue: Catalogue
    histories: Histories
    settings: ItemsSettings
    buffers: dict[str, torch.Tensor]  # of the model's items: their content (items, content), or their codes

    def split(self, name: str) -> HistorySplit:
        found = history_split(self.histories, name, len(self.catalogue))
        if "table" in self.buffers:
            found.code_table = self.buffers["table"].numpy().astype(np.int64)
        return found

    def fill(self, model: Multimodal) -> None:
        """Give a new model what is known of the items, and how often each was chosen."""
        items = model.items or model.item_codes
        assert items is not None
        for name, buffer in self.buffers.items():
            getattr(items, name).copy_(buffer)
        trained = self.histories.items[self.histories.parts == TRAIN]
        items.counts.copy_(torch.from_numpy(np.bincount(trained, minlength=self.settings.items)))


def item_content(dataset: Dataset, whole: Recipe, cache: Path, embed: Embed | None) -> ItemContent:
    """The content of the items that stand in training histories: a bag of words, and beside it what `embed` sees in
    them; or the semantic codes that it becomes. What takes long is kept in the folder `cache`.

    Raises PlaitError for a catalogue that is too large, or of whose items too little is known.
    """
    recipe, catalogue = whole.model.item, read_catalogue(dataset).trained()
    known = catalogue.items
    semantic = recipe.codes == "semantic" or (recipe.codes == "auto" and len(known) > MOST)
    if not semantic and len(known) > MOST:
        raise PlaitError(
            f"{len(known):,} items; with one code an item a model has at most {MOST:,}. Set model.item.codes to "
            "semantic, or leave out the rarest ones."
        )
    bag = Bag.fit((bag_of(item) for item in known), recipe.words)
    seen = None
    if recipe.encoder is not None:
        if not (cache / "items.npy").exists():
            assert embed is not None, "model.item.encoder needs train(embed=...)"
            cache.mkdir(parents=True, exist_ok=True)
            np.save(cache / "items.npy", embed(known))
        seen = np.load(cache / "items.npy")
    facts = Known(
        items=len(known), content=len(bag.words) + (0 if seen is None else seen.shape[1]), words=bag.words,
        weights=[round(float(w), 6) for w in bag.weights], encoder=recipe.encoder,
    )  # fmt: skip

    def content(numbers: np.ndarray) -> np.ndarray:
        return content_of([known[i] for i in numbers], facts, None if seen is None else seen[numbers])

    settings: ItemsSettings
    if semantic:
        if not facts.content:
            raise PlaitError(
                "Semantic codes come from what items are, and nothing is known of these. Give an items table with "
                "titles, texts or categories, or name a model.item.encoder."
            )
        file = cache / "item_codes.safetensors"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(file, tensors_to_bytes(fit_codes(len(known), content, whole.training.seed)))
        buffers = load_file(file)
        settings = ItemCodesSettings(**facts.model_dump(), reduced=buffers["basis"].shape[1], sizes=sizes_of(buffers))
    else:
        sampled = recipe.sampled
        if sampled is None:
            sampled = 0 if len(known) <= FULL else DRAWS
        settings = ItemSettings(**facts.model_dump(), drop=recipe.drop if facts.content else 0.0, sampled=sampled)
        buffers = {"content": torch.from_numpy(content(np.arange(len(known))))}
    return ItemContent(catalogue, read_histories(dataset), settings, buffers)


@dataclass
class HistorySplit(Split):
    """Histories one after the other. Of history h, the items are `items[starts[h] : starts[h + 1]]`, and what counts
    is predicting those from its place `first[h]` on."""

    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    code_table: np.ndarray | None = None  # (items, codes) where each is written with several tokens


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

    @property
    def each(self) -> int:
        """Tokens of an item."""
        return 1 if self.split.code_table is None else self.split.code_table.shape[1]

    @property
    def window(self) -> int:
        """Items that the context holds."""
        return self.context // self.each

    def _items(self) -> np.ndarray:
        lengths = np.diff(self.split.starts)
        windows = np.where(self.split.first > 0, 1, -(-lengths // self.window))  # else the end alone matters
        records = np.repeat(np.arange(len(windows)), windows)
        return np.stack([records, np.arange(len(records)) - np.repeat(np.cumsum(windows) - windows, windows)], 1)

    def build(self, epochs: np.ndarray, items: np.ndarray) -> Step:
        """The batches that items (N, 2) of epochs (N,), a history and a window of it each, become."""
        records, windows = items[:, 0], items[:, 1]
        split, context = self.split, self.window
        lengths = split.starts[records + 1] - split.starts[records]
        slack = -(-lengths // context) * context - lengths
        moved = (uniform(self.seed, epochs, records, OFFSET) * (slack + 1)).astype(np.int64) * (lengths > context)
        tail = split.first[records] > 0
        begin = np.where(tail, np.maximum(lengths - context, 0), np.maximum(windows * context - moved, 0))
        end = np.where(tail, lengths, np.minimum((windows + 1) * context - moved, lengths))
        order = np.argsort(end - begin, kind="stable")
        sizes = ((end - begin) * self.each)[order].tolist()
        batches, span_records = [], []
        cuts = cut_by_length(sizes, self.worth)
        for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True):
            some = order[start:stop]
            make = self._batch if split.code_table is None else self._written
            batches.append(make(records[some], begin[some], end[some]))
            span_records.append(np.zeros(0, np.int64))
        return Step(batches, span_records, records)

    def _batch(self, records: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Batch:
        """Sequences that predict the items of places `begin` to `end`, each from the one before it."""
        split, base, opener = self.split, self.vocabulary.size, self.vocabulary.opener(Item.name)
        lengths = end - begin
        tokens = np.full((len(records), bucket_length(int(lengths.max(initial=1)))), self.vocabulary.pad)
        targets = np.full(tokens.shape, IGNORE)
        for row, (record, first, stop) in enumerate(zip(records, begin, end, strict=True)):
            at = split.starts[record]
            ids = split.items[at + first : at + stop] + base
            tokens[row, 1 : len(ids)] = ids[:-1]
            tokens[row, 0] = split.items[at + first - 1] + base if first else opener
            skipped = max(split.first[record] - first, 0)
            targets[row, skipped : len(ids)] = ids[skipped:]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(lengths), {}, [])

    def _written(self, records: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Batch:
        """`_batch` where items are written: all of their tokens follow the opener, and each is predicted."""
        split, each = self.split, self.each
        assert split.code_table is not None
        starts = [self.vocabulary.id_ranges[token_type][0] for token_type in self.vocabulary.levels]
        lengths = (end - begin) * each
        tokens = np.full((len(records), bucket_length(int(lengths.max(initial=1)))), self.vocabulary.pad)
        targets = np.full(tokens.shape, IGNORE)
        for row, (record, first, stop) in enumerate(zip(records, begin, end, strict=True)):
            at = split.starts[record]
            ids = (split.code_table[split.items[at + first : at + stop]] + starts).ravel()
            tokens[row, 0] = self.vocabulary.opener(Item.name)
            tokens[row, 1 : len(ids)] = ids[:-1]
            skipped = max(split.first[record] - first, 0) * each
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
