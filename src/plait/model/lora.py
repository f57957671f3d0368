"""Low-rank updates of frozen matrices: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

A matrix W stays as it is and W + (alpha / rank) up down is learned. Our queries, keys and values are one matrix, and so
are gate and up: each of them is a part with an update of its own, as PEFT has them. Frozen weights may be in 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
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
    stops = list(accumulate(sizes))
    return [Part(stop - size, stop, rank, alpha / rank) for size, stop in zip(sizes, stops, strict=True)]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], updates: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """x W' + b and the updates, (N, out), and what the updates' lower halves make of x, (N, ranks)."""
    downs, ups = updates[: len(parts)], updates[len(parts) :]
    out = native.product(x, weight.to(x.dtype).t())
    if bias is not None:
        out += bias
    inner = x @ torch.cat(list(downs)).to(x.dtype).t()
    for part, piece, up in zip(parts, inner.split([part.rank for part in parts], 1), ups, strict=True):
        out[:, part.start : part.stop].addmm_(piece, up.to(x.dtype).t(), alpha=part.scale)
    return out, inner


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, inner: Tensor, parts: Sequence[Part], updates: Sequence[Tensor],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """The gradients to x, where it is needed, and to the updates. W has none."""
    downs, ups = updates[: len(parts)], updates[len(parts) :]
    through, to_ups = [], []
    pieces = inner.to(grad.dtype).split([part.rank for part in parts], 1)
    for part, piece, up in zip(parts, pieces, ups, strict=True):
        own = grad[:, part.start : part.stop]
        through.append(part.scale * (own @ up.to(grad.dtype)))
        to_ups.append((part.scale * (own.t() @ piece)).to(up.dtype))
    middle = torch.cat(through, 1)
    to_downs = (middle.t() @ x.to(grad.dtype)).to(downs[0].dtype).split([part.rank for part in parts])
    to_x = None
    if needs_x:
        to_x = native.product(grad, weight.to(grad.dtype))
        to_x.addmm_(middle, torch.cat(list(downs)).to(grad.dtype))
    return to_x, [*to_downs, *to_ups]


class _Product(torch.autograd.Function):
    """x (N, in) to x W' + b and the updates, (N, out), in the precision of x. W may be in 16 bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *updates: Tensor
    ) -> Tensor:
        out, inner = _forward(x, weight, bias, parts, updates)
        ctx.save_for_backward(x, weight, inner, *updates)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, *updates = ctx.saved_tensors
        to_x, to_updates = _backward(grad, x, weight, inner, ctx.parts, updates, ctx.needs_input_grad[0])
        return to_x, None, None, None, *to_updates


class _GatedProduct(torch.autograd.Function):
    """`_Product` of silu(gate) * up, for x (N, 2 in) of both. The gated values are computed again in the backward pass
    and not kept: of all that a block keeps they would be a quarter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *updates: Tensor
    ) -> Tensor:
        out, inner = _forward(native.gate_values(x), weight, bias, parts, updates)
        ctx.save_for_backward(x, weight, inner, *updates)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, *updates = ctx.saved_tensors
        to_gated, to_updates = _backward(grad, native.gate_values(x), weight, inner, ctx.parts, updates, True)
        assert to_gated is not None
        return native.gate_gradient(x, to_gated), None, None, None, *to_updates


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
        return self._apply_to(x, _Product)

    def gated(self, x: Tensor) -> Tensor:
        """(..., 2 in), gate and what is gated by its SiLU, to (..., out)."""
        return self._apply_to(x, _GatedProduct)

    def _apply_to(self, x: Tensor, function: type[torch.autograd.Function]) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        with torch.autocast(kind, enabled=False):
            out = function.apply(flat, self.weight, self.bias, self.parts, *self.down, *self.up)
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


@dataclass(frozen=True)
class Update:
    """What is added to the outputs `start` to `stop` of a layer: scale * up down x."""

    start: int
    stop: int
    scale: float
    down: Tensor  # (rank, in)
    up: Tensor  # (stop - start, rank)


Adapter = dict[str, list[Update]]  # a layer's name in the backbone, as blocks.0.qkv -> its updates


def updates_of(backbone: Transformer) -> Adapter:
    """The updates that a backbone was trained with."""
    updates: Adapter = {}
    for name, module in backbone.named_modules():
        if isinstance(module, LowRank):
            updates[name] = [
                Update(part.start, part.stop, part.scale, down.detach(), up.detach())
                for part, down, up in zip(module.parts, module.down, module.up, strict=True)
            ]
    return updates


class AdapterRows:
    """Which adapter each row of a batch is computed with, by its number; -1 is none. One object for all layers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.default = -1  # of what is computed where nothing was chosen
        self.current: list[tuple[int, Tensor]] = []  # adapter -> its rows of this pass
        self.chosen = False

    def choose(self, adapters: Sequence[int]) -> None:
        """The adapters of the next passes' rows."""
        self.chosen = True
        self.current = [
            (number, torch.tensor([row for row, one in enumerate(adapters) if one == number]))
            for number in sorted({*adapters} - {-1})
        ]

    @property
    def active(self) -> bool:
        """Whether any row of the next pass has an adapter."""
        return bool(self.current) if self.chosen else self.default >= 0


