"""Contrastive losses: how paired embeddings of one space are made to agree.

A loss is one class with one interface, and an entry in `PAIR_LOSSES` under the name that `model.contrastive` of a
recipe has. The scalars that it learns, such as a temperature, belong to the model, which registers them by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

MAX_LOG_SCALE = 4.6  # of `logit_scale`: similarities are multiplied by 100 at most, as in CLIP


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
