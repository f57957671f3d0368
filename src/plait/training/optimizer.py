"""AdamW with decay on matrices alone, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plait.training.distributed import is_shard

ROWS = ("token_embedding.", "lm_head.", "modalities.item.free")  # what belongs to one token or item alone


def make_optimizer(
    modules: list[nn.Module],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    encoder_lr_scale: float = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW over what is trainable in the modules; rows, norms and biases do not decay. Pretrained encoders learn
    at a share `encoder_lr_scale` of the learning rate, the entry "share" of their groups."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    hf_encoder: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and not name.startswith(ROWS) and "places" not in name
                (hf_encoder if ".encoder.hf_encoder." in name else decay if matrix else plain).append(parameter)
    # A fused step takes whole tensors or shards, not both at once.
    groups = [
        {"params": chosen, "weight_decay": rate, "share": share}
        for some, rate, share in ((decay, weight_decay, 1.0), (plain, 0.0, 1.0), (hf_encoder, 0.0, encoder_lr_scale))
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


class Average:
    """An exponential moving average of a model's trainable weights; its memory grows to that of `decay`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trainable()}

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step. Early on the average is short, so that it forgets where it began."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for sharded in (False, True):
            mine = [(self.weights[name], p.detach()) for name, p in self._trainable() if is_shard(p) == sharded]
            if mine:
                torch._foreach_lerp_([w for w, _ in mine], [p for _, p in mine], 1 - decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the model computes with the average; after, with its own weights again, to the bit."""
        own = {name: p.detach().clone() for name, p in self._trainable()}
        self._fill(self.weights)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._trainable():
            parameter.copy_(weights[name])
