"""What lies between the matrix products of a block, as compiled C++ with its gradients (`kernels/training.cpp`): norms,
gates, activations, and attention whole, in fp32 and, where the processor has units for it, in bf16. `transformer.py`
holds the same in PyTorch, and asks `supports` or `supports_attention` which to use.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from plait.core.device import Device, matmul_precision, product_precision
from plait.kernels import build
from plait.kernels.choice import KERNEL, PYTORCH, choose, question

if TYPE_CHECKING:
    from plait.model.transformer import TransformerConfig

LONGEST = 4096  # positions: a head keeps slopes of scores whole, 32 MiB of these
SMALL = 2**16  # items for which a second thread does not pay
SMALL_PRODUCT = 2**20  # products of numbers for which it does not
FEWEST = 64  # rows from which packing a weight for one product pays


class _Attention(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "heads", "kv_heads", "width")), ("eps", c_float),
        *((name, c_void_p) for name in ("qkv", "q_norm", "k_norm", "cosines", "sines")), ("stride", c_int64),
        ("mixed", c_void_p), ("logs", c_void_p), ("dropped", c_int64), ("seed", c_int64),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None where they cannot be had."""
    compiled = build.library("training")
    if compiled is None:
        return None
    sizes, pointers = [c_int64] * 2, [c_void_p] * 2
    compiled.plait_products()
    compiled.plait_scratch.argtypes, compiled.plait_scratch.restype = [c_int64] * 3, c_int64
    compiled.plait_attend.argtypes = [POINTER(_Attention), c_int64, c_void_p, c_int64]
    compiled.plait_attend_back.argtypes = [POINTER(_Attention), c_int64, *[c_void_p] * 4, c_int64]
    compiled.plait_add.argtypes = [c_int64, *pointers, c_int64, c_void_p, c_int64]
    compiled.plait_norm.argtypes = [c_int64, *[c_void_p] * 4, c_float, *sizes, *pointers, c_int64]
    compiled.plait_norm_back.argtypes = [c_int64, *pointers, c_float, *pointers, *sizes, *[c_void_p] * 4, c_int64]
    compiled.plait_loss.argtypes = [c_int64, *pointers, *sizes, c_float, c_void_p, c_int64]
    compiled.plait_gate.argtypes = [c_int64, c_void_p, *sizes, c_void_p, c_int64]
    compiled.plait_gate_back.argtypes = [c_int64, *pointers, *sizes, c_void_p, c_int64]
    compiled.plait_gelu.argtypes = [c_int64, c_void_p, *sizes, c_void_p, c_int64]
    compiled.plait_gelu_back.argtypes = [c_int64, *pointers, *sizes, c_void_p, c_int64]
    compiled.plait_product_scratch.argtypes, compiled.plait_product_scratch.restype = sizes, c_int64
    compiled.plait_product.argtypes = [c_void_p, *[c_int64] * 3, c_void_p, *[c_int64] * 4, *pointers, c_int64]
    return compiled


def backend_name(device: Device, config: TransformerConfig | None = None) -> str:
    """What computes the blocks of a training step on this device, in words; of this shape where it is given."""
    if device.kind != "cpu":
        return "PyTorch"
    compiled = library()
    if compiled is None:
        return build.not_native("training")
    halved = device.dtype is torch.bfloat16
    if halved and not compiled.plait_products():
        return "PyTorch (no bf16 products here)"
    words = build.described("training", compiled.plait_products() if halved else 0)
    if config is None or config.head_width % 32 == 0:
        return words
    return f"{words}; attention by PyTorch, for heads of {config.head_width}"


def beats_compile(device: Device, config: TransformerConfig) -> bool:
    """Whether blocks of this shape train as fast natively as compiled by torch: where attention is native."""
    return "native (" in backend_name(device, config) and config.head_width % 32 == 0


