"""Names of objectives, their weights, and the columns of the training log that hold their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTRASTIVE = "contrastive"
_DEFAULT_WEIGHTS = {CONTRASTIVE: 0.5}  # of the others: 1
_COLUMN = "loss/"


@dataclass(frozen=True)
class Objective:
    """What is minimised: the likelihood of a token type, or the agreement of two modalities.

    Attributes:
        kind: The token type, as "text", or "contrastive"; what weights are given for.
        part: Which one of its kind: a pair of modalities, as "audio-image", or a digit of a code; "" for the only one.
    """

    kind: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.part}" if self.part else self.kind

    @classmethod
    def parse(cls, name: str) -> Objective:
        """From its name in logs and checkpoints."""
        kind, _, part = name.partition(":")
        return cls(kind, part)

    @classmethod
    def of_pair(cls, first: str, second: str) -> Objective:
        """The agreement of two modalities, whatever their order."""
        return cls(CONTRASTIVE, "-".join(sorted((first, second))))

    @property
    def short(self) -> str:
        """As progress bars have it: the pair alone, of a contrastive one."""
        return self.part if self.kind == CONTRASTIVE and self.part else str(self)

    def weight(self, weights: Mapping[str, float]) -> float:
        """What the recipe says of its kind, else .5 for a contrastive one and 1 for others."""
        return weights.get(self.kind, _DEFAULT_WEIGHTS.get(self.kind, 1.0))


def weighted_sum(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """What training minimises, of losses by objective; infinite where nothing was measured."""
    if not losses:
        return math.inf
    return sum(loss * Objective.parse(name).weight(weights) for name, loss in losses.items())


def loss_column(objective: str) -> str:
    """The column of a row of `log.jsonl` that holds an objective's loss."""
    return f"{_COLUMN}{objective}"


def losses_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Objective -> loss, of a row of `log.jsonl`."""
    return {name.removeprefix(_COLUMN): value for name, value in row.items() if name.startswith(_COLUMN)}
