"""A backbone laid out for writing: weights cast once, packed where the processor has a layout of its own for them,
and one position a row written out with as few calls as it takes.

Shapes: B rows, D width, H heads, K key-value heads, E head width, T cached positions.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core.device import Device, exact_products, matmul_precision
from plait.inference.sampling import LOWEST
from plait.kernels import generation as native
from plait.kernels.choice import KERNEL, PYTORCH, choose, question
from plait.kernels.linear import PackedLinear
from plait.kernels.quantisation import DTYPES
from plait.model.layers import RMSNorm
from plait.model.transformer import Block, KVCache, LayerType, Transformer, View, rotary_frequencies

ROWS = (1, 8, 32)  # at which a step is timed
PROBED = 2  # layers that are timed
LARGE = 2**28  # bytes of weights above which they are held once


class Packed(nn.Module):
    """A linear layer (..., in) to (..., out) whose weight lies as oneDNN wants it, where torch can lay it out so.

    Unpacked, oneDNN lays the weight out anew at each call: for a few rows that takes as long as the product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = bias
        self.weight = weight
        self.packed = False
        operations = torch.ops.mkldnn
        # These are the calls that torch.compile makes when it freezes weights; they have no public name.
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and weight.shape[0] > 1:
            with contextlib.suppress(AttributeError, RuntimeError), torch.inference_mode():
                packed = operations._reorder_linear_weight(weight.contiguous(), None)
                operations._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, bias, "none", [], "")
                self.weight, self.packed = packed, True

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)


Norm = tuple[Tensor, Tensor | None]  # weight and bias; an RMS norm has no bias


def nearest(rows: int) -> int:
    """The entry of ROWS whose measurement holds for so many rows."""
    return min(ROWS, key=lambda entry: abs(math.log(max(rows, 1) / entry)))


def copied(module: nn.Module, make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype, place: torch.device) -> Any:
    """A frozen copy of a module, with what `make` makes of each linear layer, and all other weights in `dtype`. Layers
    that are packed are shared: they hold their weight once."""
    if isinstance(module, PackedLinear):
        return module
    if isinstance(module, nn.Linear):
        return make(module)
    twin = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):  # of parameters, modules, hooks
            twin.__dict__[name] = value.copy()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = parameter.detach().to(place, dtype, copy=True)
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else buffer.to(place)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else copied(child, make, dtype, place)
    twin.training = False
    return twin


@dataclass(frozen=True)
class Ways:
    """What computes the steps of so many rows, and prompts: KERNEL or PYTORCH each."""

    steps: dict[int, str]
    prompt: str

    @classmethod
    def all(cls, way: str) -> Ways:
        return cls(dict.fromkeys(ROWS, way), way)

    @property
    def used(self) -> set[str]:
        return {*self.steps.values(), self.prompt}


def _probe(decoder: Decoder, rows: int) -> Callable[[], object]:
    """A step of so many rows that hold some positions, to be timed."""
    held = min(64, decoder.config.max_length - 1)
    cache = decoder.cache(rows, held + 1)
    x = torch.zeros(rows, decoder.config.width, dtype=decoder.device.dtype)

    def step() -> object:
        with torch.inference_mode():
            cache.lengths.fill_(held)
            return decoder.step(x, cache, np.full(rows, held))

    return step


def _probe_prompt(decoder: Decoder) -> Callable[[], object]:
    """A prompt of some length, to be timed."""
    x = torch.zeros(1, min(128, decoder.config.max_length), decoder.config.width, dtype=decoder.device.dtype)

    def read() -> object:
        with torch.inference_mode():
            return decoder(x)

    return read


