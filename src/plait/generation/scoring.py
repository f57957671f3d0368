"""Likelihoods of given texts and embeddings of given inputs, many at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from plait.generation.engine import Engine
from plait.model.multimodal import Sequence, collate
from plait.model.objectives import negative_log_likelihood
from plait.runtime import PlaitError

POSITIONS = 8192  # padded positions in one forward pass


def batches(lengths: list[int], most: int, extra: int = 0) -> Iterator[list[int]]:
    """Indices by ascending length, at most `most` of them and about POSITIONS padded positions at a time; `extra`
    positions come on top of each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and stop - start < most:
            if (stop + 1 - start) * (lengths[order[stop]] + extra) > POSITIONS:
                break
            stop += 1
        yield order[start:stop]
        start = stop


def score(engine: Engine, contexts: list[Sequence], texts: list[list[int]], most: int = 256) -> np.ndarray:
    """log P(ids and end | context) in nats, (contexts, texts) float64.

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
    found = np.zeros((len(contexts), len(texts)))
    # Branches are cut into chunks as long as the contexts may be, so that no forward pass grows beyond its budget.
    chunks: list[list[int]] = [[]]
    for column in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if chunks[-1] and sum(len(texts[i]) for i in chunks[-1]) + len(texts[column]) > 512:
            chunks.append([])
        chunks[-1].append(column)
    lengths = [len(context) for context in contexts]
    for chunk in chunks if texts else []:
        branch = [texts[i] for i in chunk]
        for rows in batches(lengths, most, sum(map(len, branch))):
            found[np.ix_(rows, chunk)] = _tree(engine, [contexts[row] for row in rows], branch)
    return found


def _tree(engine: Engine, contexts: list[Sequence], texts: list[list[int]]) -> np.ndarray:
    model, device = engine.model, engine.device.torch
    span, head = engine.spans["text"], engine.heads["text"]
    assert span.end is not None
    with torch.inference_mode():
        batch = collate(contexts, model.media, model.vocabulary.pad).to(device)
        with engine.device.autocast():
            trunk = model.inputs(batch, engine.table)  # (B, C, D)
        rows, columns = batch.tokens.shape
        ids = [token for text in texts for token in text]
        owner = torch.tensor([i for i, text in enumerate(texts) for _ in text], dtype=torch.long, device=device)
        place = torch.tensor([j for text in texts for j in range(len(text))], dtype=torch.long, device=device)
        branches = F.embedding(torch.tensor(ids, dtype=torch.long, device=device), engine.table)
        x = torch.cat((trunk, branches.expand(rows, -1, -1)), 1)
        at = torch.arange(columns, device=device)
        positions = torch.cat((at.expand(rows, -1), batch.lengths[:, None] + place), 1)
        total = columns + len(ids)
        mask = torch.zeros(rows, total, total, dtype=torch.bool, device=device)
        mask[:, :columns, :columns] = at <= at[:, None]
        mask[:, columns:, :columns] = (at < batch.lengths[:, None])[:, None]
        mask[:, columns:, columns:] = (owner == owner[:, None]) & (place <= place[:, None])
        hidden = engine.decoder(x, positions=positions, mask=mask[:, None])
        last = hidden[torch.arange(rows, device=device), batch.lengths - 1].to(head.dtype)
        first = torch.tensor([text[0] if text else span.end for text in texts], device=device)
        scores = F.linear(last, head).float().log_softmax(-1)[:, first]  # (B, texts)
        if ids:
            wanted = torch.tensor([token for text in texts if text for token in [*text[1:], span.end]], device=device)
            states = hidden[:, columns:].reshape(-1, hidden.shape[-1]).to(head.dtype)
            loss = negative_log_likelihood(states, head, wanted.repeat(rows)).view(rows, -1)
            scores = scores.index_add(1, owner, -loss)
        return scores.double().cpu().numpy()


def embed(engine: Engine, sequences: list[Sequence], most: int = 256) -> np.ndarray:
    """The embedding of the first span of each sequence, (N, E) float32, of unit length."""
    model, limit = engine.model, engine.max_length
    if not model.config.space:
        raise PlaitError("This model has no embedding space. Train one with an embedding width above 0.")
    found = np.zeros((len(sequences), model.config.space), np.float32)
    for sequence in sequences:
        if not sequence.spans:
            raise PlaitError("There is nothing to embed: the input is empty.")
        if len(sequence) > limit:
            raise PlaitError(f"An input of {len(sequence)} tokens exceeds the {limit} that this model reads.")
    for rows in batches([len(sequence) for sequence in sequences], most):
        part = [sequences[row] for row in rows]
        with torch.inference_mode(), engine.device.autocast():
            batch = collate(part, model.media, model.vocabulary.pad).to(engine.device.torch)
            hidden = engine.decoder(model.inputs(batch, engine.table))
            edges = torch.tensor([sequence.spans[0][1:] for sequence in part], device=hidden.device)
            pooled = model.pool(hidden, torch.arange(len(part), device=hidden.device), edges[:, 0], edges[:, 1])
        found[rows] = pooled.float().cpu().numpy()
    return found
