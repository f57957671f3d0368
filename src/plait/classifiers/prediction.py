"""What a classifier answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Prediction(NamedTuple):
    """A label and its calibrated probability among the labels of its column."""

    label: str
    probability: float


class Classification(list[Prediction]):
    """The predictions for one input, the likeliest first.

    `ood_score` in [0, 1] is the share of validation records that look more familiar than this input: near 1 for what is
    unlike all that was learnt. None where it was not calibrated. `none_of_these` says that the score is above the
    threshold that was fitted on validation records.
    """

    def __init__(
        self, predictions: Iterable[Prediction], ood_score: float | None = None, none_of_these: bool = False
    ) -> None:
        super().__init__(predictions)
        self.ood_score = ood_score
        self.none_of_these = none_of_these
