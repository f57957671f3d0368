"""Linear layers whose weight is packed once, in fp32, 16 bits, int8, int5 or int4, for products of any number of rows
on a processor (`kernels/generation.cpp`). Where there is no kernel, PyTorch computes the same from the same numbers.

How weights of integers are rounded stands in `quantisation.py`. Their inputs are rounded to 8 bits, with a scale for
each 32, as llama.cpp does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_bool, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import isa
from plait.kernels import build
from plait.kernels.quantisation import DTYPES, STORAGES, dequantise, quantise

FORMATS = {name: number for number, name in enumerate(STORAGES)}  # as `Format` in generation.cpp
BLOCKS = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K")  # kinds of blocks that are packed as they are, as there
PANEL = 32
SMALL = 2**22  # products of weights and rows for which a second thread does not pay
CHUNK = 512  # outputs that are laid out at a time: as much of them is held twice


@dataclass(frozen=True)
class Blocks:
    """Rows of a weight as a GGUF file keeps them: blocks of one of the kinds `BLOCKS`."""

    kind: str
    data: np.ndarray  # (rows, bytes of a row) uint8

    def __len__(self) -> int:
        return len(self.data)


class WeightRows(Protocol):
    """A weight that lies in a file, and is read a few rows at a time."""

    shape: torch.Size
    device: torch.device

    def pieces(self, rows: slice) -> Sequence[Tensor | Blocks]:
        """Those rows, one piece after the other; those that are left out at the end are zero."""
        ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class LinearStruct(Structure):
    """`Linear` of generation.cpp."""

    _fields_ = [
        ("weight", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("format", c_int64)
    ]  # fmt: skip


@functools.cache
def library(level: isa.Level | None = None) -> ctypes.CDLL | None:
    """The compiled file, None where it cannot be had; for the best instructions allowed, or those given."""
    compiled = build.kernel("generation", level).library
    if compiled is None:
        return None
    compiled.plait_products()
    compiled.plait_packed_size.argtypes, compiled.plait_packed_size.restype = [c_int64] * 3, c_int64
    compiled.plait_pack.argtypes = [c_void_p, *[c_int64] * 4, c_void_p]
    compiled.plait_pack_blocks.argtypes = [c_int64, c_void_p, *[c_int64] * 5, c_void_p]
    compiled.plait_pack_blocks.restype = c_bool
    compiled.plait_rows.argtypes = [POINTER(LinearStruct), c_void_p, c_int64, c_void_p]
    compiled.plait_linear_scratch.argtypes, compiled.plait_linear_scratch.restype = [c_int64] * 2, c_int64
    compiled.plait_linear.argtypes = [
        POINTER(LinearStruct), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64
    ]  # fmt: skip
    return compiled


def threads_for(work: int) -> int:
    """Threads that pay for so many products of weights and rows."""
    return 1 if work < SMALL else torch.get_num_threads()


def round_up(count: int, to: int) -> int:
    """The least multiple of `to` that is not below `count`."""
    return -(-count // to) * to


def _whole_rows(rows: int) -> int:
    return rows if rows < 16 else round_up(rows, 16)


class _Product(torch.autograd.Function):
    """The product, with the gradient to its inputs: weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense().to(grad.dtype), None


