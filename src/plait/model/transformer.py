"""The backbone: one decoder-only transformer that covers GPT-2, Llama, Mistral, Phi-3, SmolLM3, Qwen2, Qwen3 and
Gemma 3 by configuration.

It maps embeddings to hidden states; the rows of the vocabulary, on both sides, belong to `multimodal`.
Shapes: B batch, L sequence length, D width, H heads, K key-value heads, E head width, T cached positions.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.kernels import training as native

if TYPE_CHECKING:
    from plait.model.lora import AdapterRows

LayerType = Literal["full", "sliding"]  # what a layer's queries see: all before them, or the last `sliding_window`


class TransformerConfig(BaseModel):
    """What fixes a backbone. The defaults are Qwen3's shape; other architectures differ in the switches below."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int  # inner width of the feed-forward layer
    max_length: int
    position: Literal["rotary", "learned"] = "rotary"
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    qk_norm: bool = True
    qkv_bias: bool = False
    bias: bool = False  # of the other projections
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, float | int | str | list[float]] | None = None  # of the frequencies, as config.json has it
    sliding_window: int | None = None  # positions that a query of a sliding layer sees, its own among them
    layer_types: list[LayerType] | None = None  # one a layer; None: all see everything
    local_rope_theta: float | None = None  # of sliding layers, unscaled, where theirs is another
    layers_without_rotary: list[int] = []
    post_norm: bool = False  # a norm after attention and feed-forward, too, before they are added
    embed_scale: float = 1.0  # what embeddings are multiplied by on their way in
    dropout: float = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> TransformerConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"head_width ({self.head_width}) must be even for rotary positions")
        if self.layer_types is not None and len(self.layer_types) != self.layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.layers} layers")
        if "sliding" in (self.layer_types or []) and not self.sliding_window:
            raise ValueError("sliding layers need a sliding_window")
        if any(not 0 <= layer < self.layers for layer in self.layers_without_rotary):
            raise ValueError(f"layers_without_rotary names a layer outside 0 .. {self.layers - 1}")
        return self

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies its inner values by a gate."""
        return self.activation in ("swiglu", "geglu_tanh")

    def layer_type(self, layer: int) -> LayerType:
        return "full" if self.layer_types is None else self.layer_types[layer]

    @property
    def rotary_scale(self) -> float:
        """What turned queries and keys are multiplied by, each: the attention factor of YaRN and LongRoPE."""
        factor = (self.rope_scaling or {}).get("attention_factor", 1.0)
        assert isinstance(factor, int | float)
        return float(factor)

    @property
    def trained_length(self) -> int | None:
        """Under LongRoPE, the length up to which a sequence is turned by the short factors; else None."""
        scaling = self.rope_scaling
        if scaling is None or scaling["rope_type"] != "longrope":
            return None
        return int(cast(float, scaling["original_max_position_embeddings"]))


def use_manual_backward(x: Tensor) -> bool:
    """Whether gradients written out below serve better than autograd's: not where a compiler fuses the plain form, or
    an export traces it."""
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.requires_grad and torch.is_grad_enabled() and not plain


class _Normalise(torch.autograd.Function):
    """x / rms(x) * weight in fewer passes over memory; the weight has one dimension, or two to end as x does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # products of one precision are the fastest
        size = torch.linalg.vector_norm(wide, 2, -1, True)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        both = grad * unit
        to_weight = both.sum(tuple(range(both.ndim - weight.ndim)))
        along = both.mul_(weight).sum(-1, True)
        to_x = (grad * weight).addcmul_(unit, along.div_(-x.shape[-1])).mul_(scale)
        return to_x.to(x.dtype), to_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean square taken in fp32 (Zhang and Sennrich, 2019); in the precision of autocast."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if use_manual_backward(x):
        return cast(Tensor, _Normalise.apply(x, weight, eps, dtype))
    wide = x.float() if x.dtype.itemsize < 4 else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(dtype) * weight.to(dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def add_and_norm(x: Tensor, more: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x, plus `more` where there is any, and the norm of that."""
    if isinstance(norm, RMSNorm) and native.supports(x):
        return native.norm(x, more, norm.weight, norm.eps)
    # In bf16 a layer norm's result would be rounded, which PyTorch's is not.
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None and native.activations(x) is torch.float32:
        return native.norm(x, more, norm.weight, norm.eps, norm.bias)
    x = x if more is None else x + more
    return x, norm(x)


def make_norm(config: TransformerConfig) -> nn.Module:
    """A norm over the last dimension (D), as the config says: root mean square or layer norm."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


def plain_frequencies(theta: float, width: int) -> Tensor:
    """Radians a position, (E / 2,), as Su et al. have them."""
    half = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / theta**half


def rotary_frequencies(config: TransformerConfig, long: bool = False) -> Tensor:
    """Radians a position, (E / 2,), scaled as the configuration asks: linear, llama3, yarn or longrope (of which `long`
    takes the long factors); dynamic scaling changes nothing up to the model's length, which is as far as ours goes."""
    frequency = plain_frequencies(config.rope_theta, config.head_width)
    if config.rope_scaling is None or config.rope_scaling["rope_type"] == "dynamic":
        return frequency
    if config.rope_scaling["rope_type"] == "longrope":
        return frequency / torch.tensor(config.rope_scaling["long_factor" if long else "short_factor"])
    scaling = {k: v for k, v in config.rope_scaling.items() if not isinstance(v, list)}
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequency / factor
    if scaling["rope_type"] == "yarn":
        return _yarn(config, frequency, factor, scaling)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    turns = trained * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / factor)


def _yarn(config: TransformerConfig, frequency: Tensor, factor: float, scaling: dict[str, float | int | str]) -> Tensor:
    """Frequencies that turn often within the trained length stay, rare ones are divided by the factor, those between
    are blended by their place (Peng, Quesnelle, Fan and Shippole, "YaRN", 2023)."""
    trained, last = float(scaling["original_max_position_embeddings"]), config.head_width - 1

    def place(turns: float) -> float:
        """Of the frequency that makes so many turns in the trained length."""
        return config.head_width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = place(float(scaling["beta_fast"])), place(float(scaling["beta_slow"]))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    ramp = (torch.arange(len(frequency)) - low) / (high - low if high != low else 0.001)
    blend = ramp.clamp(0, 1)
    return frequency * (1 - blend + blend / factor)


def rotary(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (B, L, 1, E) of positions (B, L), for `rotate`, which then scales as it turns.
    `frequencies` are (E / 2,), or of each row (B, 1, 1, E / 2)."""
    angle = positions[..., None, None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), turn, (back, on) = x.float().chunk(2, -1), cos.chunk(2, -1)[0], sin.chunk(2, -1)
    return torch.cat((a * turn + b * back, b * turn + a * on), -1).to(x.dtype)  # halves: compilers shuffle slowly


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_turn` in the precision of x, in fewer passes over memory."""
    (a, b), cos, sin = x.chunk(2, -1), cos.to(x.dtype).chunk(2, -1)[0], sin.to(x.dtype).chunk(2, -1)[1]
    turned = torch.empty_like(x)
    first, second = turned.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return turned


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn_halves(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, L, N, E), with what `rotary` gives (Su et al., 2021)."""
    return cast(Tensor, _Rotate.apply(x, cos, sin)) if use_manual_backward(x) else _turn(x, cos, sin)


def use_math_attention(device: torch.device, length: int, total: int) -> bool:
    """Whether attention of so many queries to so many keys is taken as plain products. On the CPU they beat the fused
    kernel in training at lengths of some hundred (`python bench/attention.py`), but not for one query over a few keys,
    where calls cost more than work."""
    return device.type == "cpu" and total <= 512 and not (length == 1 and total <= 64)


def additive_mask(mask: Tensor | None, length: int, total: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores: 0 where `mask` is True, or causally where it is None, else the least number."""
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)[None, None]
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, share: float = 0.0) -> Tensor:
    """Attention of q (B, H, L, E) over k and v (B, K, T, E); returns (B, H, L, E).

    `mask` is True where a query may look, (B or 1, 1, L, T), or what `hiding` makes of that; None means causal with
    L == T.
    """
    batch, heads, length, width = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    if not use_math_attention(q.device, length, total):
        causal = mask is None and length > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=share, is_causal=causal, enable_gqa=heads != kv_heads
        )
    if mask is None or mask.dtype == torch.bool:
        mask = additive_mask(mask, length, total, q.dtype, q.device)
    grouped = q.reshape(batch, kv_heads, -1, width) * width**-0.5
    scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, length, total) + mask
    weights = scores.softmax(-1)
    weights = dropout(weights, share, True)
    return (weights.view(batch, kv_heads, -1, total) @ v).view(batch, heads, length, width)