class AdaptedLinear(nn.Module):
    """A layer, of any kind and precision, with the updates of several adapters, each for its rows of a batch."""

    def __init__(self, base: nn.Module, rows: AdapterRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.updates: list[list[Update]] = []  # by adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in) to (B, ..., out)."""
        out: Tensor = self.base(x)
        rows = self.rows
        if not rows.active:
            return out
        out = out.contiguous()
        for number, places in rows.current if rows.chosen else [(rows.default, None)]:
            own = x if places is None else x[places]
            for update in self.updates[number]:
                added = update.scale * ((own @ update.down.to(x.dtype).t()) @ update.up.to(x.dtype).t())
                part = out[..., update.start : update.stop]
                if places is None:
                    part += added
                else:
                    part[places] += added
        return out


def attach_adapter(backbone: Transformer, name: str, adapter: Adapter) -> int:
    """Add an adapter beside those that a backbone has; returns its number."""
    if backbone.adapter_rows is None:
        backbone.adapter_rows = AdapterRows()
        for block in backbone.blocks:
            for layer in ADAPTED:
                setattr(block, layer, AdaptedLinear(getattr(block, layer), backbone.adapter_rows))
    for path, module in backbone.named_modules():
        if isinstance(module, AdaptedLinear):
            module.updates.append(adapter.get(path, []))
    backbone.adapter_rows.names.append(name)
    return len(backbone.adapter_rows.names) - 1


def merge_adapter(backbone: Transformer, adapter: Adapter) -> None:
    """Add an adapter's updates to the matrices of plain layers, in place."""
    for path, updates in adapter.items():
        weight = cast(nn.Linear, backbone.get_submodule(path)).weight.data
        for update in updates:
            weight[update.start : update.stop] += update.scale * (update.up.float() @ update.down.float())


def adapt(backbone: Transformer, rank: int, alpha: float) -> None:
    """Freeze a backbone and give the matrices of its blocks low-rank updates, which begin as zero. The numbers that
    they begin with come from torch's global generator."""
    backbone.requires_grad_(False)
    backbone.halves_saved = True
    for block in backbone.blocks:
        for name in ADAPTED:
            linear = cast(nn.Linear, getattr(block, name))
            setattr(block, name, LowRank(linear, parts_of(backbone.config, name, linear.out_features, rank, alpha)))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within, the updates count for nothing: what stands below them computes."""
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    parts = [layer.parts for layer in layers]
    for layer in layers:
        layer.parts = [replace(part, scale=0.0) for part in layer.parts]
    try:
        yield
    finally:
        for layer, own in zip(layers, parts, strict=True):
            layer.parts = own


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
