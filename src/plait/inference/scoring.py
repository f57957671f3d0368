"""Likelihoods of given texts and embeddings of given inputs, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.errors import ContextLengthError, PlaitError
from plait.core.interruption import pause_point
from plait.inference.engine import Engine, top_ids
from plait.inference.requests import TopIds
from plait.kernels.linear import PackedLinear
from plait.model.cross_entropy import negative_log_likelihood
from plait.model.multimodal import IGNORE, Sequence, collate, embed_tokens

PLACES = 64  # of a prompt whose scores of the whole vocabulary exist at a time
POSITIONS = 8192  # padded positions in one forward pass


def batches(lengths: list[int], batch_size: int, extra: int = 0) -> Iterator[list[int]]:
    """Indices by ascending length, at most `batch_size` of them and about POSITIONS padded positions at a time; `extra`
    positions come on top of each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and stop - start < batch_size:
            if (stop + 1 - start) * (lengths[order[stop]] + extra) > POSITIONS:
                break
            stop += 1
        pause_point()
        yield order[start:stop]
        start = stop


def score(
    engine: Engine, contexts: list[Sequence], texts: list[list[int]], batch_size: int = 256, ends: bool = True
) -> np.ndarray:
    """log P(ids and end | context) in nats, (contexts, texts) float64; without `ends`, of the ids alone.

    A context is read once: the texts hang on it as branches, each of which sees the context and itself, in the
    places that it would have alone. Raises PlaitError where a context and a text have no room.
    """
    limit = engine.max_length
    longest = max((len(ids) for ids in texts), default=0)
    for context in contexts:
        if not len(context):
            raise PlaitError("The context is empty. Give a context that ends with the opener of a column.")
        if len(context) + longest > limit:
            raise PlaitError(f"A context of {len(context)} tokens and a text of {longest} exceed this model's {limit}.")
    scores = np.zeros((len(contexts), len(texts)))
    # Branches are cut into chunks as long as the contexts may be, so that no forward pass grows beyond its budget.
    chunks: list[list[int]] = [[]]
    for column in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if chunks[-1] and sum(len(texts[i]) for i in chunks[-1]) + len(texts[column]) > 512:
            chunks.append([])
        chunks[-1].append(column)
    lengths = [len(context) for context in contexts]
    for chunk in chunks if texts else []:
        branch = [texts[i] for i in chunk]
        for rows in batches(lengths, batch_size, sum(map(len, branch))):
            scores[np.ix_(rows, chunk)] = _tree(engine, [contexts[row] for row in rows], branch, ends)
    return scores


def _tree(engine: Engine, contexts: list[Sequence], texts: list[list[int]], ends: bool) -> np.ndarray:
    model, device = engine.model, engine.device.torch
    with torch.inference_mode():
        batch = collate(contexts, model.media, model.vocabulary.pad).to(device)
        with engine.device.autocast():
            trunk = model.inputs(batch, engine.table)  # (B, C, D)
        end = engine.spans["text"].end if ends else None
        hidden = branches(engine.decoder, trunk, batch.lengths, engine.table, engine.head("text"), texts, end)
        return hidden.double().cpu().numpy()


def branches(
    backbone: Callable[..., Tensor],
    trunk: Tensor,
    lengths: Tensor,
    table: Tensor | PackedLinear,
    head: Tensor,
    texts: list[list[int]],
    end: int | None,
) -> Tensor:
    """log P(ids, then `end` unless it is None | context) in nats, (B, texts) fp32, with gradients where wanted.

    `trunk` (B, C, D) embeds the contexts, `lengths` (B,) are theirs; `table` has a row for each id to read and `head`
    one for each to predict. Without an end no text may be empty.
    """
    device = trunk.device
    rows, columns = trunk.shape[:2]
    ids = [token for text in texts for token in text]
    owner = torch.tensor([i for i, text in enumerate(texts) for _ in text], dtype=torch.long, device=device)
    place = torch.tensor([j for text in texts for j in range(len(text))], dtype=torch.long, device=device)
    leaves = embed_tokens(torch.tensor(ids, dtype=torch.long, device=device), table)
    x = torch.cat((trunk, leaves.expand(rows, -1, -1)), 1)
    at = torch.arange(columns, device=device)
    positions = torch.cat((at.expand(rows, -1), lengths[:, None] + place), 1)
    total = columns + len(ids)
    mask = torch.zeros(rows, total, total, dtype=torch.bool, device=device)
    mask[:, :columns, :columns] = at <= at[:, None]
    mask[:, columns:, :columns] = (at < lengths[:, None])[:, None]
    mask[:, columns:, columns:] = (owner == owner[:, None]) & (place <= place[:, None])
    hidden = backbone(x, positions=positions, mask=mask[:, None])
    last = hidden[torch.arange(rows, device=device), lengths - 1].to(head.dtype)
    first = torch.tensor([text[0] if text else end for text in texts], device=device)
    scores = F.linear(last, head).float().log_softmax(-1)[:, first]  # (B, texts)
    targets = [token for text in texts if text for token in [*text[1:], -1 if end is None else end]]
    scored = torch.tensor([i for i, token in enumerate(targets) if token >= 0], dtype=torch.long, device=device)
    if len(scored):
        goals = torch.tensor(targets, device=device)[scored]
        states = hidden[:, columns + scored].reshape(-1, hidden.shape[-1]).to(head.dtype)
        loss = negative_log_likelihood(states, head, goals.repeat(rows)).view(rows, -1)
        scores = scores.index_add(1, owner[scored], -loss)
    return scores


