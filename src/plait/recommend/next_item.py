"""The next item of a history: one pass of the backbone, the softmax over the catalogue, and what followed what."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from plait.core.device import Device
from plait.core.interruption import pause_point
from plait.modalities.item import item_rows
from plait.model.multimodal import Batch, Multimodal
from plait.recommend.mixture import Followed, mixed
from plait.recommend.trie import NextCodes

TOKENS = 16_384  # of histories that are read at a time
CELLS = 2**24  # scores that exist at a time


def next_item_scorer(model: Multimodal, device: Device, followed: Followed | None = None) -> NextItem | NextCodes:
    """What foretells the next item of a model of histories, with what followed what where every item has a row."""
    return NextItem(model, device, followed) if model.row_modality is not None else NextCodes(model, device)


class NextItem:
    """Scores all items of a model's catalogue after histories; its rows are taken once."""

    def __init__(self, model: Multimodal, device: Device, followed: Followed | None = None) -> None:
        items = item_rows(model.modalities)
        assert items is not None
        self.model, self.device, self.followed = model, device, followed
        model.eval()
        with torch.inference_mode(), device.autocast():
            self.rows = items.rows().detach()  # without content, the parameter itself
            self.table = model.reading(self.rows)
        # Without content nothing is known of an item that no history has.
        self.unplaced = ~self.rows.float().abs().sum(1).bool()

    def log_chances(self, histories: list[np.ndarray]) -> np.ndarray:
        """log P(item | history) in nats, (N, items) float32; -inf for items that cannot be placed. Of a history, item
        numbers with the oldest first, as much of its end is read as the context holds."""
        scores_of_all = np.zeros((len(histories), len(self.rows)), np.float32)
        for places, scores in self.walk(histories):
            scores_of_all[places] = scores
        return scores_of_all

    def best(self, history: np.ndarray, k: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most k of the items that are allowed (items,), the likeliest first, and log P of each."""
        scores = self.log_chances([history])[0]
        scores[~allowed] = -np.inf
        order = np.argsort(-scores, kind="stable")[: min(k, int(np.isfinite(scores).sum()))]
        return order, scores[order]

    def of(self, histories: list[np.ndarray], items: np.ndarray) -> np.ndarray:
        """log P of items (k,) after each of some histories, (N, k)."""
        return self.log_chances(histories)[:, items]

    def walk(self, histories: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`log_chances` in pieces, the shortest histories first: their places, and their rows."""
        lengths = np.array([min(len(h) + 1, self.model.config.backbone.max_length) for h in histories])
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            most = max(CELLS // len(self.rows), 1)
            while stop < len(order) and stop - start < most and lengths[order[stop]] * (stop + 1 - start) <= TOKENS:
                stop += 1
            chunk = order[start:stop]
            pause_point()
            yield chunk, self._scores([histories[i] for i in chunk])
            start = stop

    def _scores(self, histories: list[np.ndarray]) -> np.ndarray:
        vocabulary, longest = self.model.vocabulary, self.model.config.backbone.max_length
        opener = vocabulary.opener("item")
        ids = [np.concatenate(([opener], history + vocabulary.size))[-longest:] for history in histories]
        lengths = torch.tensor([len(row) for row in ids])
        tokens = torch.full((len(ids), int(lengths.max())), vocabulary.pad)
        for row, part in zip(tokens, ids, strict=True):
            row[: len(part)] = torch.from_numpy(part.astype(np.int64))
        with torch.inference_mode():
            batch = Batch(tokens, tokens, lengths, {}, []).to(self.device.torch)
            with self.device.autocast():
                hidden = self.model(batch, self.table)
            last = hidden[torch.arange(len(ids)), batch.lengths - 1]
            logits = last.float() @ self.rows.float().t()  # in full: among thousands, bf16 would make ties
            logits[:, self.unplaced] = -torch.inf
            chances = logits.log_softmax(1).cpu().numpy()
        return chances if self.followed is None else mixed(chances, histories, self.followed, self.followed.share)
