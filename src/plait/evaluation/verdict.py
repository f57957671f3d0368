"""What an evaluation comes to: one sentence and a next step."""

from __future__ import annotations

import math

from plait.evaluation.findings import Verdict
from plait.evaluation.metrics import interval
from plait.evaluation.outcome import Outcome

FEWEST = 50  # records below which more of them help before anything else


def make_verdict(outcomes: list[Outcome]) -> Verdict | None:
    """The verdict on the first outcome, which is of what the run is for; None where nothing was measured."""
    if not outcomes:
        return None
    outcome = outcomes[0]
    if not outcome.learnt:
        assert outcome.guess is not None
        guess = _number(outcome, outcome.guess)
        figures = f"{_figure(outcome)}, where guessing has {guess}{_of(outcome)}."
        sentence = f"Nothing was learnt: {figures}"
        step = "train longer (--minutes), or look at whether inputs and answers of the data belong together."
        if outcome.by_heart is not None:
            sentence = f"{outcome.by_heart} Nothing else was learnt: {figures}"
            step = outcome.by_heart.advice
        elif outcome.n < FEWEST:
            step = f"more records: {outcome.n} tell little; then look at whether inputs and answers belong together."
        return Verdict(sentence, step, outcome.better, learnt=False)
    sentence = f"{_figure(outcome)}{_of(outcome)}"
    if outcome.alternative is None or outcome.alternative_value is None:
        return Verdict(f"{sentence}.", _next(outcome))
    if outcome.is_alternative:
        return Verdict(f"{sentence}, by {outcome.alternative}, which is what answers here.", _next(outcome))
    other = f"{_number(outcome, outcome.alternative_value)} of {outcome.alternative}"
    if outcome.better is None:
        comparison = f", against {other}: these records cannot tell them apart"
    elif outcome.better:
        comparison = f", against {other}: worth it"
    else:
        comparison = f", against {other}, which is better"
    heart = f" {outcome.by_heart}" if outcome.by_heart is not None else ""
    return Verdict(f"{sentence}{comparison}.{heart}", _next(outcome), outcome.better)


def _number(outcome: Outcome, value: float) -> str:
    return f"{value:.1%}" if outcome.share else f"{value:.3g}"


def _figure(outcome: Outcome) -> str:
    return f"{_number(outcome, outcome.value)} {outcome.figure}"


def _of(outcome: Outcome) -> str:
    """What was asked, of how many records, and the 95 % interval of the figure."""
    likely = ""
    if outcome.stderr is not None and not math.isnan(outcome.stderr):
        low, high = interval(outcome.value, outcome.stderr, outcome.n, outcome.share)
        likely = f", likely {low:.1%} to {high:.1%}" if outcome.share else f", likely {low:.3g} to {high:.3g}"
    return f" ({outcome.subject}, {outcome.n:,} {outcome.unit}{likely})"


def _next(outcome: Outcome) -> str:
    """What would help most."""
    if outcome.advice:
        return outcome.advice
    if outcome.by_heart is not None:
        return outcome.by_heart.advice
    if outcome.better is False and outcome.task == "recognition":
        return f"take {outcome.alternative}, which `plait classify` asks too; or train longer (--minutes)."
    if outcome.better is False:
        return "train longer (--minutes), or give more records."
    if outcome.confused:
        pairs = ", ".join(f"{truth} taken for {predicted}" for truth, predicted in outcome.confused[:2])
        longer = "" if outcome.is_alternative else ", or train longer (--minutes)"  # which changes nothing for it
        return f"more records of what is confused most ({pairs}){longer}."
    if outcome.is_alternative:
        return "more records."
    return "more records, or train longer (--minutes)."
