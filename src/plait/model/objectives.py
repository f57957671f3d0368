"""What training minimises: the losses of tokens and of paired embeddings, a class each.

A new loss of tokens is a class below `TokenLoss`, one of pairs a class below `PairLoss` and an entry in `PAIR_LOSSES`
under the name that `model.contrastive` of a recipe has. The scalars that a loss learns, such as a temperature, belong
to the model, which registers them by name. Why these are two interfaces: decision 85.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.model.cross_entropy import STRIP, SplitTable, cut, total_loss

MAX_LOG_SCALE = 4.6  # of `logit_scale`: similarities are multiplied by 100 at most, as in CLIP


class TokenLoss(ABC):
    """A loss of the next tokens of one type."""

    @abstractmethod
    def __call__(self, hidden: Tensor, rows: Tensor | SplitTable, targets: Tensor) -> Tensor:
        """The sum of -log P over the targets, a scalar in nats.

        Args:
            hidden: States of the backbone, (N, D).
            rows: The rows of the output table that are possible there, (R, D).
            targets: The right rows, (N,) below R.
        """


@dataclass(frozen=True)
class CrossEntropy(TokenLoss):
    """The softmax over all rows; `smoothing` is the share of each target that is spread evenly over them."""

    smoothing: float = 0.0

    def __call__(self, hidden: Tensor, rows: Tensor | SplitTable, targets: Tensor) -> Tensor:
        return total_loss(hidden, rows, targets, self.smoothing)


@dataclass(frozen=True)
class SampledSoftmax(TokenLoss):
    """`CrossEntropy` whose normaliser is estimated from `draws` rows, drawn in proportion to (counts + 1)^3/4.

    A row that is drawn with chance q among k stands for 1 / (k q) rows; so weighted, the estimate has the right mean
    (Bengio and Senecal, 2003). The target itself is always counted, and never drawn.
    """

    counts: Tensor
    draws: int

    def __call__(self, hidden: Tensor, rows: Tensor | SplitTable, targets: Tensor) -> Tensor:
        assert isinstance(rows, Tensor)  # no row of what is drawn from is frozen
        rows = rows.to(hidden.dtype)
        chance = (self.counts + 1) ** 0.75
        chance = chance / chance.sum()
        drawn = torch.multinomial(chance, self.draws, replacement=True)
        correction = (chance[drawn] * self.draws).log()

        def part_loss(states: Tensor, part_targets: Tensor, candidates: Tensor, target_rows: Tensor) -> Tensor:
            logits = (states @ candidates.t()).float() - correction
            logits = logits.masked_fill(drawn == part_targets[:, None], -torch.inf)
            right = (states * target_rows).float().sum(1, True)
            return (torch.cat((right, logits), 1).logsumexp(1) - right[:, 0]).sum()

        total = hidden.new_zeros((), dtype=torch.float32)
        for part in cut(len(hidden), max(STRIP // self.draws, 1)):
            arguments = hidden[part], targets[part], rows[drawn], rows[targets[part]]
            if torch.is_grad_enabled():
                total = total + checkpoint(part_loss, *arguments, use_reentrant=False)
            else:
                total = total + part_loss(*arguments)
        return total


class PairLoss(ABC):
    """A loss of paired embeddings.

    Attributes:
        scalars: Name -> first value of each scalar that is learned with the model.
    """

    scalars: ClassVar[Mapping[str, float]]

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor, positives: Tensor, scalars: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar in nats.

        Args:
            a: Embeddings of one modality, (N, E), of unit length.
            b: Those of another modality, (N, E); row i belongs to the same record as row i of `a`.
            positives: (N, N) bool: whether a row of `a` and one of `b` belong together. The diagonal always does.
            scalars: The values of `scalars` now.
        """


class InfoNCE(PairLoss):
    """Softmax over the batch in both directions, as in CLIP (van den Oord et al., 2018; Radford et al., 2021).

    With several positives the target spreads evenly over them (Khosla et al., 2020), so the floor of the loss is the
    mean log of their number.
    """

    scalars: ClassVar[Mapping[str, float]] = {"logit_scale": math.log(1 / 0.07)}

    def __call__(self, a: Tensor, b: Tensor, positives: Tensor, scalars: Mapping[str, Tensor]) -> Tensor:
        logits = scalars["logit_scale"].clamp(max=MAX_LOG_SCALE).exp() * a @ b.t()
        share = positives.float()
        forward = -(share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        backward = -(share / share.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        return (forward + backward) / 2


class SigmoidLoss(PairLoss):
    """Each pair by itself, a positive or not, as in SigLIP (Zhai et al., 2023); the sum over pairs, by the rows."""

    scalars: ClassVar[Mapping[str, float]] = {"logit_scale": math.log(10.0), "logit_bias": -10.0}

    def __call__(self, a: Tensor, b: Tensor, positives: Tensor, scalars: Mapping[str, Tensor]) -> Tensor:
        logits = scalars["logit_scale"].clamp(max=MAX_LOG_SCALE).exp() * a @ b.t() + scalars["logit_bias"]
        sign = positives.to(logits.dtype) * 2 - 1
        return -F.logsigmoid(sign * logits).sum(1).mean()


PAIR_LOSSES: dict[str, PairLoss] = {"softmax": InfoNCE(), "sigmoid": SigmoidLoss()}


def pair_loss_of(parameters: Collection[str]) -> PairLoss:
    """The loss that a network was trained with, told by the scalars among the names of its parameters: of those that
    it has all scalars of, the loss with the most. Raises ValueError where it has those of none."""
    known = [loss for loss in PAIR_LOSSES.values() if set(loss.scalars) <= set(parameters)]
    if not known:
        raise ValueError("the network has the scalars of no loss of pairs")
    return max(known, key=lambda loss: len(loss.scalars))
