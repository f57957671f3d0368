"""Low-rank updates of frozen matrices: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

A matrix W stays as it is and W + (alpha / rank) up down is learned. Our queries, keys and values are one matrix, and so
are gate and up: each of them is a part with an update of its own, as PEFT has them. Frozen weights may be in 16 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plait.kernels import training as native
from plait.model.transformer import Transformer, TransformerConfig

ADAPTED = ("qkv", "attention_out", "feed_in", "feed_out")  # the matrices of a block


@dataclass(frozen=True)
class Part:
    """The outputs `start` to `stop` of a layer, which have an update of their own: scale * up down."""

    start: int
    stop: int
    rank: int
    scale: float


def parts_of(config: TransformerConfig, name: str, outputs: int, rank: int, alpha: float) -> list[Part]:
    """The parts of one of a block's matrices, of `outputs` rows."""
    sizes = [outputs]
    if name == "qkv":
        sizes = [heads * config.head_width for heads in (config.heads, config.kv_heads, config.kv_heads)]
    elif name == "feed_in" and config.gated:
        sizes = [config.hidden, config.hidden]
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return [Part(stop - size, stop, rank, alpha / rank) for size, stop in zip(sizes, stops, strict=True)]


class _Product(torch.autograd.Function):
    """x (N, in) to x W' + b and the updates, (N, out), in the precision of x. W, which may be in 16 bit, has no
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *updates: Tensor
    ) -> Tensor:
        downs, ups = updates[: len(parts)], updates[len(parts) :]
        out = native.product(x, weight.to(x.dtype).t())
        if bias is not None:
            out += bias
        inner = x @ torch.cat(downs).to(x.dtype).t()
        for part, piece, up in zip(parts, inner.split([part.rank for part in parts], 1), ups, strict=True):
            out[:, part.start : part.stop].addmm_(piece, up.to(x.dtype).t(), alpha=part.scale)
        ctx.save_for_backward(x, weight, inner, *updates)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, *updates = ctx.saved_tensors
        parts: Sequence[Part] = ctx.parts
        downs, ups = updates[: len(parts)], updates[len(parts) :]
        inner = inner.to(grad.dtype).split([part.rank for part in parts], 1)
        through, to_ups = [], []
        for part, piece, up in zip(parts, inner, ups, strict=True):
            own = grad[:, part.start : part.stop]
            through.append(part.scale * (own @ up.to(grad.dtype)))
            to_ups.append((part.scale * (own.t() @ piece)).to(up.dtype))
        middle = torch.cat(through, 1)
        to_down = (middle.t() @ x.to(grad.dtype)).to(downs[0].dtype)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = native.product(grad, weight.to(grad.dtype))
            to_x.addmm_(middle, torch.cat(downs).to(grad.dtype))
        return to_x, None, None, None, *to_down.split([part.rank for part in parts]), *to_ups


class LowRank(nn.Module):
    """A linear layer's weight and bias, frozen, and `down` and `up` beside them, a pair for each part."""

    def __init__(self, linear: nn.Linear, parts: Sequence[Part]) -> None:
        """The updates begin as zero; `down` comes from torch's global generator."""
        super().__init__()
        self.in_features, self.out_features, self.parts = linear.in_features, linear.out_features, list(parts)
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        device, inputs = linear.weight.device, linear.in_features
        self.down = nn.ParameterList(torch.randn(p.rank, inputs, device=device) * inputs**-0.5 for p in parts)
        self.up = nn.ParameterList(torch.zeros(p.stop - p.start, p.rank, device=device) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        with torch.autocast(kind, enabled=False):
            out = _Product.apply(flat, self.weight, self.bias, self.parts, *self.down, *self.up)
        return cast(Tensor, out).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same as a plain layer, in fp32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.float() if self.weight.dtype is not torch.float32 else self.weight.clone()
        for part, down, up in zip(self.parts, self.down, self.up, strict=True):
            weight[part.start : part.stop] += part.scale * (up.float() @ down.float())
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return linear


def adapt(backbone: Transformer, rank: int, alpha: float) -> None:
    """Freeze a backbone and give the matrices of its blocks low-rank updates, which begin as zero. The numbers that
    they begin with come from torch's global generator."""
    backbone.requires_grad_(False)
    backbone.halves_saved = True
    for block in backbone.blocks:
        for name in ADAPTED:
            linear = cast(nn.Linear, getattr(block, name))
            setattr(block, name, LowRank(linear, parts_of(backbone.config, name, linear.out_features, rank, alpha)))


def merge(backbone: Transformer) -> None:
    """Add the updates to the matrices, one after the other: plain layers are left."""
    backbone.halves_saved = False
    for block in backbone.blocks:
        for name, module in list(block.named_children()):
            if isinstance(module, LowRank):
                setattr(block, name, module.merged())


def adapted(model: nn.Module) -> bool:
    """Whether a model has low-rank updates."""
    return any(isinstance(module, LowRank) for module in model.modules())