POOL = 2**22  # places in a pool of masks
_pools: dict[tuple[float, torch.dtype], Tensor] = {}


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """`F.dropout`. On the CPU drawing a mask costs more than what is masked, so it is cut out of a pool that was drawn
    once, at a place that is drawn for each call."""
    if not training or not share:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, share)
    key = share, x.dtype
    if key not in _pools:
        drawn = torch.rand(POOL, generator=torch.Generator().manual_seed(0)) >= share
        _pools[key] = drawn.to(x.dtype) / (1 - share)
    pool, count = _pools[key], x.numel()
    size = min(count, POOL // 4 * 3)
    starts = torch.randint(POOL - size + 1, (-(-count // size),)).tolist()
    pieces = [pool[start : start + size] for start in starts]
    mask = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[:count]
    return x * mask.view(x.shape)


class KVCache:
    """Keys and values of a fixed number of rows, preallocated; rows may differ in length and be reused.

    `lengths` (B,) counts the positions each row holds. A forward pass with a cache appends at each row's own end.
    """

    def __init__(
        self, config: TransformerConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, length, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.long = torch.zeros(rows, dtype=torch.bool, device=device)  # turned by LongRoPE's long factors

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        """Copy the first `length` positions of rows `source` to rows `target`, which must differ from all of them."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.lengths[target] = self.lengths[source]
        self.long[target] = self.long[source]


class View:
    """The rows of a cache that take part in one forward pass, with the places that the new positions get."""

    def __init__(
        self,
        cache: KVCache,
        rows: Tensor,
        count: Tensor,
        longest: int,
        held: int | None = None,
    ) -> None:
        """`rows` (B,) are indices into the cache; `count` (B,) is how many of the `longest` new positions each one
        really has. `held` is the greatest length of these rows where the caller knows it, which spares a wait for the
        device; 0 says that they are all empty."""
        device = cache.lengths.device
        self.cache = cache
        self.layer = 0  # whose keys and values come next
        self.rows = rows
        start = cache.lengths[rows]
        self.new_lengths = start + count
        held = int(start.max()) if held is None else held
        self.total = min(held + longest, cache.capacity)
        self.fresh = held == 0
        self.positions = start[:, None] + torch.arange(longest, device=device)  # (B, L)
        self.mask: Tensor | None = None  # rows that hold nothing yet see what they bring, as in training
        if not self.fresh:
            # A row's padding is written beyond its length, where the next step overwrites it.
            self.positions.clamp_(max=cache.capacity - 1)
            seen = torch.arange(self.total, device=device)
            self.mask = (seen <= self.positions[..., None])[:, None]  # (B, 1, L, total)

    def long_rows(self, trained: int) -> Tensor:
        """(B,), which rows LongRoPE turns by its long factors: those whose first input was longer than `trained`. Their
        keys are kept turned, so that a row stays what it began as."""
        begun = self.cache.lengths[self.rows] > 0
        self.cache.long[self.rows] = torch.where(begun, self.cache.long[self.rows], self.new_lengths > trained)
        return self.cache.long[self.rows]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, L, E); return all of these rows so far, (B, K, total, E)."""
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        at = (self.rows[:, None], slice(None), self.positions)
        keys[at] = k.transpose(1, 2).to(keys.dtype)
        values[at] = v.transpose(1, 2).to(values.dtype)
        if self.fresh:
            return k, v
        return keys[self.rows, :, : self.total].to(k.dtype), values[self.rows, :, : self.total].to(v.dtype)

    def finish(self) -> None:
        self.cache.lengths[self.rows] = self.new_lengths


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each normed once more where `post_norm` asks, and added to its input; the
    projections of a part are one product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # activations in the backward pass, instead of keeping them
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_width
        self.attention_norm = make_norm(config)
        self.qkv = nn.Linear(config.width, (heads + 2 * kv_heads) * width, bias=config.qkv_bias)
        self.attention_out = nn.Linear(heads * width, config.width, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width, config.norm_eps), RMSNorm(width, config.norm_eps)
        self.feed_norm = make_norm(config)
        if config.post_norm:
            self.attention_post_norm, self.feed_post_norm = make_norm(config), make_norm(config)
        inner = config.hidden * (2 if config.gated else 1)
        self.feed_in = nn.Linear(config.width, inner, bias=config.bias)
        self.feed_out = nn.Linear(config.hidden, config.width, bias=config.bias)

    def attention(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        view: View | None,
    ) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        heads, kv_heads = config.heads, config.kv_heads
        qkv = native.linear_of(self.qkv, x).view(batch, length, -1, config.head_width)
        share = config.dropout if self.training else 0.0
        if view is None and mask is None and native.supports_attention(qkv, config.head_width):
            norms = (self.q_norm.weight, self.k_norm.weight) if config.qk_norm else None
            mixed = native.attention(qkv, norms, rotary, heads, config.norm_eps, share)
            return native.linear_of(self.attention_out, mixed.view(batch, length, -1))
        qk, v = qkv.split((heads + kv_heads, kv_heads), 2)
        if config.qk_norm:
            weight = torch.cat((self.q_norm.weight.expand(heads, -1), self.k_norm.weight.expand(kv_heads, -1)))
            qk = rms_norm(qk, weight, config.norm_eps)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.transpose(1, 2).split((heads, kv_heads), 1)
        v = v.transpose(1, 2)
        if view is not None:
            k, v = view.append(k, v)
        mixed = attend(q, k, v, mask, share)
        return native.linear_of(self.attention_out, mixed.transpose(1, 2).reshape(batch, length, -1))

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = native.linear_of(self.feed_in, x)
        if self.config.activation == "swiglu":
            gated = getattr(self.feed_out, "gated", None)  # of low-rank updates, which keep less for the backward pass
            if native.supports(inner) and gated is not None:
                return cast(Tensor, gated(inner))
            if native.supports(inner):
                inner = native.gate(inner)
            else:
                gate, up = inner.chunk(2, -1)
                inner = F.silu(gate) * up
        elif self.config.activation == "geglu_tanh":
            gate, up = inner.chunk(2, -1)
            inner = F.gelu(gate, approximate="tanh") * up
        elif native.supports(inner):
            inner = native.gelu(inner, self.config.activation == "gelu_tanh")
        else:
            inner = F.gelu(inner, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")
        return native.linear_of(self.feed_out, inner)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        view: View | None = None,
    ) -> Tensor:
        if self.activation_checkpointing and view is None and torch.is_grad_enabled():
            return checkpoint(self._forward, x, rotary, mask, None, use_reentrant=False)
        return self._forward(x, rotary, mask, view)

    def _forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None, view: View | None
    ) -> Tensor:
        share = self.config.dropout
        x, normed = add_and_norm(x, None, self.attention_norm)
        mixed = self.attention(normed, rotary, mask, view)
        if self.config.post_norm:
            mixed = self.attention_post_norm(mixed)
        x, normed = add_and_norm(x, dropout(mixed, share, self.training), self.feed_norm)
        mixed = self.feed_forward(normed)
        if self.config.post_norm:
            mixed = self.feed_post_norm(mixed)
        mixed = dropout(mixed, share, self.training)
        return native.add(x, mixed) if native.supports(x) else x + mixed


class Transformer(nn.Module):
    """Embeddings (B, L, D) to hidden states (B, L, D) after the final norm."""

    frequencies: Tensor  # radians a position, where positions are rotary
    long_frequencies: Tensor  # those of LongRoPE beyond the trained length
    local_frequencies: Tensor  # those of sliding layers

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter_rows: AdapterRows | None = None  # which rows are computed with which adapter, where there are any
        self.halves_saved = False  # what the backward pass reads is kept in bf16: of low-rank updates, for memory
        if config.position == "learned":
            self.positions = nn.Parameter(torch.randn(config.max_length, config.width) * 0.02)
        else:
            self.set_frequencies()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "feed_out.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
            elif name.endswith(("qkv.weight", "feed_in.weight")):
                nn.init.normal_(parameter, std=min(0.02 * math.sqrt(768 / config.width), config.width**-0.5))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def set_frequencies(self) -> None:
        """Compute what rotary positions turn by; it follows from the configuration and is no weight."""
        config = self.config
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        if config.trained_length is not None:
            self.register_buffer("long_frequencies", rotary_frequencies(config, long=True), persistent=False)
        if config.local_rope_theta is not None:
            local = plain_frequencies(config.local_rope_theta, config.head_width)
            self.register_buffer("local_frequencies", local, persistent=False)

    def _turns(self, positions: Tensor, view: View | None) -> dict[LayerType, tuple[Tensor, Tensor]]:
        """Cosines and sines for positions (B, L), by the type of layer."""
        config, frequencies = self.config, self.frequencies
        if config.trained_length is not None:
            if view is not None:
                long = view.long_rows(config.trained_length)
            else:
                long = positions.amax(-1) >= config.trained_length
            frequencies = torch.where(long[:, None, None, None], self.long_frequencies, frequencies)
        full = rotary(positions, frequencies, config.rotary_scale)
        if config.local_rope_theta is None:
            return {"full": full, "sliding": full}
        return {"full": full, "sliding": rotary(positions, self.local_frequencies)}

    def _masks(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, view: View | None
    ) -> dict[LayerType, Tensor | None]:
        """What queries may see, by the type of layer; None is causal. A window that is longer than the input hides
        nothing."""
        config, length = self.config, x.shape[1]
        total = length if view is None else view.total
        masks: dict[LayerType, Tensor | None] = {"full": mask, "sliding": mask}
        if config.layer_types is not None and config.sliding_window is not None and total > config.sliding_window:
            if view is None or view.fresh:
                keys = positions
            else:
                keys = torch.arange(total, device=x.device)[None]
            near = (keys[:, None] > positions[..., None] - config.sliding_window)[:, None]  # (B, 1, L, T)
            if mask is None:
                mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril()[None, None]
            masks["sliding"] = near & mask
        for kind in {config.layer_type(layer) for layer in range(config.layers)}:
            seen = masks[kind]
            own = view is None and seen is None and native.supports_attention(x, config.head_width)
            if not own and use_math_attention(x.device, length, total):  # once for all blocks
                device = x.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
                masks[kind] = additive_mask(seen, length, total, dtype, x.device)
        return masks

    def compile_blocks(self) -> None:
        """Compile what blocks do, once for all of them and for all lengths, at their first use. Weights and their
        names stay as they are."""
        for block in self.blocks:
            block.compile(dynamic=True)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether the backward pass computes a block's activations again, instead of keeping them: less memory for
        a third more work."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.activation_checkpointing = on

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        view: View | None = None,
    ) -> Tensor:
        """`positions` (B, L) default to 0 .. L - 1, `mask` to causal; a `view` into a cache brings its own of both."""
        if view is not None:
            positions, mask = view.positions, view.mask
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        config = self.config
        turns: dict[LayerType, tuple[Tensor, Tensor]] = {}
        if config.embed_scale != 1.0:
            x = x * config.embed_scale
        if config.position == "learned":
            x = x + self.positions[positions.clamp(max=config.max_length - 1)]
        else:
            turns = self._turns(positions, view)
        x = dropout(x, config.dropout, self.training)
        masks = self._masks(x, positions, mask, view)
        with halved_activations(*x.shape) if self.halves_saved and torch.is_grad_enabled() else nullcontext():
            for layer, block in enumerate(self.blocks):
                if view is not None:
                    view.layer = layer
                kind = config.layer_type(layer)
                turn = None if layer in config.layers_without_rotary else turns.get(kind)
                x = block(x, turn, masks[kind], view)
        if view is not None:
            view.finish()
        return add_and_norm(x, None, self.final_norm)[1]


def halved_activations(batch: int, length: int, width: int) -> AbstractContextManager[None]:
    """Within, what autograd keeps of activations (B, L, ...) or (B * L, ...) that are as large as the hidden states is
    kept in bf16. Only gradients are rounded by it; what is small, as the logarithms of attention, is kept whole."""

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor]:
        own = tensor.shape[:2] == (batch, length) or tensor.shape[:1] == (batch * length,)
        large = tensor.dtype is torch.float32 and tensor.numel() >= max(batch * length * width, 2**16)
        return (tensor.bfloat16(),) if own and large and not tensor.is_leaf else tensor

    def unpack(kept: Tensor | tuple[Tensor]) -> Tensor:
        return kept[0].float() if isinstance(kept, tuple) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
