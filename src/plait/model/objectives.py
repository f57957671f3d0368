"""What training maximises: likelihoods, averaged per token within a space, and agreement of paired embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.model.multimodal import IGNORE, Multimodal

CHUNK = 2**22  # logits that exist at one time


def negative_log_likelihood(hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log P of each target: hidden (N, D), rows (R, D), targets (N,) below R; returns (N,) in nats, fp32.

    `smoothing` is the share of each target that is spread evenly over all R (Szegedy et al., 2016).
    """
    step = max(CHUNK // len(rows), 1)
    parts = [
        F.cross_entropy(
            (hidden[i : i + step] @ rows.t()).float(),
            targets[i : i + step],
            reduction="none",
            label_smoothing=smoothing,
        )
        for i in range(0, len(hidden), step)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def likelihoods(
    model: Multimodal, hidden: Tensor, targets: Tensor, restricted: bool = True, smoothing: float = 0.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Space -> (sum of -log P in nats, count) over the targets (B, L) that lie in it.

    Restricted, the softmax of a target runs over its own space: what the span grammar allows there. Unrestricted,
    it runs over the whole vocabulary, and the figures are still told apart by space.
    """
    keep = targets != IGNORE
    states, wanted = hidden[keep], targets[keep]
    found = {}
    table = None if restricted else model.predicting.table().to(states.dtype)
    for space, (start, stop) in model.vocabulary.spaces.items():
        chosen = (wanted >= start) & (wanted < stop)
        if not chosen.any():
            continue
        if table is None:
            rows = model.predicting.space(space).to(states.dtype)
            loss = negative_log_likelihood(states[chosen], rows, wanted[chosen] - start, smoothing)
        else:
            loss = negative_log_likelihood(states[chosen], table, wanted[chosen], smoothing)
        found[space] = loss.sum(), chosen.sum()
    return found


def contrastive(a: Tensor, b: Tensor, positives: Tensor, log_temperature: Tensor) -> Tensor:
    """InfoNCE in both directions with several positives: a and b (N, E), positives (N, N) bool; a scalar in nats.

    The target spreads evenly over a row's positives (van den Oord et al., 2018; Khosla et al., 2020), so its floor
    is the mean log of their number.
    """
    logits = log_temperature.clamp(max=4.6).exp() * a @ b.t()
    share = positives.float()
    forward = -(share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    backward = -(share / share.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (forward + backward) / 2
