"""The next item of a history whose items are written with several codes: a trie of all items is the grammar, so that
nothing else comes out.

Shapes: B histories, W beams, K codes of a step, T nodes of the trie that are read behind a history, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.device import Device
from plait.core.interruption import pause_point
from plait.modalities.item import item_codes
from plait.model.multimodal import Multimodal

FIRST, WIDEST = 64, 1024  # beams
TOGETHER = 16  # histories that are searched at a time
DEEP = 20  # items, of all and of those that a history lacks, whose chances `log_chances` tells


class Trie:
    """The codes of items, step by step. A node of depth d is a beginning of d codes that some item has; nodes of a
    depth are numbered in the order of their codes, and those of the last depth are the items."""

    def __init__(self, table: np.ndarray) -> None:
        """`table` (items, codes) of integers. Raises ValueError where two rows are the same."""
        self.depth = table.shape[1]
        self.order = np.lexsort(table.T[::-1])  # node of the last depth -> item
        rows = table[self.order]
        differs = np.ones(rows.shape, bool)
        differs[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
        # Of each depth, where in that order a node begins, its last code, and where its children begin.
        self.starts = [np.zeros(1, np.int64), *(np.flatnonzero(column) for column in differs.T)]
        self.codes = [np.zeros(1, np.int64), *(rows[self.starts[d + 1], d] for d in range(self.depth))]
        if len(self.starts[-1]) != len(table):
            raise ValueError("two items have the same codes")
        self.child = [
            np.append(np.searchsorted(below, at), len(below))
            for at, below in zip(self.starts[:-1], self.starts[1:], strict=True)
        ]

    def children(self, depth: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of nodes (N,) of a depth: the place in `nodes` of each child's parent, and the child, both (M,)."""
        first, stop = self.child[depth][nodes], self.child[depth][nodes + 1]
        owner = np.repeat(np.arange(len(nodes)), stop - first)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(stop - first) - (stop - first), stop - first)
        return owner, first[owner] + within

    def path(self, items: np.ndarray) -> list[np.ndarray]:
        """Of each depth but the root's, the nodes (N,) that lie on the way to items (N,)."""
        place = np.empty(len(self.order), np.int64)
        place[self.order] = np.arange(len(self.order))
        return [np.searchsorted(at, place[items], side="right") - 1 for at in self.starts[1:]]

    def alive(self, allowed: np.ndarray) -> list[np.ndarray]:
        """Of each depth, which nodes lead to one of the items that are allowed: (B, items) to (B, nodes) each."""
        total = np.concatenate((np.zeros((len(allowed), 1), np.int64), np.cumsum(allowed[:, self.order], 1)), 1)
        ends = [np.append(at[1:], len(self.order)) for at in self.starts]
        return [total[:, end] > total[:, at] for at, end in zip(self.starts, ends, strict=True)]


@dataclass
class Branches:
    """Nodes that are read behind a history, each seeing it and its own ancestors."""

    tokens: Tensor  # (B, T)
    depth: Tensor  # (B, T) from 1
    sees: Tensor  # (B, T, T)

    @classmethod
    def none(cls, rows: int, device: torch.device) -> Branches:
        empty = torch.zeros(rows, 0, dtype=torch.long, device=device)
        return cls(empty, empty, torch.zeros(rows, 0, 0, dtype=torch.bool, device=device))

    def grown(self, tokens: Tensor, parents: Tensor | None, depth: int) -> Branches:
        """With children (B, W) of nodes at the places `parents` (B, W); of the history itself where that is None."""
        (rows, old), more = self.tokens.shape, tokens.shape[1]
        sees = self.sees.new_zeros(rows, old + more, old + more)
        sees[:, :old, :old] = self.sees
        if parents is not None:
            sees[:, old:, :old] = self.sees.gather(1, parents[..., None].expand(-1, -1, old))
        sees[:, old:, old:] = torch.eye(more, dtype=torch.bool, device=tokens.device)
        depths = torch.cat((self.depth, torch.full_like(tokens, depth)), 1)
        return Branches(torch.cat((self.tokens, tokens), 1), depths, sees)


