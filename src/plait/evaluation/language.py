"""How well a text is predicted, token by token."""

from __future__ import annotations

import numpy as np
import torch

from plait.inference.model import PlaitModel
from plait.model.multimodal import IGNORE, Sequence, collate
from plait.model.objectives import negative_log_likelihood
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
        wanted = batch.targets != IGNORE
        loss = negative_log_likelihood(network(batch)[wanted], rows, batch.targets[wanted]).cpu().numpy()
        owner = places[wanted.nonzero()[:, 0].cpu().numpy()]
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
