"""How well one thing is done, beside the simple alternative."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.evaluation.learnt import ByHeart

SURE = 2.0  # standard errors from which a difference counts


@dataclass(frozen=True)
class Outcome:
    """How well one thing is done, beside the simple alternative on the same records.

    `figure` names what was measured, `subject` of what ("label from image"). `lead_stderr` is the paired standard error
    of the difference to the alternative. `guess` is what guessing has. `confused` are pairs of labels, truth first, the
    most frequent first. `share` says that the figure is a share of 1, else it is a plain number. `unit` is what `n`
    counts. `advice` is the next step, where the figures do not tell it. `is_alternative` says that the alternative
    gives the same answers everywhere: it is what the run asks. `by_heart` says that the run learnt train by heart.
    """

    task: str
    subject: str
    figure: str
    value: float
    stderr: float | None
    n: int
    guess: float | None = None
    alternative: str | None = None
    alternative_value: float | None = None
    lead_stderr: float | None = None
    higher_is_better: bool = True
    share: bool = True
    unit: str = "records"
    advice: str = ""
    is_alternative: bool = False
    by_heart: ByHeart | None = None
    confused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """The lead over the alternative, positive where the model is better; 0 without one."""
        if self.alternative_value is None:
            return 0.0
        lead = self.value - self.alternative_value
        return lead if self.higher_is_better else -lead

    @property
    def learnt(self) -> bool:
        """Whether the figure is clearly better than guessing; so where nothing is known of guessing."""
        if self.guess is None:
            return True
        lead = self.value - self.guess if self.higher_is_better else self.guess - self.value
        return lead > SURE * (self.stderr or 0.0)

    @property
    def better(self) -> bool | None:
        """Whether the model is better than the alternative; None where the records do not tell."""
        if self.alternative_value is None:
            return None
        if abs(self.gain) <= SURE * (self.lead_stderr or 0.0):
            return None
        return self.gain > 0