class NextCodes:
    """Scores the items of a catalogue with semantic codes after histories: log P of an item is the sum over its codes
    of log P among those that the trie has there, so that all items together have the chance of one."""

    def __init__(self, model: Multimodal, device: Device) -> None:
        codes = item_codes(model.modalities)
        assert codes is not None
        self.model, self.device = model, device
        model.eval()
        self.codes = codes.table.cpu().numpy().astype(np.int64)
        self.trie = Trie(self.codes)
        id_ranges = list(model.vocabulary.levels)
        self.first = np.array([model.vocabulary.id_ranges[token_type][0] for token_type in id_ranges])
        with torch.inference_mode():
            self.table = model.reading()
            self.heads = [model.output_embedding.of_type(token_type).float() for token_type in id_ranges]
        self.unplaced = torch.zeros(len(self.codes), dtype=torch.bool, device=device.torch)

    @cached_property
    def rows(self) -> Tensor:
        """What items are, as far as their codes say it, (items, P): the sum of the centres that these stand for."""
        items = item_codes(self.model.modalities)
        assert items is not None
        steps = zip(items.centres, items.table.long().t(), strict=False)
        return torch.stack([centres[codes] for centres, codes in steps]).sum(0)

    # --- questions --------------------------------------------------------------------------------------------

    def best(self, history: np.ndarray, k: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most k of the items that are allowed (items,), the likeliest first, and log P of each."""
        return self._search([history], k, self.trie.alive(allowed[None]))[0]

    def of(self, histories: list[np.ndarray], items: np.ndarray) -> np.ndarray:
        """log P of items (k,) after each of some histories, (N, k)."""
        parts = [histories[i : i + TOGETHER] for i in range(0, len(histories), TOGETHER)]
        return np.concatenate([self._of(part, items) for part in parts])

    def log_chances(self, histories: list[np.ndarray]) -> np.ndarray:
        """As `NextItem.log_chances`, but -inf for all but the 20 likeliest items and the 20 likeliest that the history
        lacks."""
        log_probs = np.full((len(histories), len(self.codes)), -np.inf, np.float32)
        order = np.argsort([len(history) for history in histories], kind="stable")
        for start in range(0, len(order), TOGETHER):
            chunk = order[start : start + TOGETHER]
            read = [histories[i] for i in chunk]
            lacks = np.ones((len(chunk), len(self.codes)), bool)
            for row, history in zip(lacks, read, strict=True):
                row[history] = False
            for alive in (None, self.trie.alive(lacks)):
                for place, (items, chances) in zip(chunk, self._search(read, DEEP, alive), strict=True):
                    log_probs[place, items] = chances
        return log_probs

    # --- reading ----------------------------------------------------------------------------------------------

    def _histories(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L), padded, and lengths (B,): the opener, and the codes of as many of the last items as leave
        room for one more."""
        vocabulary = self.model.vocabulary
        most = self.model.config.backbone.max_length // self.trie.depth - 1
        opener = [vocabulary.opener("item")]
        read = [history[max(len(history) - most, 0) :] for history in histories]
        rows = [np.concatenate((opener, (self.codes[items] + self.first).ravel())) for items in read]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), vocabulary.pad)
        for to, row in zip(tokens, rows, strict=True):
            to[: len(row)] = torch.from_numpy(row)
        return tokens.to(self.device.torch), lengths.to(self.device.torch)

    def _read(self, tokens: Tensor, lengths: Tensor, branches: Branches) -> Tensor:
        """Hidden states at a history's end and at each node behind it, (B, 1 + T, D)."""
        rows, long = tokens.shape
        more = branches.tokens.shape[1]
        pause_point()
        place = torch.arange(long, device=tokens.device)
        positions = torch.cat((place.expand(rows, -1), lengths[:, None] - 1 + branches.depth), 1)
        sees = torch.zeros(rows, long + more, long + more, dtype=torch.bool, device=tokens.device)
        sees[:, :long, :long] = place <= place[:, None]
        sees[:, long:, :long] = (place < lengths[:, None])[:, None]
        sees[:, long:, long:] = branches.sees
        with torch.inference_mode(), self.device.autocast():
            x = F.embedding(torch.cat((tokens, branches.tokens), 1), self.table)
            hidden = self.model.backbone(x, positions=positions, mask=sees[:, None])
        ends = hidden[torch.arange(rows, device=tokens.device), lengths - 1]
        return torch.cat((ends[:, None], hidden[:, long:]), 1).float()

    def _among(self, hidden: Tensor, depth: int, nodes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """log P of each code after nodes (N,) of a depth, whose hidden states are (N, D), among the children that they
        have; and these children, -1 where there is none; both (N, K)."""
        head = self.heads[depth]
        owner, child = self.trie.children(depth, nodes)
        there = np.full((len(nodes), len(head)), -1)
        there[owner, self.trie.codes[depth + 1][child]] = child
        logits = (hidden @ head.t()).cpu().masked_fill_(torch.from_numpy(there < 0), -torch.inf)
        return logits.log_softmax(1), there

    def _of(self, histories: list[np.ndarray], items: np.ndarray) -> np.ndarray:
        path = self.trie.path(items)
        tokens, lengths = self._histories(histories)
        rows, k = len(histories), len(items)
        branches = Branches.none(rows, tokens.device)
        for depth in range(1, self.trie.depth):
            ids = torch.from_numpy(self.codes[items, depth - 1] + self.first[depth - 1]).to(tokens.device)
            before = torch.arange(k, device=tokens.device) + (depth - 2) * k
            branches = branches.grown(ids.expand(rows, -1), before.expand(rows, -1) if depth > 1 else None, depth)
        hidden = self._read(tokens, lengths, branches)
        total = torch.zeros(rows, k)
        for depth in range(self.trie.depth):
            states = hidden[:, :1].expand(-1, k, -1) if depth == 0 else hidden[:, 1 + (depth - 1) * k : 1 + depth * k]
            nodes = np.zeros(k, np.int64) if depth == 0 else path[depth - 1]
            chances, _ = self._among(states.flatten(0, 1), depth, np.tile(nodes, rows))
            codes = torch.from_numpy(np.tile(self.codes[items, depth], rows))
            total += chances.gather(1, codes[:, None]).view(rows, k)
        return total.numpy()

    # --- searching --------------------------------------------------------------------------------------------

    def _search(
        self, histories: list[np.ndarray], k: int, alive: list[np.ndarray] | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each history at most k items and their log P, the likeliest first; where `alive` says, history by
        history, which nodes may be passed, of those behind them. A beam is right where nothing that it dropped was
        likelier than the last item found, since no item is likelier than its beginning; else it is searched again with
        a wider one."""
        best: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0))] * len(histories)
        left, width = list(range(len(histories))), max(FIRST, 2 * k)
        while left:
            # Wider beams are read for fewer histories at a time.
            count = max(TOGETHER * FIRST // width, 1)
            again = []
            for start in range(0, len(left), count):
                chunk = left[start : start + count]
                chunk_nodes = None if alive is None else [nodes[chunk] for nodes in alive]
                answers = self._beam([histories[i] for i in chunk], width, chunk_nodes)
                for place, (items, chances, dropped) in zip(chunk, answers, strict=True):
                    best[place] = items[:k], chances[:k]
                    if dropped > (chances[k - 1] if len(chances) >= k else -np.inf) and width < WIDEST:
                        again.append(place)
            left, width = again, min(4 * width, WIDEST)
        return best

    def _beam(
        self, histories: list[np.ndarray], width: int, alive: list[np.ndarray] | None
    ) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """For each history items, log P of each in falling order, and log P of the likeliest beginning dropped."""
        tokens, lengths = self._histories(histories)
        rows = len(histories)
        branches = Branches.none(rows, tokens.device)
        nodes, scores = np.zeros((rows, 1), np.int64), torch.zeros(rows, 1)
        dropped = torch.full((rows,), -torch.inf)
        for depth in range(self.trie.depth):
            beams = nodes.shape[1]
            hidden = self._read(tokens, lengths, branches)[:, -beams:]
            chances, there = self._among(hidden.flatten(0, 1), depth, nodes.ravel())
            codes = chances.shape[1]
            total = scores[..., None] + chances.view(rows, beams, codes)
            open_ = there >= 0
            if alive is not None:
                open_ &= alive[depth + 1][np.repeat(np.arange(rows), beams)[:, None], there]
            total = total.masked_fill(torch.from_numpy(~open_).view(total.shape), -torch.inf).view(rows, -1)
            kept = min(width, total.shape[1])
            best, place = total.topk(min(kept + 1, total.shape[1]), dim=1)
            if best.shape[1] > kept:
                dropped = torch.maximum(dropped, best[:, kept])
            scores, place = best[:, :kept], place[:, :kept]
            # A beam that leads nowhere has no chance; it stays, as the first node, so that all rows are as long.
            nodes = np.take_along_axis(there.reshape(rows, -1), place.numpy(), 1).clip(min=0)
            if depth + 1 < self.trie.depth:
                ids = torch.from_numpy(self.trie.codes[depth + 1][nodes] + self.first[depth]).to(tokens.device)
                old = branches.tokens.shape[1]
                parents = (place // codes + old - beams).to(tokens.device) if depth else None
                branches = branches.grown(ids, parents, depth + 1)
        answers = []
        for row in range(rows):
            there_ = torch.isfinite(scores[row]).numpy()
            answers.append((self.trie.order[nodes[row][there_]], scores[row].numpy()[there_], float(dropped[row])))
        return answers
