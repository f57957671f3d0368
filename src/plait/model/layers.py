"""Parts of the transformer without matrices of their own: norms, rotary positions, attention and dropout.

Shapes: B batch, L sequence length, D width, H heads, K key-value heads, E head width, T cached positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.kernels import training as native

if TYPE_CHECKING:
    pass

POOL = 2**22  # places in a pool of masks
_pools: dict[tuple[float, torch.dtype], Tensor] = {}


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


def plain_frequencies(theta: float, width: int) -> Tensor:
    """Radians a position, (E / 2,), as Su et al. have them."""
    half = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / theta**half


def rotary(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (B, L, 1, E) of positions (B, L), for `rotate`, which then scales as it rotates.
    `frequencies` are (E / 2,), or of each row (B, 1, 1, E / 2)."""
    angle = positions[..., None, None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), cos_half, (back, on) = x.float().chunk(2, -1), cos.chunk(2, -1)[0], sin.chunk(2, -1)
    return torch.cat((a * cos_half + b * back, b * cos_half + a * on), -1).to(
        x.dtype
    )  # halves: compilers shuffle slowly


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_rotated` in the precision of x, in fewer passes over memory."""
    (a, b), cos, sin = x.chunk(2, -1), cos.to(x.dtype).chunk(2, -1)[0], sin.to(x.dtype).chunk(2, -1)[1]
    rotated = torch.empty_like(x)
    first, second = rotated.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_halves(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, L, N, E), with what `rotary` gives (Su et al., 2021)."""
    return cast(Tensor, _Rotate.apply(x, cos, sin)) if use_manual_backward(x) else _rotated(x, cos, sin)


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
