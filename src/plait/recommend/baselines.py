"""What recommending can be without learning a network: popularity, neighbours, EASE, and directed co-occurrence.

Each scores all items for histories. The last is the one to beat: what followed what, and how soon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RECENT = 0.1  # share of the interactions, the last in time, that recent popularity counts
WINDOW, DECAY = 10, 3.0  # of directed co-occurrence, in places
MOST = 6000  # items up to which every pair of them fits


@dataclass
class Interactions:
    """Training histories one after the other: `items[starts[u] : starts[u + 1]]` are user u's, below `count`."""

    items: np.ndarray
    starts: np.ndarray
    count: int
    times: np.ndarray | None = None  # of each, where they are known

    def popularity(self) -> np.ndarray:
        """How often each item stands there, (count,)."""
        return np.bincount(self.items, minlength=self.count).astype(np.float64)

    def recent_popularity(self) -> np.ndarray | None:
        """The same of the last tenth of the interactions in time; None where times are not known."""
        if self.times is None or not len(self.times):
            return None
        late = self.times >= np.quantile(self.times, 1 - RECENT)
        return np.bincount(self.items[late], minlength=self.count).astype(np.float64)


class Follows:
    """Directed co-occurrence: how often b came within `WINDOW` places after a, each time weighted by exp(-places /
    DECAY), as a share of what came after a. A history scores b by its last items in the same way."""

    def __init__(self, starts: np.ndarray, after: np.ndarray, weight: np.ndarray) -> None:
        """What came after item a is `after[starts[a] : starts[a + 1]]`, each with its `weight`."""
        self.count, self.starts, self.after, self.weight = len(starts) - 1, starts, after, weight

    @classmethod
    def counted(cls, data: Interactions, most: int | None = None) -> Follows:
        """Of training histories; with `most`, so many of an item's followers, the most frequent ones."""
        owner = np.repeat(np.arange(len(data.starts) - 1), np.diff(data.starts))
        keys, weights = [], []
        for gap in range(1, WINDOW + 1):
            same = owner[gap:] == owner[:-gap]
            keys.append(data.items[:-gap][same].astype(np.int64) * data.count + data.items[gap:][same])
            weights.append(np.full(len(keys[-1]), np.exp(-gap / DECAY)))
        key, place = np.unique(np.concatenate(keys), return_inverse=True)
        weight = np.bincount(place, np.concatenate(weights))
        first = key // data.count
        total = np.bincount(first, weight, minlength=data.count)
        share = weight / total[first]
        if most is not None:
            starts = np.searchsorted(first, np.arange(data.count + 1))
            order = np.lexsort((-share, first))
            kept = np.sort(order[np.arange(len(order)) - starts[first] < most])
            key, first, share = key[kept], first[kept], share[kept]
        return cls(np.searchsorted(first, np.arange(data.count + 1)), key % data.count, share)

    def scores(self, history: np.ndarray) -> np.ndarray:
        """(count,) for a history, oldest first."""
        scores = np.zeros(self.count)
        for gap, item in enumerate(history[::-1][:WINDOW], 1):
            followers = slice(self.starts[item], self.starts[item + 1])
            scores[self.after[followers]] += np.exp(-gap / DECAY) * self.weight[followers]
        return scores


class Neighbours:
    """Item-to-item: cosine of who chose both (`item-kNN`), or EASE, a ridge regression of each item on all others in
    closed form (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019)."""

    def __init__(self, data: Interactions, ease: float | None = None) -> None:
        owner = np.repeat(np.arange(len(data.starts) - 1), np.diff(data.starts))
        chosen = np.zeros((len(data.starts) - 1, data.count), np.float32)
        chosen[owner, data.items] = 1
        gram = (chosen.T @ chosen).astype(np.float64)
        if ease is None:
            size = np.sqrt(np.diag(gram)).clip(1e-9)
            self.weight = gram / size / size[:, None]
        else:
            inverse = np.linalg.inv(gram + ease * np.eye(data.count))
            self.weight = -inverse / np.diag(inverse)
        np.fill_diagonal(self.weight, 0)

    def scores(self, history: np.ndarray) -> np.ndarray:
        """(count,) for a history; its order does not matter."""
        return self.weight[np.unique(history)].sum(0)