def activations(x: Tensor) -> torch.dtype | None:
    """The precision of activations where what follows x goes the native way: bf16 by autocast, where there are units
    for its products, or fp32. None elsewhere than on a processor, and where a compiler or an export reads along."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    compiled = library()
    if compiled is None:
        return None
    if torch.is_autocast_enabled("cpu"):
        units = torch.get_autocast_dtype("cpu") is torch.bfloat16 and compiled.plait_products()
        return torch.bfloat16 if units else None
    return torch.float32 if x.dtype is torch.float32 else None


def supports(x: Tensor) -> bool:
    """Whether what follows x goes the native way."""
    return activations(x) is not None


def supports_attention(x: Tensor, head_width: int) -> bool:
    """Whether causal attention over x (B, L, ...) goes the native way."""
    return x.shape[1] <= LONGEST and head_width % 32 == 0 and supports(x)


def _active(x: Tensor) -> torch.dtype:
    return activations(x) or torch.float32


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    """Tensors as pointers to what they hold. Those without memory only tell how large results are: `plan` asks."""
    if not any(isinstance(a, FakeTensor) for a in arguments):
        getattr(library(), name)(*(_pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def _threads(work: int) -> int:
    return 1 if work < SMALL else torch.get_num_threads()


def _halved(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ctx.dtype = more.dtype
        _call("plait_add", _halved(more.dtype), x, more, x.numel(), out, _threads(x.numel()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.to(ctx.dtype)


def add(x: Tensor, more: Tensor) -> Tensor:
    """x in fp32 plus as many items of activations, in fp32."""
    return cast(Tensor, _Add.apply(x.float().contiguous(), more.to(_active(x)).contiguous()))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        width, out = x.shape[-1], torch.empty(x.shape, dtype=dtype)
        total = x.view_as(x) if more is None else torch.empty_like(x)
        _call(
            "plait_norm", _halved(dtype), x, more, weight, bias, eps, x.numel() // width, width, total, out,
            _threads(x.numel()),
        )  # fmt: skip
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.added, ctx.dtype, ctx.biased = eps, more is not None, dtype, bias is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width, threads = x.shape[-1], _threads(x.numel())
        past = None if past is None else past.contiguous()
        grad = torch.zeros(x.shape, dtype=ctx.dtype) if grad is None else grad.contiguous()
        to_x, to_weight = torch.empty_like(x), x.new_zeros(threads, width)
        to_bias = x.new_zeros(threads, width) if ctx.biased else None
        apart = ctx.added and _halved(ctx.dtype)  # in fp32, both that were added have the gradient of the sum
        to_more = torch.empty_like(grad) if apart else None
        _call(
            "plait_norm_back", _halved(ctx.dtype), x, weight, ctx.eps, grad, past, x.numel() // width, width, to_x,
            to_more, to_weight, to_bias, threads,
        )  # fmt: skip
        if ctx.added and not apart:
            to_more = to_x
        return to_x, to_more, to_weight.sum(0), None if to_bias is None else to_bias.sum(0), None, None


def norm(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (..., D) in fp32, plus `more`, and x / rms(x) * weight of that or, with a bias, its layer norm, as activations.
    Who goes on with both spares a sum of gradients."""
    dtype = _active(x)
    more = None if more is None else more.to(dtype).contiguous()
    weights = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    return cast(tuple[Tensor, Tensor], _Norm.apply(x.float().contiguous(), more, *weights, eps, dtype))


def softmax_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """-log P of targets (N,) in nats, (N, 1), from logits (N, R) in bf16 or fp32, which become the gradients of their
    sum."""
    targets = targets.long().contiguous()
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(f"A target lies outside of the {logits.shape[1]} rows.")
    losses = torch.empty(len(logits), 1)
    _call(
        "plait_loss", _halved(logits.dtype), logits, targets, *logits.shape, smoothing, losses,
        _threads(logits.numel()),
    )  # fmt: skip
    return losses


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gate_values(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gate_gradient(x, grad)


def gate_values(x: Tensor) -> Tensor:
    """`gate` without gradients, in the precision of x, bf16 or fp32."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _call("plait_gate", _halved(x.dtype), x, out.numel() // width, width, out, _threads(out.numel()))
    return out


def gate_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient to what `gate` read, from that to what it gave; in the precision of x."""
    width, to_x = grad.shape[-1], torch.empty_like(x)
    rows, grad = grad.numel() // width, grad.to(x.dtype).contiguous()
    _call("plait_gate_back", _halved(x.dtype), x, grad, rows, width, to_x, _threads(grad.numel()))
    return to_x


def gate(x: Tensor) -> Tensor:
    """silu(gate) * up (..., F), where activations x (..., 2 F) hold both."""
    return cast(Tensor, _Gate.apply(x.to(_active(x)).contiguous()))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by_tanh: bool) -> Tensor:
        out = torch.empty_like(x)
        _call("plait_gelu", _halved(x.dtype), x, x.numel(), by_tanh, out, _threads(x.numel()))
        ctx.save_for_backward(x)
        ctx.by_tanh = by_tanh
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        to_x, grad = torch.empty_like(x), grad.contiguous()
        _call("plait_gelu_back", _halved(x.dtype), x, grad, x.numel(), ctx.by_tanh, to_x, _threads(x.numel()))
        return to_x, None


