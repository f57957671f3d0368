"""What lies between the matrix products of a block, as compiled C++ with its gradients (`kernels/training.cpp`): norms,
gates, and attention whole. `transformer.py` holds the same in PyTorch, and asks `takes` or `attends` which to use.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from plait.core.device import Device
from plait.kernels import build as native

if TYPE_CHECKING:
    from plait.model.transformer import TransformerConfig

LONGEST = 4096  # positions: a head keeps slopes of scores whole, 32 MiB of these
SMALL = 2**16  # items for which a second thread does not pay


class _Attention(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "heads", "kv_heads", "width")), ("eps", c_float),
        *((name, c_void_p) for name in ("qkv", "q_norm", "k_norm", "cosines", "sines")), ("stride", c_int64),
        ("mixed", c_void_p), ("logs", c_void_p), ("dropped", c_int64), ("seed", c_int64),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None without a compiler, or where the processor does not multiply bf16."""
    found = native.library("training")
    if found is None or not found.plait_products():
        return None
    found.plait_scratch.argtypes, found.plait_scratch.restype = [c_int64, c_int64], c_int64
    found.plait_attend.argtypes = [POINTER(_Attention), c_void_p, c_int64]
    found.plait_attend_back.argtypes = [POINTER(_Attention), *[c_void_p] * 4, c_int64]
    found.plait_add.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64]
    found.plait_norm.argtypes = [*[c_void_p] * 3, c_float, *[c_int64] * 2, *[c_void_p] * 2, c_int64]
    found.plait_norm_back.argtypes = [
        *[c_void_p] * 2, c_float, *[c_void_p] * 2, *[c_int64] * 2, *[c_void_p] * 3, c_int64,
    ]  # fmt: skip
    found.plait_loss.argtypes = [*[c_void_p] * 2, *[c_int64] * 2, c_float, c_void_p, c_int64]
    found.plait_gate.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64]
    found.plait_gate_back.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64]
    return found


def backend_name(device: Device, config: TransformerConfig | None = None) -> str:
    """What computes the blocks of a training step on this device, in words; of this shape where it is given."""
    if device.kind != "cpu":
        return "PyTorch"
    found = library()
    if found is None:
        return (
            native.not_native("training") if native.library("training") is None else "PyTorch (no bf16 products here)"
        )
    if device.dtype is not torch.bfloat16:
        return "PyTorch (native ones are for bf16)"
    words = native.described("training", found.plait_products())
    if config is None or (config.norm == "rms" and config.activation == "swiglu" and config.head_width % 32 == 0):
        return words
    parts = "attention and losses" if config.head_width % 32 == 0 else "losses"
    return f"PyTorch, {parts} {words}"


def beats_compile(device: Device, config: TransformerConfig) -> bool:
    """Whether blocks of this shape train as fast natively as compiled by torch: where attention is native."""
    return "native (" in backend_name(device, config) and config.head_width % 32 == 0


def supports(x: Tensor) -> bool:
    """Whether what follows x goes the native way: on a processor, in bf16 by autocast, and not where a compiler or an
    export reads along."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and library() is not None
    )


def supports_attention(x: Tensor, head_width: int) -> bool:
    """Whether causal attention over x (B, L, ...) goes the native way."""
    return x.shape[1] <= LONGEST and head_width % 32 == 0 and supports(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    """Tensors as pointers to what they hold. Those without memory only tell how large results are: `plan` asks."""
    if not any(isinstance(a, FakeTensor) for a in arguments):
        getattr(library(), name)(*(_pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def _threads(work: int) -> int:
    return 1 if work < SMALL else torch.get_num_threads()


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _call("plait_add", x, more, x.numel(), out, _threads(x.numel()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.bfloat16()


def add(x: Tensor, more: Tensor) -> Tensor:
    """x in fp32 plus as many items in bf16, in fp32."""
    return cast(Tensor, _Add.apply(x.float().contiguous(), more.bfloat16().contiguous()))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        width, out = x.shape[-1], torch.empty(x.shape, dtype=torch.bfloat16)
        total = x.view_as(x) if more is None else torch.empty_like(x)
        _call("plait_norm", x, more, weight, eps, x.numel() // width, width, total, out, _threads(x.numel()))
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.added = eps, more is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width, threads = x.shape[-1], _threads(x.numel())
        past = None if past is None else past.contiguous()
        grad = torch.zeros(x.shape, dtype=torch.bfloat16) if grad is None else grad.contiguous()
        to_x, to_weight = torch.empty_like(x), x.new_zeros(threads, width)
        to_more = torch.empty_like(grad) if ctx.added else None
        _call(
            "plait_norm_back", x, weight, ctx.eps, grad, past, x.numel() // width, width, to_x, to_more, to_weight,
            threads,
        )  # fmt: skip
        return to_x, to_more, to_weight.sum(0), None


def norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., D) in fp32, plus `more` in bf16, and x / rms(x) * weight of that in bf16. Who goes on with both spares a
    sum of slopes."""
    more = None if more is None else more.bfloat16().contiguous()
    return cast(tuple[Tensor, Tensor], _Norm.apply(x.float().contiguous(), more, weight.float().contiguous(), eps))


