"""The cross-entropy of many targets over large tables, forwards and backwards, without holding all logits."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.kernels import training as native

CHUNK = 2**24  # logits that exist at one time
STRIP = 2**21  # of them in fp32
ROUND = 128  # states, to a multiple of which their number is filled up
FROZEN_STRIP = 8192  # frozen rows that are widened at a time
SPLIT_LOGITS = 2**25  # logits over frozen rows that exist at one time
CLOSE, TALL = 2**23, 4 * ROUND  # of them where they are passed over once, but of so many rows at least
MANY, SAFE = 1024, 60.0  # rows from which that pays, and the greatest logit that it is right for


class SplitTable:
    """A table (V, D) of which the first rows are frozen, in whatever precision, and the `rest` may be learned."""

    def __init__(self, frozen: Tensor, rest: Tensor) -> None:
        self.frozen, self.rest = frozen, rest

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (N,), (N, D) in fp32."""
        count = len(self.frozen)
        later = ids >= count
        rows = F.embedding(ids.clamp(max=count - 1), self.frozen).float()
        if not bool(later.any()):
            return rows
        return torch.where(later[:, None], F.embedding((ids - count).clamp(min=0), self.rest), rows)

    def dense(self) -> Tensor:
        """The table (V, D) as one tensor, in fp32."""
        return torch.cat((self.frozen.float(), self.rest.float()))

    def part(self, start: int, stop: int) -> SplitTable:
        """The rows from `start` to `stop`."""
        count = len(self.frozen)
        return SplitTable(self.frozen[start:stop], self.rest[max(start - count, 0) : max(stop - count, 0)])


def cut(count: int, size: int) -> list[slice]:
    """Slices of `size` that cover `count` rows; the last may reach beyond."""
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
        safe = len(rows) >= MANY and not native.supports(hidden) and _small(hidden, rows)
        ctx.dtype, rows = rows.dtype, rows.to(hidden.dtype)
        count, more = len(hidden), -len(hidden) % ROUND
        # States of zero have no gradient and give none, and spare oneDNN kernels for one more shape.
        hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
        losses, to_hidden, to_rows = (_bounded if safe else _shifted)(hidden, rows, targets, smoothing)
        ctx.save_for_backward(to_hidden[:count], to_rows.to(ctx.dtype))
        return losses[:count].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_hidden, to_rows = ctx.saved_tensors
        return to_hidden.mul_(grad), to_rows.mul_(grad), None, None


def _small(hidden: Tensor, rows: Tensor) -> bool:
    """Whether no maximum has to be sought and taken off: no logit is above the product of the norms."""
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (hidden, rows)]
    return float(norms[0] * norms[1]) < SAFE


