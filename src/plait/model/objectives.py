"""What training maximises: likelihoods, averaged per token within a space, and agreement of paired embeddings."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.model.multimodal import IGNORE, Multimodal

CHUNK = 2**24  # logits that exist at one time
STRIP = 2**21  # of them in fp32


def cut(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def negative_log_likelihood(hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log P of each target: hidden (N, D), rows (R, D), targets (N,) below R; returns (N,) in nats, fp32.

    `smoothing` is the share of each target that is spread evenly over all R (Szegedy et al., 2016).
    """
    parts = [
        F.cross_entropy((hidden[part] @ rows.t()).float(), targets[part], reduction="none", label_smoothing=smoothing)
        for part in cut(len(hidden), max(CHUNK // 4 // len(rows), 1))
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _TotalLoss(torch.autograd.Function):
    """The sum of `negative_log_likelihood`, whose gradients are taken chunk by chunk as it is computed, so that the
    whole logits never exist: a sum's gradients are known up to a factor (as in Liger: Hsu et al., 2024)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        parts = cut(len(hidden), max(CHUNK // len(rows), 128))  # fewer would slow the products down
        losses = torch.empty(len(hidden), 1, device=hidden.device)
        to_hidden = torch.empty_like(hidden)
        to_rows: Tensor | None = None
        for part in parts:
            wanted, logits = targets[part, None], hidden[part] @ rows.t()
            for strip in cut(len(logits), max(STRIP // len(rows), 1)):
                chances = logits[strip].softmax(1, dtype=torch.float32)
                # The likeliest id's chance and logit give the normaliser.
                normaliser = logits[strip].amax(1, True).float() - chances.amax(1, True).log_()
                loss = normaliser - logits[strip].gather(1, wanted[strip])
                losses[part][strip] = loss
                chances.scatter_(1, wanted[strip], torch.expm1(-loss) + smoothing)
                if smoothing:
                    evenly = normaliser - logits[strip].float().mean(1, True)
                    losses[part][strip] += smoothing * (evenly - loss)
                    chances -= smoothing / len(rows)
                logits[strip] = chances  # the gradient takes the logits' place
            to_hidden[part] = logits @ rows
            if to_rows is None:
                to_rows = logits.t() @ hidden[part]
            else:
                to_rows = to_rows.float().add_(logits.t() @ hidden[part])
        assert to_rows is not None
        total = losses.sum()
        ctx.save_for_backward(to_hidden, to_rows.to(rows.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_hidden, to_rows = ctx.saved_tensors
        return to_hidden.mul_(slope), to_rows.mul_(slope), None, None


def total_loss(hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `negative_log_likelihood`, a scalar in nats; hidden and rows in the precision of the products."""
    if torch.is_grad_enabled():
        return cast(Tensor, _TotalLoss.apply(hidden, rows, targets, smoothing))
    return negative_log_likelihood(hidden, rows, targets, smoothing).sum()


def likelihoods(
    model: Multimodal, hidden: Tensor, targets: Tensor, restricted: bool = True, smoothing: float = 0.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Space -> (sum of -log P in nats, count) over the targets (B, L) that lie in it.

    Restricted, the softmax of a target runs over its own space: what the span grammar allows there. Unrestricted,
    it runs over the whole vocabulary, and the figures are still told apart by space.
    """
    keep = targets != IGNORE
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    states, wanted = hidden[keep].to(dtype), targets[keep]
    found = {}
    table = None if restricted else model.predicting.table().to(dtype)
    for space, (start, stop) in model.vocabulary.spaces.items():
        chosen = (wanted >= start) & (wanted < stop)
        if not chosen.any():
            continue
        if table is None:
            rows = model.predicting.space(space).to(dtype)
            loss = total_loss(states[chosen], rows, wanted[chosen] - start, smoothing)
        else:
            loss = total_loss(states[chosen], table, wanted[chosen], smoothing)
        found[space] = loss, chosen.sum()
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
