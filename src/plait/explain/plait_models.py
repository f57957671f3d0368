"""Questions to models in our own backbone: runs, and imported causal language models."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.errors import PlaitError
from plait.core.interruption import pause_point
from plait.explain.parts import Grid, IntegrationPath, Part, Question, Value, Words, log_odds, unmasked
from plait.inference import scoring
from plait.inference.model import PlaitModel
from plait.modalities.base import cells
from plait.model.multimodal import Sequence, collate


def question(
    model: PlaitModel, value: Any, answer: Any = None, to: str = "text", column: str | None = None,
    labels: list[str] | None = None, seed: int = 0, decided: bool = True,
) -> Question:  # fmt: skip
    """What is to be explained: why `answer` follows `value`, an input of the model or a list of them.

    With `decided`, an answer among learnt labels is that of the run's classifier, as `classify` gives it; without, of
    the network's likelihood, which has gradients and layers.

    Without an answer it is the model's own: its likeliest label, the text that it writes, or, where `to` names another
    modality, what it makes with this seed. Raises PlaitError for an answer that the model cannot give.
    """
    parts = [_part(model, part) for part in (value if isinstance(value, list) else [value])]
    if to == "text":
        explained = _asked(model, parts, answer, column, labels)
        return _decided(explained, answer, labels) if decided else explained
    if to in model.columns and column is None:
        to, column = model.columns[to], to
    column = model.column(column, to, f"write {to}")
    modality = model.modality(column)
    if modality.name not in model.vocabulary.id_ranges:
        raise PlaitError(f"This model reads {to} but cannot write it, so there is nothing to explain.")
    context = model.context([_given(part) for part in parts], column)
    if answer is None:  # the codes that were drawn: a codec does not find quite the same in what it makes of them
        drawn = model.engine.run(model.requests([context], column, seed=seed))[0].samples[0]
        sample = model.decode(column, [drawn])[0]
        codes = np.array(drawn.ids) - model.vocabulary.id_ranges[modality.name][0]
    else:
        _, _, sample, _ = model.context([answer]).media[0]
        with torch.inference_mode():
            values, lengths = modality.batch([sample])
            place = model.device.torch
            codes = modality.codec.encode(values.to(place), lengths.to(place))[0].cpu().numpy()
        codes = codes[: modality.code_count(len(sample))]
    return SampleQuestion(model, parts, column, Grid(sample, modality, modality.name, column), codes)


def _part(model: PlaitModel, value: Any) -> Part:
    text = value[1] if isinstance(value, tuple) and isinstance(value[0], str) else value
    if isinstance(text, str):
        model.context([value])  # which knows whether there is such a column
        return Words(text)
    context = model.context([value])
    start, name, sample, _ = context.media[0]
    column = next(c for c in model.columns if model.vocabulary.opener(c) == context.ids[start - 1])
    return Grid(sample, model.modality(column), name, column)


def _given(part: Part) -> Any:
    """A part as `Model.context` takes it."""
    return part.text if isinstance(part, Words) else (part.column, part.sample)


def _near(answer: str, known: list[str]) -> str:
    near = difflib.get_close_matches(answer, known, 3, 0.4)
    return f"Near ones: {', '.join(near)}." if near else f"It can say {', '.join(known[:8])}."


def _asked(
    model: PlaitModel, parts: list[Part], answer: Any, column: str | None, labels: list[str] | None
) -> TextQuestion:  # fmt: skip
    if answer is not None and (not isinstance(answer, str) or not answer):
        raise PlaitError("The answer must be a text that is not empty; for a medium, say which with to.")
    encode = model.checkpoint.text.encode
    if not model.columns:
        if answer is None and not labels:
            answer = _next_token(model, parts)
        texts = labels or [answer]
        answer = texts[0] if answer is None else answer
    else:
        if column is None and answer is not None and labels is None:  # the column that has this label
            column = next((name for name, known in model.labels.items() if answer in known), None)
        if column is None:
            column = next((name for name, known in model.labels.items() if known), None)
        column = model.column(column, "text", "answer")
        texts = list(labels or model.labels.get(column, []))
        if answer is None and not texts:
            answer = model.write([model.context([_given(part) for part in parts])], column)[0][0]
        texts = texts or [answer]
    question = TextQuestion(model, parts, column, texts, [encode(text) for text in texts], 0)
    if answer is None or len(texts) > 1:
        if answer is None:
            contexts = [model.context([_given(part) for part in parts], column)]
            question.place = int(
                scoring.score(model.engine, contexts, question.ids, ends=column is not None)[0].argmax()
            )
        elif answer not in texts:
            where = f"column '{column}'" if column else "the labels"
            raise PlaitError(f"'{answer}' is not an answer in {where}. {_near(answer, texts)}")
        else:
            question.place = texts.index(answer)
    if not question.ids[question.place] and column is None:
        raise PlaitError("The answer is empty.")
    return question


def _decided(question: TextQuestion, answer: Any, labels: list[str] | None) -> TextQuestion:
    """The question as the run's classifier answers it, where one was fitted for such an input."""
    model, column = question.model, question.column
    if column is None or labels is not None or len(question.parts) != 1:
        return question
    context = model.context([_given(question.parts[0])])
    if not model.is_classified([context], column):
        return question
    own = model.classify_parts([context], column=column, top=1)
    place = question.texts.index(own[0].label if answer is None else answer)
    return ClassifierQuestion(
        model, question.parts, column, question.texts, question.ids, place, none_of_these=own.none_of_these
    )


