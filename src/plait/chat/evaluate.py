"""Conversations: how likely the assistant's held-out turns are, and whether they are written word for word."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

from plait.chat.evaluate_replies import evaluate_replies
from plait.evaluation import metrics
from plait.evaluation.context import EvalContext
from plait.evaluation.findings import Gallery, GalleryKind, ReportItem
from plait.evaluation.keys import Direction
from plait.model.cross_entropy import negative_log_likelihood
from plait.model.multimodal import IGNORE, Sequence, collate
from plait.training.conversations import ConversationEncoder, sequences


def evaluate_texts(eval_context: EvalContext) -> None:
    """Auto-reply, and all columns of conversations."""
    evaluate_replies(eval_context)
    for column in eval_context.chats:
        evaluate_conversations(eval_context, column)


def evaluate_conversations(eval_context: EvalContext, column: str) -> None:
    """The assistant's turns of a split, each after what was really said before it. The baseline of likelihood counts
    the tokens of train's replies, that of writing always gives train's most common reply."""
    checkpoint = eval_context.model.checkpoint
    vocabulary, text = checkpoint.model.vocabulary, checkpoint.text
    conversations = _read(eval_context, column, eval_context.split, eval_context.limits.records)
    if not conversations:
        return
    tokens = [token for sequence in _read(eval_context, column, "train", eval_context.limits.records)
              for token in sequence.targets if token != IGNORE]  # fmt: skip
    counts = np.ones(vocabulary.id_ranges["text"][1])
    np.add.at(counts, tokens, 1)
    nats, sizes, plain = _likelihood(eval_context, conversations, -np.log(counts / counts.sum()))
    value, error = metrics.ratio_with_error(nats, sizes, seed=eval_context.seed)
    chance, n, direction = math.log(len(counts)), int(sizes.sum()), Direction(column)
    eval_context.keep("chat", direction, "nats_per_token", value, stderr=error, chance=chance, baseline=plain, n=n)

    turns = [turn for sequence in conversations for turn in _turns(sequence)]
    turns = [turns[i] for i in eval_context.draw(np.arange(len(turns)), eval_context.limits.written)]
    truth = [text.decode(ids[:-1]) for _, ids in turns]
    stops = {text.decode(ids[-1:]) for _, ids in turns if ids[-1] != vocabulary.end}
    eval_context.progress(f"chat {column}", 0, len(turns))
    written = eval_context.model.continue_text([context for context, _ in turns], stop=sorted(stops))
    same = np.array([a.strip() == b.strip() for a, b in zip(truth, written, strict=True)])
    train = [text.decode(ids[:-1]) for sequence in _read(eval_context, column, "train", eval_context.limits.records)
             for _, ids in _turns(sequence)]  # fmt: skip
    everyday = Counter(train).most_common(1)[0][0] if train else ""
    value, error = metrics.mean_with_error(same, seed=eval_context.seed)
    fixed = float(np.mean([reply == everyday for reply in truth]))
    eval_context.keep("chat", direction, "exact", value, stderr=error, baseline=fixed, n=len(same))
    rows = [
        (ReportItem(text=text.decode([id for id in context.ids if id < vocabulary.text])),
         [ReportItem("truth", text=one), ReportItem("written", text=other, right=bool(right))])
        for (context, _), one, other, right in list(zip(turns, truth, written, same, strict=True))[:8]
    ]  # fmt: skip
    note = "The first of the test, none chosen."
    eval_context.findings.galleries.append(Gallery(f"Written: {column}", note, rows, GalleryKind.WRITTEN))


def _read(eval_context: EvalContext, column: str, split: str, most: int) -> list[Sequence]:
    """The conversations of a split as training sees them, with nothing written but text."""
    model, dataset = eval_context.model.checkpoint.model, eval_context.dataset
    indices = eval_context.draw(dataset.indices(split), most)
    conversations: list[Sequence] = []
    for record in dataset.iterate(indices):
        value = record.parts.get(column)
        if not isinstance(value, str):
            continue
        samples = {
            name: model.media[dataset.columns[name]].windows(part)[0]
            for name, part in record.parts.items()
            if dataset.columns[name] in model.media
        }

        def size(_: int, name: str, samples: dict[str, np.ndarray] = samples) -> int:
            return model.media[dataset.columns[name]].token_count(len(samples[name])) + 2

        context = model.config.backbone.max_length
        encoder = ConversationEncoder(eval_context.model.checkpoint.text, model.vocabulary, context, size)
        encoded = next(encoder.conversations(0, [value]))
        conversations += sequences(encoded or [], model.vocabulary, model.media, samples, {})
    return conversations


@torch.no_grad()
def _likelihood(
    eval_context: EvalContext, conversations: list[Sequence], surprise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """(nats, tokens) by sequence, and the nats a token of a `surprise` (V,) that knows frequencies alone."""
    model = eval_context.model.checkpoint.model
    rows = model.output_embedding.of_type("text")
    nats, sizes, plain = np.zeros(len(conversations)), np.zeros(len(conversations)), 0.0
    order = np.argsort([len(sequence) for sequence in conversations], kind="stable")
    for start in range(0, len(order), 32):
        places = order[start : start + 32]
        batch = collate([conversations[i] for i in places], model.media, model.vocabulary.pad).to(eval_context.device)
        is_target = batch.targets != IGNORE
        loss = negative_log_likelihood(model(batch)[is_target], rows, batch.targets[is_target]).cpu().numpy()
        owner = places[is_target.nonzero()[:, 0].cpu().numpy()]
        np.add.at(nats, owner, loss)
        np.add.at(sizes, owner, 1)
        plain += float(surprise[batch.targets[is_target].cpu().numpy()].sum())
    return nats, sizes, plain / sizes.sum()


def _turns(sequence: Sequence) -> list[tuple[Sequence, list[int]]]:
    """Each of the assistant's turns: what comes before it, and its ids with the end."""
    turns = []
    for at, target in enumerate(sequence.targets):
        if target == IGNORE or (at and sequence.targets[at - 1] != IGNORE):
            continue
        stop = next((i for i in range(at, len(sequence)) if sequence.targets[i] == IGNORE), len(sequence))
        media = [medium for medium in sequence.media if medium[0] <= at]
        context = Sequence(sequence.ids[: at + 1], [IGNORE] * (at + 1), media)
        turns.append((context, sequence.targets[at:stop]))
    return turns
