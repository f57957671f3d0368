"""How well texts that stand alone are predicted, token by token, beside a unigram and an n-gram model."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field

import numpy as np
import torch

from plait.evaluation import metrics
from plait.evaluation.alternatives import GramModel
from plait.evaluation.context import EvalContext
from plait.evaluation.keys import Direction
from plait.evaluation.learnt import ByHeart, by_heart
from plait.evaluation.memorising import WRITTEN, evaluate_texts
from plait.evaluation.outcome import Outcome
from plait.inference.model import PlaitModel
from plait.model.cross_entropy import negative_log_likelihood
from plait.model.multimodal import IGNORE, Sequence, collate
from plait.training.batches import lm_windows

TOKENS = 16384  # that one pass of the network reads


@torch.no_grad()
def sequence_nats(model: PlaitModel, sequences: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Of what each sequence writes, in order: -log P of all of it in nats (N,), and how many tokens it is (N,)."""
    checkpoint = model.checkpoint
    network, rows = checkpoint.model, checkpoint.model.output_embedding.of_type("text")
    nats, tokens = np.zeros(len(sequences)), np.zeros(len(sequences))
    by_length = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    step = max(TOKENS // network.config.backbone.max_length, 1)
    for start in range(0, len(by_length), step):
        places = by_length[start : start + step]
        batch = collate([sequences[i] for i in places], network.media, network.vocabulary.pad).to(model.device.torch)
        is_target = batch.targets != IGNORE
        loss = negative_log_likelihood(network(batch)[is_target], rows, batch.targets[is_target]).cpu().numpy()
        owner = places[is_target.nonzero()[:, 0].cpu().numpy()]
        np.add.at(nats, owner, loss)
        np.add.at(tokens, owner, 1)
    return nats, tokens


def text_nats(model: PlaitModel, column: str, text: str) -> float:
    """-log P of a text in nats, without that of its end: of its tokens, which together are all of its characters."""
    checkpoint = model.checkpoint
    network, vocabulary = checkpoint.model, checkpoint.model.vocabulary
    ids = checkpoint.text.encode(text)
    windows = lm_windows(ids, vocabulary.opener(column), None, network.config.backbone.max_length)
    return float(sequence_nats(model, windows)[0].sum())


@dataclass
class Texts:
    """Texts of a column that stand alone in their records, and what is predicted of them.

    Attributes:
        texts: The texts (N,), NFC.
        records: Their records (N,).
        sequences: Windows of them, each token and the end predicted once.
        owners: Which text each window is of.
        available: How many texts there were to choose from.
    """

    texts: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    available: int = 0


def evaluate_language(eval_context: EvalContext, column: str) -> None:
    """Likelihood of texts that stand alone in their records, each token and the end predicted once."""
    if eval_context.media_columns or column in eval_context.labels or column not in eval_context.written:
        return
    alone = _alone(eval_context, column)
    chosen = _predicted_texts(eval_context, column, alone)
    if not chosen.texts:
        return
    if len(chosen.texts) < chosen.available:
        eval_context.note(
            f"{column}: {len(chosen.texts):,} of {chosen.available:,} texts were predicted, drawn by the seed."
        )
    eval_context.progress(f"memorising {column}", 0, 1)
    empty = eval_context.model.context([], column)
    continuations = eval_context.model.write([empty], column, n=WRITTEN, seed=eval_context.seed)[0]
    evaluate_texts(eval_context, Direction(column), column, continuations, chosen.texts)
    eval_context.progress(f"memorising {column}", 1, 1)
    eval_context.progress(f"language {column}", 0, len(chosen.sequences))
    past = [eval_context.texts[column][i] for i in eval_context.dataset.indices("train") if alone[i]]
    _keep_likelihood(eval_context, column, chosen, past)
    eval_context.progress(f"language {column}", len(chosen.sequences), len(chosen.sequences))


def _alone(eval_context: EvalContext, column: str) -> np.ndarray:
    """(records,) whether a text of the column stands alone in its record."""
    alone = np.array([bool(text) for text in eval_context.texts[column]], bool)
    for other in eval_context.text_columns:
        if other != column:
            alone &= np.array([text is None for text in eval_context.texts[other]], bool)
    return alone


def _predicted_texts(eval_context: EvalContext, column: str, alone: np.ndarray) -> Texts:
    """Texts drawn by the seed, as many as the limits of records and tokens allow."""
    checkpoint = eval_context.model.checkpoint
    vocabulary, longest = checkpoint.model.vocabulary, checkpoint.model.config.backbone.max_length
    order = [i for i in eval_context.shuffled(eval_context.dataset.indices(eval_context.split)) if alone[i]]
    chosen, room = Texts(available=len(order)), eval_context.limits.tokens
    for i in order[: eval_context.limits.records]:
        text = unicodedata.normalize("NFC", eval_context.texts[column][i])
        ids = checkpoint.text.encode(text)
        if len(ids) >= room and chosen.texts:
            break
        if len(ids) > room:  # one text longer than all that may be taken: its beginning
            ids = ids[:room]
            text = checkpoint.text.decode(ids)
        room -= len(ids) + 1
        windows = lm_windows(ids, vocabulary.opener(column), vocabulary.end, longest)
        chosen.sequences += windows
        chosen.owners += [len(chosen.texts)] * len(windows)
        chosen.texts.append(text)
        chosen.records.append(int(i))
    return chosen


def _unigram_nats(eval_context: EvalContext, past: list[str], sequences: list[Sequence]) -> float:
    """-log P of all that the sequences write, by how often each token stands in training texts, one added to each."""
    checkpoint = eval_context.model.checkpoint
    vocabulary = checkpoint.model.vocabulary
    counts = np.zeros(vocabulary.id_ranges["text"][1])
    for text in past:
        if counts.sum() >= 10 * eval_context.limits.tokens:
            break
        np.add.at(counts, [*checkpoint.text.encode(text), vocabulary.end], 1)
    surprise = -np.log((counts + 1) / (counts + 1).sum())
    return float(surprise[[id for sequence in sequences for id in sequence.targets if id != IGNORE]].sum())


def _keep_likelihood(eval_context: EvalContext, column: str, chosen: Texts, past: list[str]) -> None:
    """Nats a token and a character, and bits a byte, beside equal chances and a unigram; `past` are training texts."""
    nats, tokens = np.zeros(len(chosen.texts)), np.zeros(len(chosen.texts))
    each, count = sequence_nats(eval_context.model, chosen.sequences)
    np.add.at(nats, chosen.owners, each)
    np.add.at(tokens, chosen.owners, count)
    plain = _unigram_nats(eval_context, past, chosen.sequences)
    even = tokens.sum() * math.log(len(eval_context.model.checkpoint.model.output_embedding.of_type("text")))
    sizes = {
        "nats_per_token": (tokens, 1.0),
        "nats_per_character": (np.array([len(text) for text in chosen.texts]), 1.0),
        "bits_per_byte": (np.array([len(text.encode()) for text in chosen.texts]), math.log(2)),
    }
    direction, clean = Direction(column), eval_context.clean(np.array(chosen.records))
    for name, (size, unit) in sizes.items():
        value, error = metrics.ratio_with_error(nats / unit, size, seed=eval_context.seed)
        chance, baseline = (float(total / unit / size.sum()) for total in (even, plain))
        if len(chosen.texts) == 1:
            error = math.nan  # one text cannot say how much texts differ
        if clean is not None:
            fresh, fresh_error = metrics.ratio_with_error(nats[clean] / unit, size[clean], seed=eval_context.seed)
            eval_context.keep(
                "language", direction, name, fresh, stderr=fresh_error, n=int(size[clean].sum()), clean=True
            )
        eval_context.keep(
            "language", direction, name, value, stderr=error, chance=chance, baseline=baseline, n=int(size.sum())
        )
    _beside_grams(eval_context, column, chosen, past, nats, (value, error, chance))


def _by_heart(eval_context: EvalContext) -> ByHeart | None:
    """What the run of the model learnt by heart, if it did."""
    folder = eval_context.model.folder
    if folder is None:
        return None
    return by_heart(folder.resolve().parent.parent, "init_from" in eval_context.model.checkpoint.training)


def _beside_grams(
    eval_context: EvalContext, column: str, chosen: Texts, past: list[str], nats: np.ndarray,
    bits: tuple[float, float, float],
) -> None:  # fmt: skip
    """An n-gram model of the training texts beside the model's bits a byte: value, standard error and chance."""
    value, error, chance = bits
    size, unit = np.array([len(text.encode()) for text in chosen.texts]), math.log(2)
    grams = GramModel("\n".join(past).encode())
    simple = np.array([grams.nats(text.encode()) for text in chosen.texts])
    simple_value, _ = metrics.ratio_with_error(simple / unit, size, seed=eval_context.seed)
    _, lead_error = metrics.ratio_with_error((nats - simple) / unit, size, seed=eval_context.seed)
    direction, n = Direction(column), int(size.sum())
    eval_context.keep("language", direction, "bits_per_byte_ngrams", simple_value, n=n)
    eval_context.keep(
        "language", direction, "bits_per_byte", value, stderr=error, chance=chance, baseline=simple_value, n=n
    )
    eval_context.findings.outcomes.append(
        Outcome(
            "language", column, "bits a byte", value, error, n, chance,
            "an n-gram model of six characters", simple_value, 0.0 if len(chosen.texts) == 1 else lead_error,
            higher_is_better=False, share=False, unit="bytes", by_heart=_by_heart(eval_context),
        )
    )  # fmt: skip
