"""Histories of items as sequences: every item of a window is predicted from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from plait.core.device import Device
from plait.core.rng import uniform
from plait.data.tokens import Ids
from plait.modalities.item import (
    Item,
    item_rows,
)
from plait.model.multimodal import IGNORE, Batch, Multimodal, bucket_length
from plait.recommend.write_histories import TEST, TRAIN, VAL, Histories
from plait.training.batches import OFFSET, Items, Sampler, Step
from plait.training.split import Split


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
    part = {"train": TRAIN, "val": VAL, "test": TEST}[split]
    usable = (histories.parts <= part) & (histories.items < known)
    owner = histories.owners()
    there = np.zeros(len(histories), bool)
    there[owner[usable & (histories.parts == part)]] = True
    usable &= there[owner]
    chosen = np.flatnonzero(there)
    counts = np.bincount(owner[usable], minlength=len(histories))[chosen]
    before = np.bincount(owner[usable & (histories.parts < part)], minlength=len(histories))[chosen]
    return HistorySplit(
        ids=Ids([pa.array([histories.users[i] for i in chosen], pa.string())]),
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

    def _items(self) -> Items:
        lengths = np.diff(self.split.starts)
        windows = np.where(self.split.first > 0, 1, -(-lengths // self.window))  # else the end alone matters
        return Items(windows)

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
        cuts = self.cuts(sizes)
        for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True):
            places = order[start:stop]
            make = self._batch if split.code_table is None else self._written
            batches.append(make(records[places], begin[places], end[places]))
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
    module = item_rows(model.modalities)
    assert module is not None
    training, base, gains = model.training, model.vocabulary.size, []
    model.eval()
    with device.autocast():
        items = module.rows()
        table = model.reading(items)
    for number in range(min(sampler.steps_per_epoch, -(-most // sampler.batch_size))):
        for batch in sampler.step(number).batches:
            is_target = batch.targets != IGNORE
            rows = is_target.any(1).nonzero()[:, 0]
            places = (is_target.shape[1] - 1 - is_target.flip(1).int().argmax(1))[rows]
            target = batch.targets[rows, places] - base
            with device.autocast():
                hidden = model(batch.to(device.torch), table)[rows, places]
            scores = (hidden.float() @ items.float().t()).cpu()
            target_score = scores.gather(1, target[:, None])
            before = batch.tokens[rows] - base
            known = (before >= 0) & (torch.arange(before.shape[1]) <= places[:, None])
            row, place = known.nonzero(as_tuple=True)
            scores[row, before[row, place]] = -torch.inf
            better = (scores > target_score).sum(1)
            gains += [1 / math.log2(rank + 2) if rank < 10 else 0.0 for rank in better.tolist()]
    model.train(training)
    return float(np.mean(gains)) if gains else 0.0
