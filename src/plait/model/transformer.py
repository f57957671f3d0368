"""The backbone: one decoder-only transformer that covers GPT-2, Llama, Mistral, Phi-3, SmolLM3, Qwen2, Qwen3 and
Gemma 3 by configuration.

It maps embeddings to hidden states; the rows of the vocabulary, on both sides, belong to `multimodal`.
Shapes: B batch, L sequence length, D width, H heads, K key-value heads, E head width, T cached positions.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.kernels import training as native
from plait.model.layers import (
    RMSNorm,
    add_and_norm,
    additive_mask,
    attend,
    dropout,
    plain_frequencies,
    rms_norm,
    rotary,
    rotate,
    use_math_attention,
)

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
        """What the queries of a layer see."""
        return "full" if self.layer_types is None else self.layer_types[layer]

    @property
    def rotary_scale(self) -> float:
        """What rotated queries and keys are multiplied by, each: the attention factor of YaRN and LongRoPE."""
        factor = (self.rope_scaling or {}).get("attention_factor", 1.0)
        assert isinstance(factor, int | float)
        return float(factor)

    @property
    def trained_length(self) -> int | None:
        """Under LongRoPE, the length up to which a sequence is rotated by the short factors; else None."""
        scaling = self.rope_scaling
        if scaling is None or scaling["rope_type"] != "longrope":
            return None
        return int(cast(float, scaling["original_max_position_embeddings"]))


def make_norm(config: TransformerConfig) -> nn.Module:
    """A norm over the last dimension (D), as the config says: root mean square or layer norm."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


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
    rotations = trained * frequency / (2 * math.pi)
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / factor)


def _yarn(config: TransformerConfig, frequency: Tensor, factor: float, scaling: dict[str, float | int | str]) -> Tensor:
    """Frequencies that rotate often within the trained length stay, rare ones are divided by the factor, those between
    are blended by their place (Peng, Quesnelle, Fan and Shippole, "YaRN", 2023)."""
    trained, last = float(scaling["original_max_position_embeddings"]), config.head_width - 1

    def place(rotations: float) -> float:
        """Of the frequency that makes so many rotations in the trained length."""
        return config.head_width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = place(float(scaling["beta_fast"])), place(float(scaling["beta_slow"]))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    ramp = (torch.arange(len(frequency)) - low) / (high - low if high != low else 0.001)
    blend = ramp.clamp(0, 1)
    return frequency * (1 - blend + blend / factor)


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
        self.long = torch.zeros(rows, dtype=torch.bool, device=device)  # rotated by LongRoPE's long factors

    @property
    def capacity(self) -> int:
        """Positions that it has room for."""
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
        """(B,), which rows LongRoPE rotates by its long factors: those whose first input was longer than `trained`.
        Their
        keys are kept rotated, so that a row stays what it began as."""
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
    """Attention, then a feed-forward network, each added to its input.

        x ─────────────────────┐       x ─────────────────────┐
        attention_norm         │       feed_norm              │
        qkv, norms of q and k  │       feed_in, activation    │
        rotary, attend         │       (gate)                 │
        attention_out          │       feed_out               │
        attention_post_norm    │       feed_post_norm         │
        + ─────────────────────┘       + ─────────────────────┘

    The norms after a part are there where `post_norm` asks. The projections of a part are one product.
    """

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
        """The attention of normed inputs, before it is added to them.

        Args:
            x: (B, L, D).
            rotary: Cosines and sines of the positions, as `layers.rotary` gives them; None for none.
            mask: Which positions (B, 1, L, T) or (L, T) a query sees; None for all before it.
            view: The part of the cache that keys and values go into and come from; None without a cache.

        Returns:
            (B, L, D).
        """
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
        """The feed-forward network of normed inputs (B, L, D), before it is added to them."""
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
            self.positions = nn.Parameter(torch.randn(config.max_length, config.width).mul_(0.02))
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
        """Compute the frequencies of rotary positions; they follow from the configuration and are no weights."""
        config = self.config
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        if config.trained_length is not None:
            self.register_buffer("long_frequencies", rotary_frequencies(config, long=True), persistent=False)
        if config.local_rope_theta is not None:
            local = plain_frequencies(config.local_rope_theta, config.head_width)
            self.register_buffer("local_frequencies", local, persistent=False)

    def _rotations(self, positions: Tensor, view: View | None) -> dict[LayerType, tuple[Tensor, Tensor]]:
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
        rotations: dict[LayerType, tuple[Tensor, Tensor]] = {}
        if config.embed_scale != 1.0:
            x = x * config.embed_scale
        if config.position == "learned":
            x = x + self.positions[positions.clamp(max=config.max_length - 1)]
        else:
            rotations = self._rotations(positions, view)
        x = dropout(x, config.dropout, self.training)
        masks = self._masks(x, positions, mask, view)
        with halved_activations(*x.shape) if self.halves_saved and torch.is_grad_enabled() else nullcontext():
            for layer, block in enumerate(self.blocks):
                if view is not None:
                    view.layer = layer
                kind = config.layer_type(layer)
                rotation = None if layer in config.layers_without_rotary else rotations.get(kind)
                x = block(x, rotation, masks[kind], view)
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
