"""What an evaluation comes to: one sentence and a next step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SURE = 2.0  # standard errors from which a difference counts


@dataclass(frozen=True)
class Outcome:
    """How well one thing is done, beside the simple alternative on the same records.

    `figure` names what was measured, `subject` of what ("label from image"). `lead_stderr` is the paired standard error
    of the difference to the alternative. `guess` is what guessing has. `confused` are pairs of labels, truth first, the
    most frequent first. `share` says that the figure is a share of 1, else it is a plain number.
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


@dataclass(frozen=True)
class Verdict:
    """The first thing to read of an evaluation. `better` is None where the records do not tell, or nothing was
    compared; `outcome` is what it rests on."""

    sentence: str
    next_step: str
    learnt: bool
    better: bool | None
    outcome: Outcome

    def __str__(self) -> str:
        return f"{self.sentence} {self.next_step}"


def make_verdict(outcomes: list[Outcome]) -> Verdict | None:
    """The verdict on the first outcome, which is of what the run is for; None where nothing was measured."""
    if not outcomes:
        return None
    outcome = outcomes[0]
    if not outcome.learnt:
        assert outcome.guess is not None
        guess = _number(outcome, outcome.guess)
        sentence = f"Nothing was learnt: {_figure(outcome)}, where guessing has {guess}{_of(outcome)}."
        step = "Next: train longer (--minutes), or look at whether inputs and answers of the data belong together."
        return Verdict(sentence, step, False, outcome.better, outcome)
    sentence = f"{_figure(outcome)}{_of(outcome)}"
    if outcome.alternative is None or outcome.alternative_value is None:
        return Verdict(f"{sentence}.", _next(outcome), True, None, outcome)
    other = f"{_number(outcome, outcome.alternative_value)} of {outcome.alternative}"
    if outcome.better is None:
        told = f", against {other}: these records cannot tell them apart"
    elif outcome.better:
        told = f", against {other}: worth it"
    else:
        told = f", against {other}, which is better"
    return Verdict(f"{sentence}{told}.", _next(outcome), True, outcome.better, outcome)


def _number(outcome: Outcome, value: float) -> str:
    return f"{value:.1%}" if outcome.share else f"{value:.3g}"


def _figure(outcome: Outcome) -> str:
    error = ""
    if outcome.stderr is not None and not math.isnan(outcome.stderr):
        error = f" ± {outcome.stderr * 100:.1f}" if outcome.share else f" ± {outcome.stderr:.2g}"
    return f"{_number(outcome, outcome.value)}{error} {outcome.figure}"


def _of(outcome: Outcome) -> str:
    return f" ({outcome.subject}, {outcome.n:,} records)"


def _next(outcome: Outcome) -> str:
    """What would help most."""
    if outcome.better is False and outcome.task == "recognition":
        return f"Next: take {outcome.alternative}, which `plait classify` asks too; or train longer (--minutes)."
    if outcome.better is False:
        return "Next: train longer (--minutes), or give more records."
    if outcome.confused:
        pairs = ", ".join(f"{truth} taken for {said}" for truth, said in outcome.confused[:2])
        return f"Wrong most: {pairs}. Next: more records of these, or train longer (--minutes)."
    return "Next: more records, or train longer (--minutes)."
