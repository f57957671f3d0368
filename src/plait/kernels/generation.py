"""The step of `decoder.py` on a processor as one call of compiled C++ (`kernels/generation.cpp`). PyTorch's own step
stays the reference, and is what runs where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.device import Device
from plait.kernels import build as native
from plait.model.transformer import Block, KVCache, Transformer, TransformerConfig, rotary_frequencies

PANEL = 32
SMALL = 2**22  # products of weights and rows for which a second thread does not pay
ACTIVATIONS = {"swiglu": 0, "gelu": 1, "gelu_tanh": 2}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Linear(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


class _Layer(Structure):
    _fields_ = [
        ("attention_norm", _Norm), ("feed_norm", _Norm), ("qkv", _Linear), ("attention_out", _Linear),
        ("feed_in", _Linear), ("feed_out", _Linear), ("q_norm", c_void_p), ("k_norm", c_void_p),
    ]  # fmt: skip


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "width", "heads", "kv_heads", "head_width", "hidden", "max_length")),
        ("activation", c_int64), ("half", c_int64), ("eps", c_float), ("turns", c_void_p), ("positions", c_void_p),
        ("layer", POINTER(_Layer)), ("final_norm", _Norm),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, None where it cannot be had."""
    found = native.library("generation")
    if found is None:
        return None
    found.plait_pack.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p]
    found.plait_products()
    found.plait_linear.argtypes = [POINTER(_Linear), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64]
    found.plait_scratch.argtypes = [POINTER(_Model), c_int64, c_int64, c_int64]
    found.plait_scratch.restype = c_int64
    found.plait_step.argtypes = [POINTER(_Model), *[c_void_p] * 5, *[c_int64] * 3, c_void_p, c_int64]
    return found


def supports(config: TransformerConfig) -> bool:
    """Whether the compiled step computes a backbone of this shape: not sliding windows that bite, layers without
    rotary positions, norms after a layer, GeGLU, or LongRoPE."""
    windows = "sliding" in (config.layer_types or []) and (config.sliding_window or 0) < config.max_length
    plain = config.activation in ACTIVATIONS and not config.post_norm and config.embed_scale == 1.0
    return plain and not windows and not config.layers_without_rotary and config.trained_length is None


def file_name() -> str:
    """The name of the compiled file, which changes with its source and its instructions."""
    return native.kernel("generation").name


def backend_name(device: Device) -> str:
    """What computes a step of generation on this device, in words."""
    if device.kind != "cpu":
        return "PyTorch"
    found = library()
    if found is None:
        return native.not_native("generation")
    return native.described("generation", found.plait_products() if device.dtype is torch.bfloat16 else 0)


def _threads(work: int) -> int:
    return 1 if work < SMALL else torch.get_num_threads()


def _up(count: int, to: int) -> int:
    return -(-count // to) * to


class NativeLinear:
    """A linear layer (B, in) to (B, out), its result in fp32; called for a few rows at a time."""

    def __init__(self, native: ctypes.CDLL, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self.native, self.half = native, dtype is torch.bfloat16
        weight = weight.detach().to("cpu", torch.float32).contiguous()
        self.outputs, self.inputs = weight.shape
        self.panels = torch.zeros(_up(self.outputs, PANEL), _up(self.inputs, PANEL), dtype=dtype)
        native.plait_pack(weight.data_ptr(), self.outputs, self.inputs, self.half, self.panels.data_ptr())
        self.bias = None if bias is None else bias.new_zeros(len(self.panels), dtype=torch.float32)
        if bias is not None and self.bias is not None:
            self.bias[: self.outputs] = bias.detach()
        pointer = None if self.bias is None else self.bias.data_ptr()
        self.linear = _Linear(self.panels.data_ptr(), pointer, self.inputs, self.outputs)
        self.room = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        many = rows if rows < 16 else _up(rows, 16)
        if len(self.room) < many:
            self.room = torch.zeros(many, self.panels.shape[1], dtype=self.panels.dtype)
        x = x.to(self.panels.dtype).contiguous()
        out = torch.empty(many, len(self.panels))
        self.native.plait_linear(
            self.linear, self.half, x.data_ptr(), rows, out.data_ptr(), self.room.data_ptr(),
            _threads(rows * self.panels.numel()),
        )  # fmt: skip
        return out[:rows, : self.outputs]


class NativeStep:
    """A backbone's weights in panels, and one more position of each row in one call."""

    def __init__(self, native: ctypes.CDLL, backbone: Transformer, dtype: torch.dtype) -> None:
        config = backbone.config
        self.native, self.dtype, self.width = native, dtype, config.width
        self.kept: list[Tensor] = []  # what the pointers point to
        self.products: list[NativeLinear] = []
        self.layers = (_Layer * config.layers)(*(self._layer(cast(Block, block)) for block in backbone.blocks))
        turns = positions = None
        if config.position == "rotary":
            angle = torch.arange(config.max_length)[:, None] * rotary_frequencies(config)
            turns = self._keep(torch.cat((angle.cos(), angle.sin()), -1) * config.rotary_scale)
        else:
            positions = self._keep(backbone.positions)
        self.model = _Model(
            config.layers, config.width, config.heads, config.kv_heads, config.head_width, config.hidden,
            config.max_length, ACTIVATIONS[config.activation], dtype is torch.bfloat16, config.norm_eps, turns,
            positions, self.layers, self._norm(backbone.final_norm),
        )  # fmt: skip
        self.size = sum(product.panels.numel() for product in self.products)
        self.rooms: dict[tuple[int, int, int], Tensor] = {}

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().to("cpu", torch.float32).contiguous())
        return self.kept[-1].data_ptr()

    def _norm(self, module: nn.Module) -> _Norm:
        bias = getattr(module, "bias", None)
        assert isinstance(module.weight, Tensor)
        return _Norm(self._keep(module.weight), None if bias is None else self._keep(bias))

    def _linear(self, module: nn.Linear) -> _Linear:
        self.products.append(NativeLinear(self.native, module.weight, self.dtype, module.bias))
        return self.products[-1].linear

    def _layer(self, block: Block) -> _Layer:
        norms = [self._norm(block.attention_norm), self._norm(block.feed_norm)]
        products = [self._linear(p) for p in (block.qkv, block.attention_out, block.feed_in, block.feed_out)]
        heads: list[int | None] = [None, None]
        if block.config.qk_norm:
            heads = [self._keep(norm.weight) for norm in (block.q_norm, block.k_norm)]
        return _Layer(*norms, *products, *heads)

    def __call__(self, x: Tensor, cache: KVCache, lengths: np.ndarray) -> Tensor:
        """As `Decoder.step`: x (B, D) to hidden states (B, D) in the step's precision."""
        rows, threads = len(x), _threads(len(x) * self.size)
        sizes = rows, cache.capacity, threads
        if sizes not in self.rooms:
            room = torch.zeros(self.native.plait_scratch(self.model, *sizes), dtype=torch.uint8)
            self.rooms = {sizes: room}
        x = x.to(torch.float32, copy=True)
        hidden = torch.empty(rows, self.width, dtype=self.dtype)
        lengths = np.ascontiguousarray(lengths, np.int64)
        self.native.plait_step(
            self.model, x.data_ptr(), hidden.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(),
            lengths.ctypes.data, rows, cache.keys.shape[1], cache.capacity, self.rooms[sizes].data_ptr(), threads,
        )  # fmt: skip
        cache.lengths[:rows] += 1
        return hidden