def softmax_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """-log P of targets (N,) in nats, (N, 1), from logits (N, R) in bf16, which become the slopes of their sum."""
    targets = targets.long().contiguous()
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(f"A target lies outside of the {logits.shape[1]} rows.")
    losses = torch.empty(len(logits), 1)
    _call("plait_loss", logits, targets, *logits.shape, smoothing, losses, _threads(logits.numel()))
    return losses


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        _call("plait_gate", x, out.numel() // width, width, out, _threads(out.numel()))
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        width, to_x = grad.shape[-1], torch.empty_like(x)
        rows = grad.numel() // width
        _call("plait_gate_back", x, grad.contiguous(), rows, width, to_x, _threads(grad.numel()))
        return to_x


def gate(x: Tensor) -> Tensor:
    """silu(gate) * up (..., F), where x (..., 2 F) in bf16 holds both."""
    return cast(Tensor, _Gate.apply(x.bfloat16().contiguous()))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None,
        sines: Tensor | None, heads: int, eps: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        batch, length, _, width = qkv.shape
        mixed, logs = qkv.new_empty(batch, length, heads, width), torch.empty(batch, heads, length)
        ctx.eps, ctx.dropped = eps, round(dropout * 2**32)
        ctx.seed = int(torch.randint(2**32, ())) if dropout else 0
        tensors = (qkv, q_norm, k_norm, cosines, sines, mixed, logs)
        ctx.save_for_backward(*tensors)
        call, scratch, threads = _prepared(ctx, *tensors)
        _call("plait_attend", byref(call), scratch, threads)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which may lie elsewhere by now, and may be asked for once
        call, scratch, threads = _prepared(ctx, *saved)
        qkv, q_norm = saved[:2]
        to_qkv, to_norms = torch.empty_like(qkv), torch.zeros(threads, 2, qkv.shape[3])
        _call("plait_attend_back", byref(call), grad.contiguous(), to_qkv, to_norms, scratch, threads)
        q_slope, k_slope = (None, None) if q_norm is None else to_norms.sum(0)
        return to_qkv, q_slope, k_slope, None, None, None, None, None


def _prepared(
    ctx: Any, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None,
    mixed: Tensor, logs: Tensor,
) -> tuple[_Attention, Tensor, int]:  # fmt: skip
    """A call's arguments, its scratch memory, and its threads."""
    found = library()
    assert found is not None
    batch, length, all_heads, width = qkv.shape
    heads = mixed.shape[2]
    kv_heads = (all_heads - heads) // 2
    turned = cosines is not None and len(cosines) > 1
    call = _Attention(
        batch, length, heads, kv_heads, width, ctx.eps, *(_pointer(t) for t in (qkv, q_norm, k_norm, cosines, sines)),
        length * width if turned else 0, _pointer(mixed), _pointer(logs), ctx.dropped, ctx.seed,
    )  # fmt: skip
    threads = min(_threads(qkv.numel()), batch * kv_heads)
    return call, torch.empty(threads * found.plait_scratch(length, width), dtype=torch.uint8), threads


def attention(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor] | None,
    heads: int,
    eps: float,
    dropout: float,
) -> Tensor:
    """Causal attention from qkv (B, L, H + 2 K, E) in bf16, (B, L, H, E): queries and keys normed (weights (E,)) and
    turned (by what `transformer.rotary` gives) where asked. Dropout takes chances, as PyTorch's generator seeds it."""
    weights, turn = (
        tuple(part.float().contiguous() for part in some or ()) or (None, None) for some in (norms, rotary)
    )
    return cast(Tensor, _Attend.apply(qkv.bfloat16().contiguous(), *weights, *turn, heads, eps, dropout))
