"""What the embedding space of a model is worth for finding media by words, measured on validation records."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SPACE = "space.json"
DEPTH = 10


@dataclass(frozen=True)
class SpaceQuality:
    """`trust` in [0, 1] is how far the share of texts that find their record among the first ten lies above chance: 0
    for a space that has learnt nothing. `unrelated` is the cosine below which 95 % of unrelated pairs lie; `n` texts
    were asked for."""

    trust: float
    unrelated: float
    n: int

    def save(self, folder: Path) -> None:
        (folder / SPACE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def load_space(folder: Path) -> SpaceQuality | None:
    """What `save` wrote; None where it was not measured."""
    path = folder / SPACE
    return SpaceQuality(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def measure_space(texts: np.ndarray, media: np.ndarray, related: np.ndarray) -> SpaceQuality:
    """From unit vectors of texts (Q, E) and media (N, E), and which belong together (Q, N)."""
    near = texts @ media.T
    best = np.argsort(-near, axis=1, kind="stable")[:, :DEPTH]
    hits = np.take_along_axis(related, best, 1).any(1).mean()
    share = related.sum(1) / related.shape[1]
    chance = float((1 - (1 - share) ** min(DEPTH, related.shape[1])).mean())
    trust = float(np.clip((hits - chance) / max(1 - chance, 1e-6), 0, 1))
    # What chance alone may give, two standard errors of it, is no trust.
    noise = 2 * float(np.sqrt(chance * (1 - chance) / len(texts))) / max(1 - chance, 1e-6)
    others = near[~related]
    unrelated = float(np.quantile(others, 0.95)) if len(others) else -1.0
    return SpaceQuality(trust if trust > noise else 0.0, unrelated, len(texts))