def _next_token(model: PlaitModel, parts: list[Part]) -> str:
    """The likeliest token after a text."""
    logits = scoring.logit_lens(model.engine, model.context([_given(part) for part in parts]))[-1]
    for token in logits[: model.checkpoint.text.size].argsort(descending=True).tolist():
        text = model.checkpoint.text.decode([token])
        if text.strip() and "\ufffd" not in text:
            return text
    raise PlaitError("The model goes on with nothing that is text. Say which answer to explain.")


class _PlaitQuestion:
    """What questions to our models share."""

    model: PlaitModel
    parts: list[Part]
    column: str | None

    def contexts(self, inputs: list[list[Value]]) -> list[Sequence]:
        sequences = []
        for values in inputs:
            values_of: list[Any] = []
            for part, value in zip(self.parts, values, strict=True):
                if isinstance(part, Grid) and value is not None:
                    values_of.append((part.column, value))
                elif value:
                    values_of.append(value)
            context = self.model.context(values_of, self.column)
            sequences.append(context if len(context) else self.model.start())
        return sequences


@dataclass
class TextQuestion(_PlaitQuestion):
    """Why a text is the answer: against other texts, or by its likelihood alone."""

    model: PlaitModel
    parts: list[Part]
    column: str | None  # None: the answer goes on where a text of a model without columns stops
    texts: list[str]
    ids: list[list[int]]
    place: int  # of the answer among them

    @property
    def answer(self) -> str:
        return self.texts[self.place]

    @property
    def measure(self) -> str:
        return "log-odds" if len(self.texts) > 1 else "log-likelihood"

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        log_probs = scoring.score(self.model.engine, self.contexts(inputs), self.ids, ends=self.column is not None)
        return log_odds(log_probs, self.place) if len(self.texts) > 1 else log_probs[:, 0]

    def chances(self, scores: np.ndarray) -> np.ndarray:
        if len(self.texts) > 1:
            return np.asarray(1 / (1 + np.exp(-scores.clip(-60, 60))))
        return np.asarray(np.exp(scores / max(len(self.ids[0]) + (self.column is not None), 1)))

    def path(self) -> IntegrationPath:
        model, network, place = self.model, self.model.checkpoint.model, self.model.device.torch
        sequence = self.contexts([unmasked(self.parts)])[0]
        batch = collate([sequence], network.media, network.vocabulary.pad).to(place)
        with torch.no_grad():
            table = network.token_embedding.table().float()
            span = model.engine.spans["text"]
            head = network.output_embedding.table().float()[span.start : span.stop]
        owners = _owners(model, self.parts)
        fixed = F.embedding(batch.tokens, table)  # (1, L, D)
        bare = fixed.clone()
        blank = model.vocabulary.pad if model.columns else model.vocabulary.end_id
        if blank is None:
            bare[0, owners[0] >= 0] = table.mean(0)
        else:
            bare[0, owners[0] >= 0] = table[blank]
        names = list(batch.media)
        silent = {name: batch.media[name].values.float().clone() for name in names}
        counts = dict.fromkeys(names, 0)
        where: list[tuple[int, int]] = []  # of each part: its tensor, its row in it
        for number, part in enumerate(self.parts):
            if isinstance(part, Words):
                where.append((0, number))
                continue
            row = counts[part.name]
            counts[part.name] += 1
            silent[part.name][row, : len(part.baseline)] = torch.from_numpy(part.baseline.astype(np.float32))
            where.append((1 + names.index(part.name), row))
        values = [batch.media[name].values.float()[None] for name in names]

        def score(*tensors: Tensor) -> Tensor:
            pause_point()
            x, n = tensors[0], len(tensors[0])
            for name, value in zip(names, tensors[1:], strict=True):
                media = batch.media[name]
                encoded = network.media[name].encoder(value.flatten(0, 1), media.lengths.repeat(n))
                encoded = encoded.reshape(n, -1, encoded.shape[-1])[:, media.take]
                x = x.index_copy(1, media.put, encoded.to(x.dtype))
            end = span.end if self.column is not None else None
            lengths = batch.lengths.expand(n)
            log_probs = scoring.branches(network.backbone, x, lengths, table, head, self.ids, end)
            if log_probs.shape[1] == 1:
                return log_probs[:, 0]
            others = [i for i in range(log_probs.shape[1]) if i != self.place]
            return log_probs[:, self.place] - log_probs[:, others].logsumexp(1)

        def by_unit(worth: list[np.ndarray]) -> list[np.ndarray]:
            units = []
            tokens = worth[0].sum(-1)
            for number, (part, (tensor, row)) in enumerate(zip(self.parts, where, strict=True)):
                if isinstance(part, Words):
                    owned = owners[0] == number
                    units.append(np.bincount(owners[1][owned], tokens[owned], part.count))
                else:
                    units.append(part.summed(worth[tensor][row][: len(part.sample)]))
            return units

        return IntegrationPath(score, (fixed, *values), (bare, *(silent[name][None] for name in names)), by_unit)

    def layers(self) -> list[dict[str, Any]]:
        target = self.ids[self.place][0] if self.ids[self.place] else self.model.engine.spans["text"].end
        by_layer = []
        for number, logits in enumerate(
            scoring.logit_lens(self.model.engine, self.contexts([unmasked(self.parts)])[0])
        ):
            chances = logits.softmax(-1)
            top = chances.topk(min(3, len(chances)))
            likeliest = [
                (self.model.checkpoint.text.decode([i]) if i < self.model.checkpoint.text.size else "(end)", float(p))
                for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            rank = int((chances > chances[target]).sum()) + 1
            by_layer.append({"layer": number, "chance": float(chances[target]), "rank": rank, "likeliest": likeliest})
        return by_layer


@dataclass
class ClassifierQuestion(TextQuestion):
    """Why a label is the answer of the run's classifier, which mixes several opinions."""

    none_of_these: bool = False  # whether the classifier finds the input unlike all labels

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        """Log-odds of the label's calibrated probability, (N,); of a text that has no word left, those of guessing."""
        column, label = self.column, self.texts[self.place]
        probabilities = np.full(len(inputs), 1 / len(self.texts))
        values = [self._alone(values[0]) for values in inputs]
        kept_places = [place for place, value in enumerate(values) if value is not None]
        contexts = [[self.model.context([values[place]])] for place in kept_places]
        for place, ranked in zip(
            kept_places, self.model.classify_sequences(contexts, column=column, top=None), strict=True
        ):
            probabilities[place] = next((one.probability for one in ranked if one.label == label), 0.0)
        bounded = probabilities.clip(1e-6, 1 - 1e-6)
        return np.asarray(np.log(bounded / (1 - bounded)))

    def _alone(self, value: Value) -> Any:
        """A part's value as `Model.context` takes it; None for nothing."""
        part = self.parts[0]
        if isinstance(part, Grid):
            return None if value is None else (part.column, value)
        return value or None


def _owners(model: PlaitModel, parts: list[Part]) -> np.ndarray:
    """(2, L): for each place of the context, the part of text and its word, -1 elsewhere."""
    begin = [] if model.columns else model.checkpoint.text.start
    owners: list[tuple[int, int]] = [(-1, -1)] * len(begin)
    for number, part in enumerate(parts):
        if isinstance(part, Words):
            stops = [stop for _, stop in model.checkpoint.text.offsets(part.text)]
            owners += [(number, int(word)) for word in part.owners(stops)]
        else:
            owners += [(-1, -1)] * (1 + model.modality(part.column).token_count(len(part.sample)))
    if model.columns:
        owners.append((-1, -1))  # the opener of what is answered
    return np.array(owners or [(-1, -1)]).T


@dataclass
class SampleQuestion(_PlaitQuestion):
    """Why a sample was made: the likelihood of its codes, all together and each for itself."""

    model: PlaitModel
    parts: list[Part]
    column: str
    written: Grid
    codes: np.ndarray
    measure: str = "log-likelihood"

    @property
    def answer(self) -> str:
        return f"{self.written.name} of {len(self.codes)} codes"

    def shown(self) -> tuple[tuple[int, int], np.ndarray]:
        """The grid of cells that the codes make, and (codes, cells) the share of each code that shows in each: of the
        squared change where the code of a sample with nothing in it takes its place. What a code decides lies as often
        beside its own cell as in it, for a codec looks at and writes more than that. One that changes nothing counts
        where it stands."""
        modality, place = self.model.modality(self.column), self.model.device.torch
        grid, own = modality.code_cells(len(self.codes))
        shares = np.zeros((len(self.codes), grid[0] * grid[1]))
        codes = torch.from_numpy(self.codes).to(place)
        with torch.inference_mode():
            values, lengths = modality.batch([modality.removed(self.written.sample)])
            blank = modality.codec.encode(values.to(place), lengths.to(place))[0, : len(codes)]
            drawn = modality.codec.decode(codes[None]).float()
            where = torch.from_numpy(cells((drawn.shape[1], drawn.shape[2]), grid).ravel()).to(place)
            for positions in torch.arange(len(codes), device=place).split(64):
                changed = codes.repeat(len(positions), 1)
                changed[torch.arange(len(positions), device=place), positions] = blank[positions]
                change = (
                    (modality.codec.decode(changed).float() - drawn).square().reshape(len(positions), len(where), -1)
                )
                per_cell = torch.zeros(len(positions), shares.shape[1], device=place).index_add_(
                    1, where, change.sum(-1)
                )
                shares[positions.cpu().numpy()] = per_cell.cpu().numpy()
        total = shares.sum(1, keepdims=True)
        still = total[:, 0] <= 1e-6 * total.max(initial=0)
        shares[~still] /= total[~still]
        shares[still] = np.eye(shares.shape[1])[own[still]]
        return grid, shares

    def by_code(self, inputs: list[list[Value]]) -> np.ndarray:
        token_type = self.written.name
        ids = (self.codes + self.model.vocabulary.id_ranges[token_type][0]).tolist()
        sequences = [context.write(ids) for context in self.contexts(inputs)]
        return np.stack(scoring.token_log_probs(self.model.engine, sequences, token_type))

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        return np.asarray(self.by_code(inputs).sum(1))

    def chances(self, scores: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(scores / len(self.codes)))

    def path(self) -> IntegrationPath:
        raise PlaitError("Integrated gradients explain a text that is answered. Use occlusion for what is made.")

    def layers(self) -> list[dict[str, Any]]:
        raise PlaitError("The logit lens shows texts. Use occlusion for what is made.")
