"""AdamW with decay on matrices alone, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.training.distributed import is_shard

Kind = Literal["decay", "no_decay", "pretrained"]


def parameter_kinds(module: nn.Module, inherited: Kind | None = None) -> dict[nn.Parameter, Kind]:
    """How each trainable parameter is treated by the optimizer.

    A module's class says so as `optimizer_groups`: name of a parameter of its own -> kind, or "*" -> kind for all that
    is inside it. Of the rest, matrices decay; vectors, such as norms and biases, do not.
    """
    declared: dict[str, Kind] = getattr(module, "optimizer_groups", {})
    inherited = declared.get("*", inherited)
    kinds: dict[nn.Parameter, Kind] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            kinds[parameter] = declared.get(name) or inherited or ("decay" if parameter.ndim >= 2 else "no_decay")
    for child in module.children():
        kinds |= parameter_kinds(child, inherited)
    return kinds


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer for networks of other programs: matrices decay, vectors do not."""
    known = list(parameters)
    return [
        {"params": [p for p in known if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in known if p.ndim <= 1], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """Fused AdamW that clips gradients by their norm in the pass that it makes over them anyway."""

    grad_scale: Tensor | None = None  # what PyTorch's fused step divides gradients by as it reads them

    def clip(self, norm: Tensor, largest: float) -> None:
        """Have the next step use gradients of a norm of at most `largest`, where now it is `norm`."""
        self.grad_scale = None
        if norm <= largest:
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(map(is_shard, parameters)):  # a scale for shards would have to be one on every device mesh
            for sharded in (False, True):
                torch.nn.utils.clip_grads_with_norm_([p for p in parameters if is_shard(p) == sharded], largest, norm)
        else:
            self.grad_scale = norm / largest


def make_optimizer(
    modules: list[nn.Module],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    encoder_lr_scale: float = 1.0,
) -> AdamW:
    """AdamW over what is trainable in the modules.

    Args:
        modules: Whose parameters are trained; see `parameter_kinds`.
        learning_rate: Of all groups at first; each has an entry "lr_scale" by which a schedule is to be multiplied.
        weight_decay: Of the kind "decay"; the others have none.
        betas: Of Adam.
        encoder_lr_scale: The "lr_scale" of the kind "pretrained"; that of the others is 1.
    """
    kinds: dict[nn.Parameter, Kind] = {}
    for module in modules:
        kinds |= parameter_kinds(module)
    groups = []
    for kind, decay, lr_scale in (
        ("decay", weight_decay, 1.0),
        ("no_decay", 0.0, 1.0),
        ("pretrained", 0.0, encoder_lr_scale),
    ):
        for sharded in (False, True):  # a fused step takes whole tensors or shards, not both at once
            parameters = [p for p, own in kinds.items() if own == kind and is_shard(p) == sharded]
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": lr_scale})
    return AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class WeightAverage:
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
            pairs = [(self.weights[name], p.detach()) for name, p in self._trainable() if is_shard(p) == sharded]
            if pairs:
                torch._foreach_lerp_([w for w, _ in pairs], [p for _, p in pairs], 1 - decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the model computes with the average; after, with its own weights again, to the bit."""
        raw = {name: p.detach().clone() for name, p in self._trainable()}
        self._fill(self.weights)
        try:
            yield
        finally:
            self._fill(raw)

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._trainable():
            parameter.copy_(weights[name])
