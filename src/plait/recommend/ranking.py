"""Ranking every item for held-out choices: what is asked, where the right item stands, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plait.core.rng import uniform
from plait.recommend.baselines import Interactions
from plait.recommend.write_histories import HIDDEN, TRAIN, Histories

DEPTHS = (1, 5, 10, 20)
CHUNK = 512  # histories that are scored at a time
TIES = 212  # key of `uniform`

Scores = Callable[[list[np.ndarray]], np.ndarray]  # histories to (N, items)


@dataclass
class Targets:
    """What is asked: after `histories[i]`, user `users[i]` chose `items[i]`."""

    users: np.ndarray
    items: np.ndarray
    histories: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.items)

    def only(self, keep: np.ndarray) -> Targets:
        places = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Targets(self.users[places], self.items[places], [self.histories[i] for i in places])


def targets_of(histories: Histories, parts: tuple[int, ...]) -> Targets:
    """Every interaction of these parts, after all that the user chose before and that is not hidden."""
    owner, usable = histories.owners(), histories.parts != HIDDEN
    places = np.flatnonzero(np.isin(histories.parts, parts))
    users, items, before = [], [], []
    for place in places:
        start = histories.starts[owner[place]]
        history = histories.items[start:place][usable[start:place]]
        if len(history):
            users.append(owner[place])
            items.append(histories.items[place])
            before.append(history.astype(np.int64))
    return Targets(np.array(users, np.int64), np.array(items, np.int64), before)


def training_histories(histories: Histories, items: int) -> Interactions:
    """What users chose in train, for methods that count; of so many items."""
    keep = histories.parts == TRAIN
    counts = np.bincount(histories.owners()[keep], minlength=len(histories))
    times = None if histories.times is None else histories.times[keep]
    return Interactions(histories.items[keep], np.concatenate(([0], np.cumsum(counts))), items, times)


@dataclass
class Ranks:
    """Where the right item stands among all, 0 for the first: with what was seen left out, and with it."""

    masked: np.ndarray
    whole: np.ndarray
    lists: np.ndarray  # (N, 10) the first ones, with what was seen left out


@dataclass(frozen=True)
class RankMetric:
    """A figure of ranks: hr, ndcg or mrr of the first `depth`, with what was seen left out or, unmasked, with it."""

    name: str
    depth: int
    unmasked: bool = False

    def __str__(self) -> str:
        return f"{self.name}_at_{self.depth}{'_unmasked' if self.unmasked else ''}"

    @property
    def shown(self) -> str:
        """Its name for people: HR@10."""
        return f"{self.name.upper()}@{self.depth}{', with what was seen' if self.unmasked else ''}"

    @property
    def expected(self) -> float:
        """The sum over the ranks of what a hit counts there: chance is this over the number of items."""
        return self._gain(self.depth)

    def chance(self, among: np.ndarray) -> float:
        """The mean over users of what guessing among so many items (N,) has; in fewer than `depth` all are named."""
        sizes, place = np.unique(np.maximum(among, 1), return_inverse=True)
        each = np.array([self._gain(min(self.depth, int(size))) / size for size in sizes])
        return float(each[place].mean())

    def _gain(self, depth: int) -> float:
        places = np.arange(depth)
        gain = {"hr": np.ones(depth), "ndcg": 1 / np.log2(places + 2.0), "mrr": 1 / (places + 1.0)}
        return float(gain[self.name].sum())


HR_10, NDCG_10, HR_20 = RankMetric("hr", 10), RankMetric("ndcg", 10), RankMetric("hr", 20)


@dataclass
class Measured:
    """A method's figures, one value a target."""

    values: dict[RankMetric, np.ndarray]
    lists: np.ndarray  # (N, 10)

    @classmethod
    def of(cls, ranks: Ranks) -> Measured:
        values = {}
        for unmasked, rank in ((False, ranks.masked), (True, ranks.whole)):
            for depth in DEPTHS:
                hit = rank < depth
                values[RankMetric("hr", depth, unmasked)] = hit.astype(float)
                values[RankMetric("ndcg", depth, unmasked)] = hit / np.log2(rank + 2.0)
                values[RankMetric("mrr", depth, unmasked)] = hit / (rank + 1.0)
        return cls(values, ranks.lists)


def rank(
    targets: Targets,
    scores: Scores,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
    chunk: int = CHUNK,
) -> Ranks:
    """The rank of every target among all items; equal scores are put in an order drawn by the seed."""
    masked, unmasked = np.zeros(len(targets), np.int64), np.zeros(len(targets), np.int64)
    lists = np.zeros((len(targets), 10), np.int64)
    order = np.argsort([len(h) for h in targets.histories], kind="stable")  # like lengths together
    for start in range(0, len(targets), chunk):
        places = order[start : start + chunk]
        report(start)
        scored = scores([targets.histories[i] for i in places])
        luck = uniform(seed, np.arange(scored.shape[1]), TIES)
        for row, place in zip(scored, places, strict=True):
            item = targets.items[place]
            ahead = (row > row[item]) | ((row == row[item]) & (luck > luck[item]))
            unmasked[place] = int(ahead.sum())
            seen = np.unique(targets.histories[place])
            masked[place] = unmasked[place] - int(ahead[seen].sum())
            row[seen[seen != item]] = -np.inf
            first = np.argpartition(-row, min(10, len(row) - 1))[:10]
            lists[place, : len(first)] = first[np.argsort(-row[first], kind="stable")]
    return Ranks(masked, unmasked, lists)
