"""What a model answers with: typed results in place of bare tuples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import NamedTuple


class Prediction(NamedTuple):
    """A label and how likely it is among the labels that were asked for.

    Attributes:
        label: the label's text.
        probability: between 0 and 1.
    """

    label: str
    probability: float


class Estimate(NamedTuple):
    """A number that was predicted.

    Attributes:
        value: the prediction.
        low: the lower end of the interval that holds the truth in 9 of 10 cases, as on validation records.
        high: its upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Segment:
    """Some words of a recording.

    Attributes:
        start, end: seconds from the recording's beginning.
        text: what is said.
        words: each word with its own times, where they were asked for.
    """

    start: float
    end: float
    text: str
    words: tuple[Segment, ...] = ()


class Predictions(list[Prediction]):
    """The predictions for one input, likeliest first; shows itself as a table in notebooks.

    Attributes:
        ood_score: in [0, 1], the share of validation records that look more familiar than this input: near 1 for what
            is unlike all that was learnt. None where it was not calibrated, as for labels of one's own.
        none_of_these: whether the score is above the threshold that was set on validation records.
        chosen: of a column where a record has several labels, those that hold by the thresholds that were set on
            validation records; each probability is then of that label alone. None where a record has one label.
    """

    def __init__(
        self,
        predictions: Iterable[Prediction] = (),
        ood_score: float | None = None,
        none_of_these: bool = False,
        chosen: list[str] | None = None,
    ) -> None:
        super().__init__(predictions)
        self.ood_score, self.none_of_these, self.chosen = ood_score, none_of_these, chosen

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td>{escape(label)}</td><td style="text-align:right">{probability:.3f}</td></tr>'
            for label, probability in self
        )
        return f"<table><tr><th>label</th><th>probability</th></tr>{rows}</table>"
