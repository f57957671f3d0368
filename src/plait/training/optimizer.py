"""AdamW with decay on matrices alone, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from plait.training.distributed import is_shard


def make_optimizer(
    modules: list[nn.Module], learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Fused AdamW over what is trainable in the modules; rows, norms and biases do not decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and not name.startswith(("rows.", "head.")) and "places" not in name
                (decay if matrix else plain).append(parameter)
    # A fused step takes whole tensors or shards, not both at once.
    groups = [
        {"params": chosen, "weight_decay": rate}
        for some, rate in ((decay, weight_decay), (plain, 0.0))
        for sharded in (False, True)
        if (chosen := [p for p in some if is_shard(p) == sharded])
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rise = max(int(steps * warmup), 1)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