class Decoder:
    """A frozen copy of a backbone. Call it for whole inputs; `step` reads one position in each row of a cache."""

    def __init__(self, backbone: Transformer, device: Device, ways: Ways | None = None) -> None:
        """A backbone whose layers are packed already keeps them; else they are laid out for what computes them the
        fastest: that is measured where `ways` does not say it."""
        config, place = backbone.config, device.torch
        self.config, self.device = config, device
        self.library = native.library() if place.type == "cpu" else None
        packed = any(isinstance(module, PackedLinear) for module in backbone.modules())
        if self.library is None:
            ways = Ways.all(PYTORCH)
        elif packed or device.storage not in ("fp32", "bf16") or DTYPES[device.storage] is not device.dtype:
            ways = Ways.all(KERNEL)  # PyTorch has no such weights
        elif not native.supports(config):
            ways = Ways.all(PYTORCH)
        self.ways = ways or self._measured(backbone)
        networks: dict[str, Transformer] = {}
        for way in self.ways.used:
            networks[way] = copied(backbone, self._packed if way == KERNEL else self._plain, device.dtype, place)
        self.native: native.NativeStep | None = None
        if self.library is not None and KERNEL in self.ways.steps.values() and native.supports(config):
            frequencies = rotary_frequencies(config) if config.position == "rotary" else None
            self.native = native.NativeStep(self.library, networks[KERNEL], device.dtype, frequencies)
        # In PyTorch on a processor, bf16 products of one query with its keys take longer than those in fp32.
        self.cache_dtype = torch.float32 if place.type == "cpu" and self.native is None else device.dtype
        self.whole = networks[self.ways.prompt]
        plain = networks.get(PYTORCH, self.whole)
        self.blocks: list[Block] = list(plain.blocks)  # type: ignore[arg-type]
        # `step` computes x / |x| * weight; `floor` is what epsilon becomes in it.
        self.norms = [(self._norm(block.attention_norm), self._norm(block.feed_norm)) for block in self.blocks]
        self.post_norms: list[tuple[Norm, Norm]] = []
        if config.post_norm:
            self.post_norms = [(self._norm(b.attention_post_norm), self._norm(b.feed_post_norm)) for b in self.blocks]
        self.final_norm = self._norm(plain.final_norm)
        self.floor, self.qk_floor = (
            torch.tensor(math.sqrt(config.norm_eps * width), device=place)
            for width in (config.width, config.head_width)
        )
        self.qk_norms: list[Tensor] = []
        if config.qk_norm:
            heads = [(b.q_norm.weight.expand(config.heads, -1), b.k_norm.weight) for b in self.blocks]
            self.qk_norms = [
                torch.cat((q, k.expand(config.kv_heads, -1))).float() * math.sqrt(config.head_width) for q, k in heads
            ]
        # Queries are scaled as they are rotated: (H + K, 1 or 2, 1), the halves of a head being the middle dimension.
        scale = torch.ones(config.heads + config.kv_heads, 1, 1, device=place)
        scale[: config.heads] = config.head_width**-0.5
        self.cos_scale, self.sin_scale = scale, scale * torch.tensor([[-1.0], [1.0]], device=place)

    def _packed(self, layer: nn.Linear) -> nn.Module:
        return PackedLinear(layer.weight, layer.bias, self.device.storage)

    def _plain(self, layer: nn.Linear) -> nn.Module:
        place, dtype = self.device.torch, self.device.dtype
        weight = layer.weight.detach().to(place, dtype, copy=True)
        if self.device.storage not in ("fp32", "bf16"):  # without a kernel: numbers that PyTorch widens at each call
            return PackedLinear(layer.weight, layer.bias, self.device.storage)
        return Packed(weight, None if layer.bias is None else layer.bias.detach().to(place, dtype, copy=True))

    def _measured(self, backbone: Transformer) -> Ways:
        """What is faster at each number of rows, and for a prompt, on two layers of this shape. In bf16 kernel and
        PyTorch keep different caches, and a large model's weights are held once: then one of them serves all."""
        config = backbone.config.model_copy(update={"layers": min(backbone.config.layers, PROBED)})
        shape = f"width {config.width}, hidden {config.hidden}, heads {config.heads}/{config.kv_heads}"
        what = f"generation, {config.norm}, {config.activation}, {shape}, {self.device.storage}"

        def calls() -> dict[str, dict[str, Callable[[], object]]]:
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                network = Transformer(config).eval()
                both = {way: Decoder(network, self.device, Ways.all(way)) for way in (KERNEL, PYTORCH)}
            shapes: dict[str, dict[str, Callable[[], object]]] = {
                f"batch {rows}": {way: _probe(decoder, rows) for way, decoder in both.items()} for rows in ROWS
            }
            shapes["prompt"] = {way: _probe_prompt(decoder) for way, decoder in both.items()}
            return shapes

        with matmul_precision(self.device):
            choice = choose(question(what, native.file_name()), calls)
        ways = Ways({rows: choice.way(f"batch {rows}") for rows in ROWS}, choice.way("prompt"))
        steps = math.prod(choice.ratio(f"batch {rows}") for rows in ROWS)
        large = sum(p.numel() for p in backbone.parameters()) * self.device.dtype.itemsize > LARGE
        if large:
            return Ways.all(KERNEL if steps >= 1 else PYTORCH)
        if len(set(ways.steps.values())) > 1 and self.device.dtype is not torch.float32:
            return replace(ways, steps=dict.fromkeys(ROWS, KERNEL if steps >= 1 else PYTORCH))
        return ways

    def __call__(
        self, x: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None, view: View | None = None
    ) -> Tensor:
        """As `Transformer.forward`: embeddings (B, L, D) to hidden states (B, L, D), in the device's precision."""
        with torch.autocast(self.device.torch.type, enabled=False):
            hidden: Tensor = self.whole(x.to(self.device.dtype), positions=positions, mask=mask, view=view)
        return hidden

    def cache(self, rows: int, length: int) -> KVCache:
        """An empty cache, in the precision that `step` reads fastest."""
        return KVCache(self.config, rows, length, self.device.torch, self.cache_dtype)

    def linear(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The product of a few rows (B, in) with a weight (out, in), laid out as the step's own are."""
        if KERNEL in self.ways.used:
            return PackedLinear(weight, None, self.device.storage)
        return Packed(weight.to(self.device.dtype))

    def _norm(self, module: nn.Module) -> Norm:
        """The weight and bias that `_normalise` takes; an RMS norm has no bias."""
        if isinstance(module, RMSNorm):
            return module.weight.float() * math.sqrt(self.config.width), None
        assert isinstance(module, nn.LayerNorm)
        return module.weight.float(), module.bias.float()

    def _normalise(self, x: Tensor, norm: Norm) -> Tensor:
        weight, bias = norm
        if bias is not None:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.norm_eps).to(self.device.dtype)
        x = x.float()
        return x.div(torch.linalg.vector_norm(x, 2, -1, True).hypot_(self.floor)).mul_(weight).to(self.device.dtype)

    def step(self, x: Tensor, cache: KVCache, lengths: np.ndarray) -> Tensor:
        """Hidden states (B, D) of one more position in each of the cache's first B rows, which hold `lengths` (B,)
        and get longer by one; x (B, D) embeds what stands there."""
        adapted = self.whole.adapter_rows is not None and self.whole.adapter_rows.active
        if self.native is not None and not adapted and self.ways.steps[nearest(len(x))] == KERNEL:
            return self.native(x, cache, lengths)
        with exact_products(self.device.torch):
            return self._step(x, cache, int(lengths.max()) + 1, bool((lengths == lengths[0]).all()))

    def _rotations(self, at: Tensor, long: Tensor) -> dict[LayerType, tuple[Tensor, Tensor]]:
        """What positions `at` (B,) multiply the halves of a head and its swapped halves by, by the type of layer:
        (B, H + K, 1 or 2, E / 2) each. `long` (B,) are rows that LongRoPE's long factors rotate."""
        config, frequencies = self.config, self.whole.frequencies
        if config.trained_length is not None:
            frequencies = torch.where(long[:, None], self.whole.long_frequencies, frequencies)

        def cos_sin(frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            angle = (at[:, None] * frequencies)[:, None, None]
            return angle.cos() * (self.cos_scale * scale), angle.sin() * (self.sin_scale * scale)

        full = cos_sin(frequencies, config.rotary_scale)
        if config.local_rope_theta is None:
            return {"full": full, "sliding": full}
        return {"full": full, "sliding": cos_sin(self.whole.local_frequencies, 1.0)}

    def _hidden_keys(self, at: Tensor, total: int, even: bool) -> dict[LayerType, Tensor | None]:
        """What is added to the scores of `total` keys, by the type of layer; None where all of them are seen."""
        window = self.config.sliding_window or total
        keys = torch.arange(total, device=at.device)
        beyond = keys > at[:, None, None, None]
        hidden: dict[LayerType, Tensor | None] = {}
        for kind, mask, bites in (
            ("full", beyond, not even),
            ("sliding", beyond | (keys <= at[:, None, None, None] - window), not even or total > window),
        ):
            zeros = torch.zeros(mask.shape, device=at.device, dtype=self.cache_dtype)
            hidden[cast(LayerType, kind)] = zeros.masked_fill_(mask, LOWEST) if bites else None
        return hidden

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, additive_mask: Tensor | None) -> Tensor:
        """One scaled query q (B, K, H / K, E) of each row over keys and values (B, K, T, E); (B, K, H / K, E)."""
        if q.device.type == "cpu":
            scores = q @ k.transpose(-1, -2)
            return (scores if additive_mask is None else scores.add_(additive_mask)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=additive_mask, scale=1.0)

    def _step(self, x: Tensor, cache: KVCache, total: int, even: bool) -> Tensor:
        config, rows = self.config, len(x)
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_width
        at = cache.lengths[:rows]
        slots = (torch.arange(rows * kv_heads, device=x.device).view(rows, -1) * cache.capacity + at[:, None]).flatten()
        additive_masks = self._hidden_keys(at, total, even)
        rotations: dict[LayerType, tuple[Tensor, Tensor]] = {}
        x = x.to(torch.float32, copy=True).mul_(config.embed_scale)  # the residual stream
        if config.position == "rotary":
            rotations = self._rotations(at, cache.long[:rows])
        else:
            x += self.whole.positions[at.clamp(max=config.max_length - 1)]
        for layer, (block, (norm, feed_norm)) in enumerate(zip(self.blocks, self.norms, strict=True)):
            kind = config.layer_type(layer)
            qkv = block.qkv(self._normalise(x, norm)).view(rows, -1, width).float()
            qk = qkv[:, : heads + kv_heads]
            if config.qk_norm:
                qk = qk.div(torch.linalg.vector_norm(qk, 2, -1, True).hypot_(self.qk_floor)).mul_(self.qk_norms[layer])
            if rotations and layer not in config.layers_without_rotary:
                cos, sin = rotations[kind]
                halves = qk.reshape(rows, -1, 2, width // 2)
                qk = torch.addcmul(halves * cos, halves.flip(2), sin).view(rows, -1, width)
            else:
                qk = qk * self.cos_scale[:, 0]
            qk = qk.to(self.cache_dtype)
            keys, values = cache.keys[layer], cache.values[layer]
            keys.view(-1, width).index_copy_(0, slots, qk[:, heads:].reshape(-1, width))
            values.view(-1, width).index_copy_(0, slots, qkv[:, heads + kv_heads :].reshape(-1, width).to(values.dtype))
            q = qk[:, :heads].reshape(rows, kv_heads, -1, width)
            mixed = self._attend(q, keys[:rows, :, :total], values[:rows, :, :total], additive_masks[kind])
            mixed = block.attention_out(mixed.reshape(rows, -1).to(self.device.dtype))
            x += self._normalise(mixed, self.post_norms[layer][0]) if self.post_norms else mixed
            mixed = block.feed_forward(self._normalise(x, feed_norm))
            x += self._normalise(mixed, self.post_norms[layer][1]) if self.post_norms else mixed
        cache.lengths[:rows] += 1
        return self._normalise(x, self.final_norm)
