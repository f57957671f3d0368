"""What a model answers with: typed results in place of bare tuples."""

from __future__ import annotations

from collections.abc import Iterable
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


class Predictions(list[Prediction]):
    """The predictions for one input, likeliest first; shows itself as a table in notebooks."""

    def __init__(self, predictions: Iterable[Prediction] = ()) -> None:
        super().__init__(predictions)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td>{escape(label)}</td><td style="text-align:right">{probability:.3f}</td></tr>'
            for label, probability in self
        )
        return f"<table><tr><th>label</th><th>probability</th></tr>{rows}</table>"