def logit_lens(engine: Engine, context: Sequence) -> list[Tensor]:
    """What each layer would say next, fp32 logits (text ids) each: its hidden state at the context's end through the
    final norm and the head; the embedding first, the last layer last (nostalgebraist, "the logit lens", 2020)."""
    model, logits = engine.model, []
    with torch.inference_mode(), engine.device.autocast():
        x = model.inputs(collate([context], model.media, model.vocabulary.pad).to(engine.device.torch), engine.table)
        states = [x]
        handles = [
            block.register_forward_hook(lambda module, inputs, out: states.append(out))
            for block in engine.decoder.whole.blocks
        ]
        try:
            engine.decoder(x)
        finally:
            for handle in handles:
                handle.remove()
        for state in states:
            last = engine.decoder.whole.final_norm(state[:, -1])[0].to(engine.device.dtype)
            logits.append((last @ engine.head("text").t()).float())
    return logits


def token_log_probs(
    engine: Engine, sequences: list[Sequence], token_type: str, batch_size: int = 256
) -> list[np.ndarray]:
    """log P of each id that a sequence writes, all of one space, in nats: an array (ids,) each.

    Raises PlaitError where a sequence is longer than the model reads.
    """
    model = engine.model
    log_probs: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    if longest := max((len(sequence) for sequence in sequences if len(sequence) > engine.max_length), default=0):
        raise PlaitError(f"A sequence of {longest} tokens exceeds the {engine.max_length} that this model reads.")
    for rows in batches([len(sequence) for sequence in sequences], batch_size):
        with torch.inference_mode():
            batch = collate([sequences[row] for row in rows], model.media, model.vocabulary.pad)
            batch = batch.to(engine.device.torch)
            with engine.device.autocast():
                x = model.inputs(batch, engine.table)
            head = engine.head(token_type)
            keep = batch.targets != IGNORE
            states = engine.decoder(x)[keep].to(head.dtype)
            loss = negative_log_likelihood(states, head, batch.targets[keep] - engine.spans[token_type].start)
            pieces = (-loss).double().cpu().split(keep.sum(1).tolist())
        for row, piece in zip(rows, pieces, strict=True):
            log_probs[row] = piece.numpy()
    return log_probs


@dataclass(frozen=True)
class PromptScores:
    """log P in nats of each id of a prompt after those before it, None where it has none; and the likeliest ids."""

    logprobs: list[float | None]
    top: list[TopIds | None]


def prompt_scores(engine: Engine, prompts: list[Sequence], top: int = 0, batch_size: int = 32) -> list[PromptScores]:
    """How likely each prompt of text is, id by id, with the `top` likeliest ids at each place. The first id has no log
    probability, nor has one that no text holds. Raises ContextLengthError for a prompt that is longer than the model
    reads."""
    model, limit, span, predict = engine.model, engine.max_length, engine.spans["text"], engine.predict["text"]
    if longest := max((len(prompt) for prompt in prompts if len(prompt) > limit), default=0):
        raise ContextLengthError(f"The prompt takes {longest} tokens; this model has room for {limit}. Shorten it.")
    scores = [PromptScores([None], [None]) for _ in prompts]
    for rows in batches([len(prompt) for prompt in prompts], batch_size):
        with torch.inference_mode():
            batch = collate([prompts[row] for row in rows], model.media, model.vocabulary.pad).to(engine.device.torch)
            with engine.device.autocast():
                hidden = engine.decoder(model.inputs(batch, engine.table))
            for row, states in zip(rows, hidden, strict=True):
                targets = [token - span.start for token in prompts[row].ids[1:]]
                for at in range(0, len(targets), PLACES):
                    chances = predict(states[at : min(at + PLACES, len(targets))]).float().log_softmax(-1)
                    tops = top_ids(chances, top, span.start)
                    for place, token in enumerate(targets[at : at + PLACES]):
                        known = 0 <= token < span.stop - span.start
                        scores[row].logprobs.append(float(chances[place, token]) if known else None)
                        scores[row].top.append(tops[place] if tops and known else None)
    return scores


NO_SPACE = (
    "This model has no embedding space: it was trained without media, with training.weights.contrastive: 0 or with "
    "model.embed_dim: 0. Train one with media and without these."
)


def embed(engine: Engine, sequences: list[Sequence], batch_size: int = 256) -> np.ndarray:
    """The embedding of the first span of each sequence, (N, E) float32, of unit length."""
    model, limit = engine.model, engine.max_length
    if not model.config.embed_dim:
        raise PlaitError(NO_SPACE)
    embeddings = np.zeros((len(sequences), model.config.embed_dim), np.float32)
    for sequence in sequences:
        if not sequence.spans:
            raise PlaitError("There is nothing to embed: the input is empty.")
        if len(sequence) > limit:
            raise PlaitError(f"An input of {len(sequence)} tokens exceeds the {limit} that this model reads.")
    for rows in batches([len(sequence) for sequence in sequences], batch_size):
        part = [sequences[row] for row in rows]
        with torch.inference_mode(), engine.device.autocast():
            batch = collate(part, model.media, model.vocabulary.pad).to(engine.device.torch)
            inputs = model.inputs(batch, engine.table)
            hidden = engine.decoder(inputs)
            pooled = model.pool(inputs, hidden, [sequence.spans[0] for sequence in part])
        embeddings[rows] = pooled.float().cpu().numpy()
    return embeddings