def gelu(x: Tensor, by_tanh: bool) -> Tensor:
    """GELU of activations x (...), exact or by tanh."""
    return cast(Tensor, _Gelu.apply(x.to(_active(x)).contiguous(), by_tanh))


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) times w (K, N) in fp32, either of which may lie turned; each output is summed in one order, whatever the
    number of threads."""
    (rows, inner), outputs = x.shape, w.shape[1]
    out = x.new_empty(rows, outputs)
    compiled = library()
    assert compiled is not None
    threads = 1 if rows * inner * outputs < SMALL_PRODUCT else torch.get_num_threads()
    scratch = torch.empty(threads * compiled.plait_product_scratch(outputs, threads))
    _call(
        "plait_product", x, *x.stride(), rows, w, *w.stride(), inner, outputs, out, scratch, threads
    )  # fmt: skip
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = _product(flat, weight.t())
        if bias is not None:
            out += bias
        ctx.save_for_backward(flat, weight)
        ctx.biased = bias is not None
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).contiguous()
        to_x, to_weight = None, None
        if ctx.needs_input_grad[0]:
            to_x = _product(flat, weight).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            to_weight = _product(flat.t(), x)
        return to_x, to_weight, flat.sum(0) if ctx.biased else None


def linear_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer makes of x (..., in): in fp32 by a product of our own, where that was measured to be faster
    than torch's, and weights are plain tensors."""
    rows = x.numel() // max(x.shape[-1], 1)
    if type(layer) is nn.Linear and rows >= FEWEST and activations(x) is torch.float32 and multiplies():
        weight = layer.weight
        plain = type(weight) in (nn.Parameter, Tensor) and type(x) is Tensor
        if plain and weight.dtype is torch.float32 and weight.is_contiguous():
            return cast(Tensor, _Linear.apply(x.contiguous(), weight, layer.bias))
    return cast(Tensor, layer(x))


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) times w (K, N), without gradients, by what `linear_of` uses."""
    use_kernel = (
        type(x) is Tensor and type(w) is Tensor and w.dtype is torch.float32 and activations(x) is torch.float32
    )
    return _product(x, w) if use_kernel and min(*x.shape, *w.shape) >= FEWEST and multiplies() else x @ w


_multiplying: list[bool] = []  # the answer, once there is one


def multiplies() -> bool:
    """Whether products of training in fp32 are ours: measured once at a common shape and the precision that training
    has, unless `multiply` has said it. There is one answer: what is computed again for a gradient must go the same way.
    """
    if not _multiplying:
        _multiplying[:] = [library() is not None and _ours_are_faster(product_precision())]
    return _multiplying[0] and library() is not None


def multiply(use_kernel: bool) -> None:
    """Have products of training be ours or torch's, whatever was measured: as a run that goes on began."""
    _multiplying[:] = [use_kernel]


def _ours_are_faster(precision: str) -> bool:
    shape = "1024 x 384 x 1024"

    def ways() -> dict[str, dict[str, Callable[[], object]]]:
        x, weight = torch.ones(1024, 384), torch.ones(1024, 384)
        return {shape: {KERNEL: lambda: _product(x, weight.t()), PYTORCH: lambda: x @ weight.t()}}

    name = build.kernel("training").name
    with matmul_precision(Device("cpu", torch.float32)):
        return choose(question(f"training, products in fp32 at '{precision}'", name), ways).way(shape) == KERNEL


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
        _call("plait_attend", byref(call), _halved(qkv.dtype), scratch, threads)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which may lie elsewhere by now, and may be asked for once
        call, scratch, threads = _prepared(ctx, *saved)
        qkv, q_norm = saved[:2]
        to_qkv, to_norms = torch.empty_like(qkv), torch.zeros(threads, 2, qkv.shape[3])
        halved = _halved(qkv.dtype)
        _call("plait_attend_back", byref(call), halved, grad.contiguous(), to_qkv, to_norms, scratch, threads)
        to_q_norm, to_k_norm = (None, None) if q_norm is None else to_norms.sum(0)
        return to_qkv, to_q_norm, to_k_norm, None, None, None, None, None


def _prepared(
    ctx: Any, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None,
    mixed: Tensor, logs: Tensor,
) -> tuple[_Attention, Tensor, int]:  # fmt: skip
    """A call's arguments, its scratch memory, and its threads."""
    compiled = library()
    assert compiled is not None
    batch, length, all_heads, width = qkv.shape
    heads = mixed.shape[2]
    kv_heads = (all_heads - heads) // 2
    has_rope = cosines is not None and len(cosines) > 1
    call = _Attention(
        batch, length, heads, kv_heads, width, ctx.eps, *(_pointer(t) for t in (qkv, q_norm, k_norm, cosines, sines)),
        length * width if has_rope else 0, _pointer(mixed), _pointer(logs), ctx.dropped, ctx.seed,
    )  # fmt: skip
    threads = min(_threads(qkv.numel()), batch * kv_heads)
    size = compiled.plait_scratch(length, width, _halved(qkv.dtype))
    return call, torch.empty(threads * size, dtype=torch.uint8), threads


def attention(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor] | None,
    heads: int,
    eps: float,
    dropout: float,
) -> Tensor:
    """Causal attention from qkv (B, L, H + 2 K, E) of activations, (B, L, H, E): queries and keys normed (weights (E,))
    and rotated (by what `layers.rotary` gives) where asked. Dropout takes chances, as PyTorch's generator seeds
    it."""
    weights, cos_sin = (
        tuple(part.float().contiguous() for part in tensors or ()) or (None, None) for tensors in (norms, rotary)
    )
    return cast(Tensor, _Attend.apply(qkv.to(_active(qkv)).contiguous(), *weights, *cos_sin, heads, eps, dropout))
