"""Low-rank updates of frozen matrices: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

A matrix W stays as it is and W + (alpha / rank) up down is learned. What is saved and used is the sum, under W's own
name: a checkpoint that was trained so is like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model.transformer import Transformer

ADAPTED = ("qkv", "attention_out", "feed_in", "feed_out")  # the matrices of a block


class LowRank(nn.Linear):
    """A linear layer that takes over another one's weight and bias, frozen, and learns `down` and `up` beside them."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, device=device) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.down), self.up)


def adapt(backbone: Transformer, rank: int, alpha: float) -> None:
    """Freeze a backbone and give the matrices of its blocks low-rank updates, which begin as zero. The numbers that
    they begin with come from torch's global generator."""
    backbone.requires_grad_(False)
    for block in backbone.blocks:
        for name in ADAPTED:
            setattr(block, name, LowRank(getattr(block, name), rank, alpha))


def split(model: nn.Module, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights with the updates added in, and the parts that this takes away: the matrices as they were, and
    the updates. Both are empty of the other's where the model has no updates."""
    whole, parts = dict(weights), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            base, down, up = (f"{name}.{part}" for part in ("weight", "down", "up"))
            parts |= {base: whole[base], down: whole.pop(down), up: whole.pop(up)}
            whole[base] = parts[base] + module.scale * (parts[up] @ parts[down])
    return whole, parts