class PackedLinear(nn.Module):
    """A frozen linear layer (..., in) to (..., out), in the precision of its input."""

    def __init__(
        self,
        weight: Tensor | WeightRows,
        bias: Tensor | None = None,
        storage: str = "fp32",
        level: isa.Level | None = None,
    ) -> None:
        """`weight` (out, in) may be of any precision, and is not kept; `level` caps the instructions, for tests.

        Raises ValueError where a block's scale is not finite.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.storage = storage
        self.library = library(level) if weight.device.type == "cpu" else None
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.bias: Tensor | None = None
        if self.library is None:
            self.parts = quantise(weight.detach() if isinstance(weight, Tensor) else weight[:], storage)
            self.bias = None if bias is None else bias.detach().float()
            return
        outputs = round_up(self.out_features, PANEL)
        size = self.library.plait_packed_size(outputs, self.in_features, FORMATS[storage])
        # A cache line and a page begin it, so that vectors do not cross lines.
        self.panels = torch.zeros(size + 64, dtype=torch.uint8)
        start = -self.panels.data_ptr() % 64
        self.panels = self.panels[start : start + size]
        for first in range(0, self.out_features, CHUNK):
            rows, at = slice(first, first + CHUNK), first
            for piece in self._pieces(weight, rows):
                self._pack(piece, at)
                at += len(piece)
        if bias is not None:
            self.bias = torch.zeros(outputs)
            self.bias[: self.out_features] = bias.detach()
        pointer = None if self.bias is None else self.bias.data_ptr()
        self.struct = LinearStruct(
            self.panels.data_ptr(), pointer, self.in_features, self.out_features, FORMATS[storage]
        )

    def _pieces(self, weight: Tensor | WeightRows, rows: slice) -> Sequence[Tensor | Blocks]:
        """Rows of the weight as they can be laid out: blocks are packed into integers alone."""
        if isinstance(weight, Tensor):
            return [weight.detach()[rows]]
        return [weight[rows]] if self.storage in DTYPES else weight.pieces(rows)

    def _pack(self, piece: Tensor | Blocks, first: int) -> None:
        """Lay out rows of the weight, from row `first` on."""
        assert self.library is not None
        where = first, len(piece), self.in_features, FORMATS[self.storage], self.panels.data_ptr()
        if isinstance(piece, Tensor):
            wide = piece.float().contiguous()
            self.library.plait_pack(wide.data_ptr(), *where)
            return
        data = np.ascontiguousarray(piece.data)
        if not self.library.plait_pack_blocks(BLOCKS.index(piece.kind), data.ctypes.data, data.shape[1], *where):
            raise ValueError("A weight is not finite.")

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        if self.library is not None:
            return self.panels.nbytes
        return sum(part.nbytes for part in self.parts.values())

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in fp32, unpacked anew at each call."""
        return self.dense()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (N,) of the weight, (N, in) in fp32: an embedding that shares the weight of the head."""
        if self.library is None:
            return dequantise({name: part[ids] for name, part in self.parts.items()}, self.in_features)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.out_features:
            raise IndexError(f"A row lies outside of the {self.out_features} rows.")
        ids, rows = ids.long().contiguous(), torch.empty(len(ids), self.in_features)
        self.library.plait_rows(self.struct, ids.data_ptr(), len(ids), rows.data_ptr())
        return rows

    def dense(self) -> Tensor:
        """The weight as it is multiplied with, (O, I) in fp32."""
        return self.rows(torch.arange(self.out_features))

    def part(self, start: int, stop: int) -> Callable[[Tensor], Tensor]:
        """The layer of the outputs from `start` to `stop`, with the same memory."""
        return functools.partial(self.product, start=start, stop=stop)

    def product(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`forward` without gradients, of the outputs from `start` to `stop`."""
        stop = self.out_features if stop is None else stop
        if self.library is None:
            bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
            parts = {name: part[start:stop] for name, part in self.parts.items()}
            return F.linear(x, dequantise(parts, self.in_features).to(x.dtype), bias)
        first = start // PANEL * PANEL
        struct = self.struct
        if first or stop < self.out_features:
            before = self.library.plait_packed_size(first, self.in_features, FORMATS[self.storage])
            bias_at = None if self.bias is None else self.bias[first:].data_ptr()
            struct = LinearStruct(
                self.panels.data_ptr() + before, bias_at, self.in_features, stop - first, FORMATS[self.storage]
            )
        flat = x.reshape(-1, self.in_features)
        if flat.dtype not in (torch.float32, torch.bfloat16):
            flat = flat.float()
        flat, rows = flat.contiguous(), flat.numel() // self.in_features
        needed = self.library.plait_linear_scratch(self.in_features, rows)
        if len(self.scratch) != needed:  # what is filled up in it depends on the number of rows
            self.scratch = torch.zeros(needed, dtype=torch.uint8)
        out = torch.empty(_whole_rows(rows), round_up(stop - first, PANEL))
        self.library.plait_linear(
            struct, flat.dtype is torch.bfloat16, flat.data_ptr(), rows, out.data_ptr(), self.scratch.data_ptr(),
            threads_for(rows * self.in_features * (stop - first)),
        )  # fmt: skip
        if rows * self.in_features > CHUNK:
            self.scratch = torch.empty(0, dtype=torch.uint8)  # of a prompt: not kept
        return out[:rows, start - first : stop - first].to(x.dtype).reshape(*x.shape[:-1], stop - start)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Product.apply(x, self))
        return self.product(x)

    def extra_repr(self) -> str:
        """What PyTorch prints of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


def pack_linear_layers(module: nn.Module, storage: str) -> None:
    """Put a `PackedLinear` in the place of each linear layer below a module; what they held is freed one by one."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias, storage))
        else:
            pack_linear_layers(child, storage)
