"""What a model answers about inputs: labels, several labels, numbers, the likelihood of texts, embeddings.

Where something was fitted for a column and such inputs (a classifier, a predictor of several labels or of numbers), it
answers; else labels are ranked by their likelihood as texts.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.classifiers.classifier import Classifier
from plait.classifiers.numbers import Numbers
from plait.classifiers.predictors import Predictor
from plait.classifiers.several import SeveralLabels
from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.inference import scoring
from plait.inference.base import Verb
from plait.inference.inputs import Reading
from plait.inference.opinions import ood_scores, opinion_scores
from plait.inference.results import Estimate, Prediction, Predictions
from plait.modalities.inputs import inputs_of
from plait.modalities.media import MEDIA
from plait.model.multimodal import Sequence

if TYPE_CHECKING:
    from plait.inference.engine import Engine


class Answering(Reading):
    """How a model answers about inputs; a part of it."""

    name: str
    device: Device

    if TYPE_CHECKING:

        @property
        def engine(self) -> Engine: ...

    def score(self, contexts: list[Sequence], column: str, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """log P(text and its end | context, the column's opener) in nats, (contexts, texts) float64.

        The opener is added where a context does not end with it.
        """
        column = self.column(column, "text", "score")
        ids = self.checkpoint.text.encode_batch(list(texts))
        return scoring.score(self.engine, [self._opened(c, column) for c in contexts], ids, batch_size)

    def classify_inputs(
        self, inputs: list[Any], labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> list[Predictions]:
        """`classify` for inputs as they are.

        Labels default to the values that the column had in training; then the run's classifier answers, whose
        probabilities are calibrated on validation records and which knows what is unfamiliar. Labels of your own are
        ranked by their likelihood as texts. An audio clip longer than a window is read in windows and their
        probabilities averaged.

        Raises PlaitError for a text where the run learnt to name media alone: most likely a file's name, misspelt; and
        for a text of no words.
        """
        if any(isinstance(value, str) and not value.strip() for value in inputs):
            raise PlaitError("A text is empty, so nothing can be said of it.")
        if labels is None:
            self._check_media_named(inputs)
        return self.classify_sequences(
            [self.alone(value, self.engine.max_length) for value in inputs], labels, column, top
        )

    def _check_media_named(self, inputs: list[Any]) -> None:
        """Raise PlaitError for a text among the inputs of a run whose classifiers are all of media."""
        text = next((value for value in inputs if isinstance(value, str)), None)
        if text is not None and (kinds := self.media_classified):
            names = " and ".join(kinds)
            raise PlaitError(f"There is no file '{text[:200]}', and this model names {names} files, not texts.")

    @property
    def media_classified(self) -> list[str]:
        """The modalities that the run's classifiers read, where all of these are media; none where one reads texts."""
        kinds = {one.features.kind for one in self.checkpoint.classifiers}
        return [] if "text" in kinds else sorted(kinds)

    @property
    def answers_only(self) -> bool:
        """Whether it was trained to say labels and numbers alone: nothing that it writes means anything."""
        fitted = [*self.checkpoint.classifiers, *self.checkpoint.predictors]
        given = {one.target for one in fitted} | {one.source for one in fitted if self.columns[one.source] == "text"}
        read_only = set(self.checkpoint.model.config.read_only)
        written = {column for column, kind in self.columns.items() if not {column, kind} & read_only}
        return bool(fitted) and not self.vocabulary.turns and written <= given

    @property
    def offered_verbs(self) -> list[str]:
        """The verbs to offer to people and programs: none for words, where it was trained to say labels alone."""
        words = {Verb.GENERATE, *(files.verb for files in MEDIA.values())} if self.answers_only else set()
        return [verb for verb in self.verbs if verb not in words]

    def classify_together(
        self, value: Any, labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> Predictions:
        """The likeliest labels of an input as it is, or of a list of inputs that are read in order as one."""
        if isinstance(value, list):
            return self.classify_parts([self.context(value)], labels, column, top)
        return self.classify_inputs([value], labels, column, top)[0]

    def classify_parts(
        self, parts: list[Sequence], labels: list[str] | None = None, column: str | None = None, top: int | None = 5
    ) -> Predictions:
        """`classify` for an input that is sequences already: one, or its windows."""
        return self.classify_sequences([parts], labels, column, top)[0]

    def classify_sequences(
        self,
        inputs: list[list[Sequence]],
        labels: list[str] | None = None,
        column: str | None = None,
        top: int | None = 5,
    ) -> list[Predictions]:
        """`classify` for inputs that are sequences already: of each one, or its windows."""
        if column is None:
            several = [one.target for one in self.checkpoint.predictors if isinstance(one, SeveralLabels)]
            candidates = [name for name in self.labels if self.labels[name]] or several
            column = candidates[0] if candidates else None
        column = self.column(column, "text", "classify")
        if labels is None and (predictor := self._predictor(inputs, column)) is not None:
            return self._several(predictor, inputs, top)
        answers: dict[int, Predictions] = {}
        groups: dict[int, list[int]] = {}  # which classifier answers, counted from 0, or -1 for none -> inputs
        for place, parts in enumerate(inputs):
            classifier = self._classifier(parts, column) if labels is None else None
            groups.setdefault(-1 if classifier is None else self.checkpoint.classifiers.index(classifier), []).append(
                place
            )
        for number, places in groups.items():
            same_column = [inputs[place] for place in places]
            if number >= 0:
                predictions = self._decide(self.checkpoint.classifiers[number], same_column, top)
            else:
                predictions = self._rank(
                    same_column, self.labels.get(column, []) if labels is None else list(labels), column, top
                )
            answers |= dict(zip(places, predictions, strict=True))
        return [answers[place] for place in range(len(inputs))]

    @property
    def answer_labels(self) -> dict[str, list[str]]:
        """Column -> labels, of the columns with one label a record and of those with several."""
        several = {one.target: one.labels for one in self.checkpoint.predictors if isinstance(one, SeveralLabels)}
        return self.labels | several

    def level_probabilities(self, value: Any, column: str, levels: SequenceOf[float]) -> list[float]:
        """How likely each of some numbers is the nearest to the one that a column holds for an input."""
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        estimate = self.estimate_inputs([value], column)[0]
        predictor = self._predictor([self.alone(value, self.engine.max_length)], column)
        assert isinstance(predictor, Numbers)
        return list(map(float, predictor.level_probabilities(estimate.value, levels)))

    @property
    def several(self) -> list[str]:
        """The columns in which a record has several labels."""
        return list(dict.fromkeys(one.target for one in self.checkpoint.predictors if isinstance(one, SeveralLabels)))

    @property
    def numbers(self) -> list[str]:
        """The columns of numbers that it predicts."""
        return list(dict.fromkeys(one.target for one in self.checkpoint.predictors if isinstance(one, Numbers)))

    def estimate(self, value: Any, column: str | None = None) -> Any:
        """The number that a column holds for an input, with its error bars; a list for a list or a folder.

        The column is the first of numbers if left out. Raises PlaitError where the model has learnt none.
        """
        parsed = inputs_of(value)
        estimates = self.estimate_inputs(parsed.values, column)
        return estimates if parsed.several else estimates[0]

    def estimate_inputs(self, inputs: list[Any], column: str | None = None) -> list[Estimate]:
        """`estimate` for inputs as they are: a str is a text, whatever it looks like."""
        column = column or next(iter(self.numbers), None)
        if column not in self.numbers:
            raise PlaitError(f"{self.name} predicts no numbers{f' {column}' if column else ''}. It predicts "
                             f"{', '.join(self.numbers) or 'none'}; name a column: --number COLUMN of plait "
                             "prepare.")  # fmt: skip
        parts = [self.alone(value, self.engine.max_length) for value in inputs]
        predictor = self._predictor(parts, column)
        if not isinstance(predictor, Numbers):
            raise PlaitError(f"'{column}' cannot be predicted from such an input.")
        samples, owners = self._samples(predictor.features.kind, parts)
        means = _means(predictor.predict(samples)[:, None], owners)
        values = [float(mean[0]) for mean in means]
        return [Estimate(value, value + predictor.low, value + predictor.high) for value in values]

    def _several(self, predictor: Predictor, inputs: list[list[Sequence]], top: int | None) -> list[Predictions]:
        """All labels with a probability each of its own, likeliest first, and those that hold."""
        if isinstance(predictor, Numbers):
            raise PlaitError(f"'{predictor.target}' holds numbers. Ask for them with estimate: it has error bars.")
        samples, owners = self._samples(predictor.features.kind, inputs)
        predictions = []
        for chances in _means(predictor.probabilities(samples), owners):
            order = np.argsort(-chances, kind="stable")
            chosen = [predictor.labels[i] for i in order if chances[i] >= predictor.thresholds[i]]
            ranked = [Prediction(predictor.labels[i], float(chances[i])) for i in order[:top]]
            predictions.append(Predictions(ranked, chosen=chosen))
        return predictions

    def _predictor(self, inputs: list[list[Sequence]], column: str) -> Predictor | None:
        """What was fitted for a column of several labels or numbers and all of these inputs; None where nothing was."""
        return next(
            (
                one
                for one in self.checkpoint.predictors
                if one.target == column and all(self._fits(parts, one.source, one.features.kind) for parts in inputs)
            ),
            None,
        )

    def _rank(self, inputs: list[list[Sequence]], labels: list[str], column: str, top: int | None) -> list[Predictions]:
        """Labels by their likelihood as texts."""
        if not labels:
            raise PlaitError(f"Column '{column}' has no known labels. Name them: labels=[...] or --labels a,b,c.")
        scores = self.score([part for parts in inputs for part in parts], column, labels)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        return [_predictions(mean, labels, top) for mean in _means(chances, inputs)]

    def is_classified(self, parts: list[Sequence], column: str) -> bool:
        """Whether a classifier was fitted that answers one input of this kind in this column."""
        return self._classifier(parts, column) is not None

    def _classifier(self, parts: list[Sequence], column: str) -> Classifier | None:
        """What was fitted for one input of this kind, alone; None where nothing was."""
        for one in self.checkpoint.classifiers:
            if one.target == column and self._fits(parts, one.source, one.features.kind):
                return one
        return None

    def _fits(self, parts: list[Sequence], source: str, kind: str) -> bool:
        """Whether an input is of the kind that something was fitted for, alone."""
        media = [len(part.media) for part in parts]
        if kind == "text":
            return not any(media) and all(len(part.spans) == 1 for part in parts)
        opener = self.vocabulary.opener(source)
        return all(count == 1 and part.ids[0] == opener for count, part in zip(media, parts, strict=True))

    def _samples(self, kind: str, inputs: list[list[Sequence]]) -> tuple[list[Any], list[list[Sequence]]]:
        """Inputs as features read them, texts or samples, and the sequences that each stands for."""
        if kind == "text":  # whose windows are one text again
            texts = ["".join(self.checkpoint.text.decode(part.ids) for part in parts) for parts in inputs]
            return texts, [parts[:1] for parts in inputs]
        return [part.media[0].sample for parts in inputs for part in parts], inputs

    def _decide(self, classifier: Classifier, inputs: list[list[Sequence]], top: int | None) -> list[Predictions]:
        """The classifier's answers to inputs that are one sequence each, or windows."""
        samples, owners = self._samples(classifier.features.kind, inputs)
        scores = opinion_scores(self, classifier, samples, classifier.mixture.used)
        chances = _means(np.exp(classifier.mixture.log_probabilities(scores)), owners)
        unfamiliar = _means(ood_scores(self, classifier, samples, scores), owners)
        return [
            _predictions(mean, classifier.labels, top, float(score), float(score) > classifier.mixture.threshold)
            for mean, score in zip(chances, unfamiliar, strict=True)
        ]

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The place of each input in the one space, (N, E) float32, of unit length.

        Inputs longer than the model reads at once are embedded in windows whose mean counts.
        """
        if prompt is not None:
            raise PlaitError(f"{self.name} has no prompts. Leave the prompt out.")
        return self.embed_parts([self.alone(value, self.engine.max_length) for value in inputs])

    def embed_parts(self, parts: list[list[Sequence]]) -> np.ndarray:
        """`embed` for inputs that are sequences already: each the mean of its own, (N, E)."""
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        vectors = self.embed_sequences([sequence for part in parts for sequence in part])
        sums = np.zeros((len(parts), vectors.shape[1]), np.float32)
        np.add.at(sums, owner, vectors)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)

    def embed_sequences(self, sequences: list[Sequence], batch_size: int = 256) -> np.ndarray:
        """The embedding of the first span of each sequence, (N, E) float32, of unit length."""
        return scoring.embed(self.engine, sequences, batch_size)


def _predictions(
    chances: np.ndarray, labels: list[str], top: int | None, ood_score: float | None = None, unlike: bool = False
) -> Predictions:
    """The likeliest of labels (L,), by their probabilities."""
    order = np.argsort(-chances, kind="stable")[:top]
    return Predictions((Prediction(labels[i], float(chances[i])) for i in order), ood_score, unlike)


def _means(values: np.ndarray, inputs: list[list[Sequence]]) -> list[np.ndarray]:
    """The mean of each input's rows, which lie one after the other."""
    return [rows.mean(0) for rows in np.split(values, np.cumsum([len(parts) for parts in inputs])[:-1])]