def _shifted(hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N, 1) and their sum's gradients to hidden and rows, whatever the logits are."""
    losses = torch.empty(len(hidden), 1, device=hidden.device)
    to_hidden = torch.empty_like(hidden)
    to_rows: Tensor | None = None
    compiled = hidden.dtype is native.activations(hidden)
    for part in cut(len(hidden), max(CHUNK // len(rows) // ROUND, 1) * ROUND):  # fewer would slow the products down
        target_column, logits = targets[part, None], native.product(hidden[part], rows.t())
        if compiled:
            losses[part] = native.softmax_loss(logits, targets[part], smoothing)
        for strip in cut(0 if compiled else len(logits), max(STRIP // len(rows), 1)):
            chances = logits[strip].softmax(1, dtype=torch.float32)
            # The likeliest id's chance and logit give the normaliser.
            normaliser = logits[strip].amax(1, True).float() - chances.amax(1, True).log_()
            loss = normaliser - logits[strip].gather(1, target_column[strip])
            losses[part][strip] = loss
            chances.scatter_(1, target_column[strip], torch.expm1(-loss) + smoothing)
            if smoothing:
                evenly = normaliser - logits[strip].float().mean(1, True)
                losses[part][strip] += smoothing * (evenly - loss)
                chances -= smoothing / len(rows)
            logits[strip] = chances  # the gradient takes the logits' place
        to_hidden[part] = native.product(logits, rows)
        added = native.product(logits.t(), hidden[part])
        to_rows = added if to_rows is None else to_rows.float().add_(added)
    assert to_rows is not None
    return losses, to_hidden, to_rows


def _bounded(hidden: Tensor, rows: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_shifted` for logits whose exponentials cannot overflow: one pass over them between the products. What is
    divided by the normaliser, and what concerns the targets alone, has the width of a row."""
    losses = torch.empty(len(hidden), 1, device=hidden.device)
    to_hidden = torch.empty_like(hidden)
    to_rows: Tensor | None = None
    target_rows = rows[targets]
    middle = rows.float().mean(0) if smoothing else None
    # Each part adds to a gradient as large as all rows: more parts cost more memory traffic than larger ones do.
    for part in cut(len(hidden), max(CLOSE // len(rows) // ROUND * ROUND, TALL)):
        states = hidden[part]
        chances = (states @ rows.t()).exp_()
        # Each sum is taken in fp32 and rounded once; some of them together round less than one.
        normaliser = torch.stack([piece.sum(1, True) for piece in chances.chunk(8, 1)]).float().sum(0)
        mean = (chances @ rows).float() / normaliser  # of the rows, by their chance
        wide, target_row = states.float(), target_rows[part].float()
        if middle is not None:
            target_row = target_row * (1 - smoothing) + middle * smoothing
        losses[part] = normaliser.log() - (wide * target_row).sum(1, True)
        to_hidden[part] = mean - target_row
        added = chances.t() @ (wide / normaliser).to(rows.dtype)
        to_rows = added.float() if to_rows is None else to_rows.add_(added)
    assert to_rows is not None
    to_rows.index_add_(0, targets, hidden.float(), alpha=smoothing - 1)
    if smoothing:
        to_rows -= hidden.float().sum(0) * (smoothing / len(rows))
    return losses, to_hidden, to_rows


def total_loss(hidden: Tensor, rows: Tensor | SplitTable, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum of `negative_log_likelihood`, a scalar in nats. Products are in the precision of hidden; rows, whose
    gradient is summed in fp32, keep their own, so that it is not rounded on its way to them."""
    if isinstance(rows, SplitTable):
        return cast(
            Tensor, _SplitLoss.apply(hidden, rows.frozen, rows.rest, targets, smoothing, torch.is_grad_enabled())
        )
    if torch.is_grad_enabled():
        return cast(Tensor, _TotalLoss.apply(hidden, rows, targets, smoothing))
    return negative_log_likelihood(hidden, rows.to(hidden.dtype), targets, smoothing).sum()


class _SplitLoss(torch.autograd.Function):
    """`_TotalLoss` where most rows are frozen: they may be in 16 bit, are widened strip by strip, and have no gradient.
    The logits of some states exist at a time, and the frozen rows are never held twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, frozen: Tensor, rest: Tensor, targets: Tensor, smoothing: float, learning: bool
    ) -> Tensor:
        wide = hidden if hidden.dtype is not torch.float16 else hidden.float()
        rows = len(frozen) + len(rest)
        strips = [frozen[part] for part in cut(len(frozen), FROZEN_STRIP)] + ([rest] if len(rest) else [])
        stops = torch.tensor([len(strip) for strip in strips]).cumsum(0).tolist()
        losses = torch.empty(len(hidden), device=hidden.device)
        to_hidden, to_rest = torch.zeros_like(wide), torch.zeros_like(rest, dtype=torch.float32)
        for part in cut(len(hidden), max(SPLIT_LOGITS // rows // 64, 1) * 64):
            states = wide[part]
            logits = states.new_empty(len(states), rows)
            for strip, stop in zip(strips, stops, strict=True):
                logits[:, stop - len(strip) : stop] = native.product(states, strip.to(wide.dtype).t())
            losses[part] = _into_gradient(logits, targets[part], smoothing)
            for strip, stop in zip(strips, stops, strict=True) if learning else ():
                grad = logits[:, stop - len(strip) : stop]
                to_hidden[part] += native.product(grad, strip.to(wide.dtype))
                if strip is rest:
                    to_rest += (grad.t() @ states).float()
        ctx.save_for_backward(to_hidden.to(hidden.dtype), to_rest.to(rest.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        to_hidden, to_rest = ctx.saved_tensors
        return to_hidden.mul_(grad), None, to_rest.mul_(grad), None, None, None


def _into_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """-log P of targets (N,) in nats, (N,), from logits (N, R), which become the gradients of their sum."""
    if logits.dtype is native.activations(logits):
        return native.softmax_loss(logits, targets, smoothing)[:, 0]
    losses = torch.empty(len(logits), device=logits.device)
    column = targets[:, None]
    for strip in cut(len(logits), max(STRIP // logits.shape[1], 1)):
        logs = logits[strip].log_softmax(1, dtype=torch.float32)
        losses[strip] = -(1 - smoothing) * logs.gather(1, column[strip])[:, 0] - smoothing * logs.mean(1)
        chances = logs.exp_()
        chances.scatter_add_(1, column[strip], torch.full_like(chances[:, :1], smoothing - 1))
        logits[strip] = chances - smoothing / logits.shape[1]
    return losses
