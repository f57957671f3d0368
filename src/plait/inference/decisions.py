"""Typed questions about one input, answered by probabilities: is it so, which of these, how much on a scale.

A model answers what it knows: a model of a run what its columns of labels say, by the classifier that was calibrated on
validation records; an imported language model or CLIP weighs the options by their likelihood, without calibration.
What neither can weigh is refused, question by question, and so is an input that is unlike all that was learnt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plait.core.errors import PlaitError
from plait.inference import scoring
from plait.inference.base import Model, Verb
from plait.inference.results import Predictions

if TYPE_CHECKING:
    from plait.inference.model import PlaitModel

Kind = Literal["predicate", "choice", "score"]
YES, NO = ("yes", "true", "1"), ("no", "false", "0")


@dataclass(frozen=True)
class Option:
    """One possible answer, and what it means."""

    value: str
    description: str = ""


@dataclass(frozen=True)
class Question:
    """A question: `predicate` (is it so?), `choice` (which option?) or `score` (which of the ordered options?)."""

    kind: Kind
    instructions: str
    options: tuple[Option, ...] = ()
    name: str | None = None


@dataclass
class Decision:
    """What is known of one question.

    Attributes:
        probabilities: of each option, in its order; of a predicate that it is so, and that it is not. Empty where the
            question is refused.
        refusal: why there is no answer; empty where there is one.
        calibrated: whether the probabilities were calibrated on validation records.
        column: the column of labels that answers, if one does.
        ood_score: how unlike all that was learnt the input is, in [0, 1], where that was calibrated.
    """

    question: Question
    probabilities: list[float] = field(default_factory=list)
    refusal: str = ""
    calibrated: bool = False
    column: str | None = None
    ood_score: float | None = None

    @property
    def best(self) -> int:
        """The place of the likeliest option."""
        return int(np.argmax(self.probabilities))

    @property
    def expected(self) -> float:
        """The mean place on the scale."""
        return float(sum(place * chance for place, chance in enumerate(self.probabilities)))

    @property
    def confidence(self) -> float:
        """How far from a guess: 0 where all options are alike, 1 where one is certain; of a score by the distance of
        the others on the scale."""
        count, best = len(self.probabilities), self.best
        if count < 2:
            return 1.0
        places = np.arange(count)
        if self.question.kind == "score":
            spread = float(np.dot(self.probabilities, np.abs(places - best)))
            guess = float(np.abs(places - (count - 1) / 2).mean())
            return max(0.0, 1 - spread / guess)
        return max(0.0, (self.probabilities[best] - 1 / count) / (1 - 1 / count))


def decide(model: Model, value: Any, questions: Sequence[Question]) -> list[Decision]:
    """Answer questions about one input, or a list of inputs that are read in order. Raises PlaitError where the input
    cannot be read; what cannot be answered is refused, question by question."""
    return [_Decider(model, value).answer(question) for question in questions]


class _Decider:
    """Answers the questions about one input; each column is asked once."""

    def __init__(self, model: Model, value: Any) -> None:
        self.model, self.value = model, value
        self.asked: dict[str, Predictions] = {}

    def answer(self, question: Question) -> Decision:
        if self._columns() or self.model.numbers:
            return self._learnt(question)
        plait_model = self.model.plait_model
        if plait_model is not None and not plait_model.columns:
            return self._by_likelihood(plait_model, question)
        if Verb.CLASSIFY in self.model.verbs and not self.model.columns and question.kind == "choice":
            return self._zero_shot(question)
        return Decision(question, refusal=f"{self.model.name} has learnt no labels that answer this question.")

    # --- what was learnt --------------------------------------------------------------------------------------------

    def _learnt(self, question: Question) -> Decision:
        """By the column of labels that the question is about."""
        if question.kind == "predicate":
            return self._is_it_so(question)
        if question.kind == "score" and (column := self._number(question)) is not None:
            return self._level(question, column)
        values = [_plain(option.value) for option in question.options]
        for column, labels in self._by_mention(question):
            places = {_plain(label): label for label in labels}
            if all(value in places for value in values):
                predictions = self._predictions(column)
                chances = np.array([_chance(predictions, places[value]) for value in values])
                if chances.sum() < 0.01:
                    return Decision(question, refusal="None of these options is likely.", column=column)
                return self._decision(question, column, chances / chances.sum(), predictions)
        return Decision(question, refusal=f"The options are not the labels of one column: {_known(self.model)}.")

    def _is_it_so(self, question: Question) -> Decision:
        """By a label that the question names and nothing else: "red bar" or "shape: red bar".

        A sentence around it could say the opposite, in any language; it may stand in the instructions where the name
        of the question is the label."""
        stated = {_plain(question.name or ""), _plain(question.instructions)}
        candidates: list[tuple[str, str]] = []
        for column, labels in self._columns():
            so = [label for label in labels if _plain(label) in YES]
            if _plain(column) in stated and so and len(labels) == 2 and any(_plain(label) in NO for label in labels):
                return self._predicate(question, column, so[0])
            candidates += [
                (column, label)
                for label in labels
                if stated & {_plain(label), _plain(f"{column} {label}"), _plain(f"{column} is {label}")}
            ]
        exact = [(column, label) for column, label in candidates if _plain(f"{column} {label}") in stated] or candidates
        if len(exact) != 1:
            reason = "is a label of several columns: write COLUMN: LABEL" if exact else "is no label that was learnt"
            what = f"The condition, or the name of the question, {reason}. {_known(self.model)}."
            return Decision(question, refusal=what)
        return self._predicate(question, *exact[0])

    def _predicate(self, question: Question, column: str, label: str) -> Decision:
        predictions = self._predictions(column)
        chance = _chance(predictions, label)
        return self._decision(question, column, np.array([chance, 1 - chance]), predictions)

    def _decision(self, question: Question, column: str, chances: np.ndarray, predictions: Predictions) -> Decision:
        calibrated = predictions.ood_score is not None or predictions.chosen is not None
        if predictions.none_of_these:
            reason = "The input is unlike all that was learnt."
            return Decision(question, [], reason, calibrated, column, predictions.ood_score)
        return Decision(question, chances.tolist(), "", calibrated, column, predictions.ood_score)

    def _number(self, question: Question) -> str | None:
        """The column of numbers that a score is about: the one that its name or instructions name, or the only one,
        where all levels are numbers."""
        if any(_as_number(option.value) is None for option in question.options):
            return None
        words = {_plain(question.name or ""), *_words(question.instructions)}
        named = [column for column in self.model.numbers if _plain(column) in words]
        return named[0] if named else self.model.numbers[0] if len(self.model.numbers) == 1 else None

    def _level(self, question: Question, column: str) -> Decision:
        """Each level by how likely it is the nearest to the number."""
        levels = [float(option.value) for option in question.options]
        chances = self.model.level_probabilities(self.value, column, levels)
        return Decision(question, chances, "", True, column)

    def _columns(self) -> list[tuple[str, list[str]]]:
        """The columns that have labels, one or several a record, with these."""
        return [(column, labels) for column, labels in self.model.answer_labels.items() if labels]

    def _predictions(self, column: str) -> Predictions:
        if column not in self.asked:
            self.asked[column] = self.model.classify_together(self.value, column=column, top=None)
        return self.asked[column]

    def _by_mention(self, question: Question) -> list[tuple[str, list[str]]]:
        """The columns with labels, those that the question names first."""
        words = {_plain(question.name or ""), *_words(question.instructions)}
        columns = [(column, labels) for column, labels in self._columns() if column not in self.model.several]
        return sorted(columns, key=lambda entry: _plain(entry[0]) not in words)

    # --- what imported models weigh ---------------------------------------------------------------------------------

    def _by_likelihood(self, model: PlaitModel, question: Question) -> Decision:
        """By a language model: how likely each option is as the answer, beside the others."""
        if not isinstance(self.value, str):
            return Decision(question, refusal=f"{model.name} reads text alone.")
        options = question.options or (Option("Yes"), Option("No"))
        listed = "".join(f"- {one.value}{f': {one.description}' if one.description else ''}\n" for one in options)
        text = f"{self.value}\n\nQuestion: {question.instructions}\nPossible answers:\n{listed}Answer:"
        context, ids = model.context(text), [model.checkpoint.text.encode(f" {one.value}") for one in options]
        if len(context) + max(map(len, ids)) > model.engine.max_length:
            return Decision(
                question, refusal=f"The input is too long: there is room for {model.engine.max_length} tokens."
            )
        scores = scoring.score(model.engine, [context], ids, ends=False)[0]
        chances = np.exp(scores - scores.max())
        return Decision(question, (chances / chances.sum()).tolist())

    def _zero_shot(self, question: Question) -> Decision:
        """By a model that compares images with texts."""
        labels = [one.description or one.value for one in question.options]
        predictions = self.model.classify_together(self.value, labels=labels, top=None)
        chances = np.array([_chance(predictions, label) for label in labels])
        return Decision(question, (chances / max(chances.sum(), 1e-12)).tolist())


def read_questions(value: Any) -> list[Question]:
    """Questions from JSON, as `plait decide` takes them: a list of {type, instructions, choices | levels, name}, in
    the shape of OpenAI's `/v1/decisions`. Raises PlaitError."""
    if not isinstance(value, list) or not value:
        raise PlaitError("Questions are a list that is not empty.")
    questions = []
    for number, entry in enumerate(value):
        try:
            options = [
                Option(str(one.get("value", one.get("label"))), one.get("description", ""))
                for one in entry.get("choices", entry.get("levels", []))
            ]
            question = Question(entry["type"], entry["instructions"], tuple(options), entry.get("name"))
        except (AttributeError, KeyError, TypeError) as error:
            raise PlaitError(f"Question {number} is not {{type, instructions, choices or levels}}: {error}.") from None
        if question.kind not in ("predicate", "choice", "score"):
            raise PlaitError(f"Question {number}: the type is predicate, choice or score, not {question.kind!r}.")
        if (question.kind != "predicate") != (len(options) > 1):
            raise PlaitError(f"Question {number}: a choice or score has two options or more, a predicate none.")
        questions.append(question)
    return questions


def _chance(predictions: Predictions, label: str) -> float:
    return next((one.probability for one in predictions if one.label == label), 0.0)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def _words(text: str) -> set[str]:
    return set(_plain(text).split())


def _known(model: Model) -> str:
    """What a model could be asked about, for messages."""
    return "; ".join(
        f"{column} is {', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}"
        for column, labels in model.answer_labels.items()
        if labels
    )[:400]
