"""The step of `decoder.py` on a processor as one call of compiled C++ (`kernels/generation.cpp`). PyTorch's own step
stays the reference, and is what runs where there is no kernel or where it is faster.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from plait.core import isa
from plait.core.device import Device
from plait.kernels import build
from plait.kernels import linear as packed
from plait.kernels.linear import LinearStruct, PackedLinear

if TYPE_CHECKING:
    from plait.model.transformer import Block, KVCache, Transformer, TransformerConfig

ACTIVATIONS = {"swiglu": 0, "gelu": 1, "gelu_tanh": 2}
# Fields of a TransformerConfig that the compiled step computes at any value (of the last three see `supports`). A
# switch that is not named here, such as one that was just added, must be at its default.
COMPUTED = frozenset(
    {
        "width", "layers", "heads", "kv_heads", "head_width", "hidden", "max_length", "position", "norm", "qk_norm",
        "qkv_bias", "bias", "norm_eps", "rope_theta", "rope_scaling", "dropout", "activation", "sliding_window",
        "layer_types",
    }
)  # fmt: skip


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        ("attention_norm", _Norm), ("feed_norm", _Norm), ("qkv", LinearStruct), ("attention_out", LinearStruct),
        ("feed_in", LinearStruct), ("feed_out", LinearStruct), ("q_norm", c_void_p), ("k_norm", c_void_p),
    ]  # fmt: skip


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "width", "heads", "kv_heads", "head_width", "hidden", "max_length")),
        ("activation", c_int64), ("half", c_int64), ("eps", c_float), ("cos_sin", c_void_p), ("positions", c_void_p),
        ("layer", POINTER(_Layer)), ("final_norm", _Norm),
    ]  # fmt: skip


@functools.cache
def library(level: isa.Level | None = None) -> ctypes.CDLL | None:
    """The compiled step, None where it cannot be had; for the best instructions allowed, or those given."""
    compiled = packed.library(level)
    if compiled is None:
        return None
    compiled.plait_scratch.argtypes = [POINTER(_Model), c_int64, c_int64, c_int64]
    compiled.plait_scratch.restype = c_int64
    compiled.plait_step.argtypes = [POINTER(_Model), *[c_void_p] * 5, *[c_int64] * 3, c_void_p, c_int64]
    return compiled


def supports(config: TransformerConfig) -> bool:
    """Whether the compiled step computes a backbone of this shape. It refuses sliding windows shorter than the longest
    sequence, GeGLU, LongRoPE, and every switch that it does not know."""
    for name, field in type(config).model_fields.items():
        if name not in COMPUTED and getattr(config, name) != field.get_default():
            return False
    windows = "sliding" in (config.layer_types or []) and (config.sliding_window or 0) < config.max_length
    return config.activation in ACTIVATIONS and not windows and config.trained_length is None


def file_name() -> str:
    """The name of the compiled file, which changes with its source and its instructions."""
    return build.kernel("generation").name


def backend_name(device: Device) -> str:
    """What computes a step of generation on this device, in words."""
    if device.kind != "cpu":
        return "PyTorch"
    compiled = library()
    if compiled is None:
        return build.not_native("generation")
    return build.described("generation", compiled.plait_products() if device.dtype is torch.bfloat16 else 0)


class NativeStep:
    """One more position of each row in one call, with the weights that a backbone's packed layers hold."""

    def __init__(
        self, native: ctypes.CDLL, backbone: Transformer, dtype: torch.dtype, frequencies: Tensor | None
    ) -> None:
        """`backbone` has a `PackedLinear` in place of each linear layer; `dtype` is that of the cache; `frequencies`,
        (E / 2,) radians a position, are those of rotary positions, None where positions are learned."""
        config = backbone.config
        self.native, self.dtype, self.width = native, dtype, config.width
        self.kept: list[Tensor | nn.Module] = []  # what the pointers point to
        self.size = 0
        self.layers = (_Layer * config.layers)(*(self._layer(cast("Block", block)) for block in backbone.blocks))
        cos_sin = positions = None
        if frequencies is not None:
            angle = torch.arange(config.max_length)[:, None] * frequencies
            cos_sin = self._keep(torch.cat((angle.cos(), angle.sin()), -1) * config.rotary_scale)
        else:
            positions = self._keep(backbone.positions)
        self.model = _Model(
            config.layers, config.width, config.heads, config.kv_heads, config.head_width, config.hidden,
            config.max_length, ACTIVATIONS[config.activation], dtype is torch.bfloat16, config.norm_eps, cos_sin,
            positions, self.layers, self._norm(backbone.final_norm),
        )  # fmt: skip
        self.scratch: dict[tuple[int, int, int], Tensor] = {}

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, module: nn.Module) -> _Norm:
        bias = getattr(module, "bias", None)
        assert isinstance(module.weight, Tensor)
        return _Norm(self._keep(module.weight), None if bias is None else self._keep(bias))

    def _linear(self, module: nn.Module) -> LinearStruct:
        module = getattr(module, "base", module)  # of a layer with adapters, which this step does without
        assert isinstance(module, PackedLinear)
        self.kept.append(module)
        self.size += module.in_features * module.out_features
        return module.struct

    def _layer(self, block: Block) -> _Layer:
        norms = [self._norm(block.attention_norm), self._norm(block.feed_norm)]
        products = [self._linear(p) for p in (block.qkv, block.attention_out, block.feed_in, block.feed_out)]
        heads: list[int | None] = [None, None]
        if block.config.qk_norm:
            heads = [self._keep(norm.weight) for norm in (block.q_norm, block.k_norm)]
        return _Layer(*norms, *products, *heads)

    def __call__(self, x: Tensor, cache: KVCache, lengths: np.ndarray) -> Tensor:
        """As `Decoder.step`: x (B, D) to hidden states (B, D) in the step's precision."""
        rows, threads = len(x), packed.threads_for(len(x) * self.size)
        sizes = rows, cache.capacity, threads
        if sizes not in self.scratch:
            scratch = torch.zeros(self.native.plait_scratch(self.model, *sizes), dtype=torch.uint8)
            self.scratch = {sizes: scratch}
        x = x.to(torch.float32, copy=True)
        hidden = torch.empty(rows, self.width, dtype=self.dtype)
        lengths = np.ascontiguousarray(lengths, np.int64)
        self.native.plait_step(
            self.model, x.data_ptr(), hidden.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(),
            lengths.ctypes.data, rows, cache.keys.shape[1], cache.capacity, self.scratch[sizes].data_ptr(), threads,
        )  # fmt: skip
        cache.lengths[:rows] += 1
        return hidden
