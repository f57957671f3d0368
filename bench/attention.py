"""Attention on a processor: plait's plain product and native kernel beside torch's fused one, causal.

    python bench/attention.py

This is the measurement behind the choices in `plait.model.layers.attend` and `plait.kernels.training.attends`.
"""

from __future__ import annotations

from typing import Any

from plait.core import isa  # noqa: F401  isort: skip (before torch, which it may cap)

import torch
import torch.nn.functional as F
from measure import OURS, Contender, Table, compare
from torch import Tensor

from plait.core.device import threads
from plait.kernels import training as native
from plait.model.layers import attend

LENGTHS = (56, 256, 1024, 2048)  # 4,096 tokens a call


def fused(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def table(length: int, training: bool, **timing: Any) -> Table:
    """Forward and backward in bf16, or forward in fp32."""
    batch = max(4096 // length, 1)
    dtype = torch.bfloat16 if training else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 6, length, 64, generator=generator).to(dtype) for _ in range(3))
    apart = float((attend(q, k, v, None) - fused(q, k, v, None)).abs().max())
    leaves = [t.requires_grad_(training) for t in (q, k, v)]

    def work(function: Any) -> float:
        with torch.set_grad_enabled(training):
            out = function(*leaves, None)
        if training:
            torch.autograd.grad(out, leaves, out)
        return batch * length

    plain, fast = "plain product", "native"
    compiled = training and native.library() is not None
    contenders = [
        Contender(plain, lambda: work(attend), fast if compiled else "", OURS),
        Contender("fused kernel (SDPA)", lambda: work(fused), fast if compiled else plain, OURS, f"{apart:.1g} apart"),
    ]
    if compiled:
        qkv = torch.cat((q, k, v), 1).detach().transpose(1, 2).contiguous().requires_grad_()

        def whole() -> float:
            out = native.attention(qkv, None, None, 6, 0.0, 0.0)
            torch.autograd.grad(out, qkv, out)
            return batch * length

        contenders.append(Contender(fast, whole))
    if not training and OURS != "highest":
        contenders.insert(1, Contender("plain product at 'highest'", lambda: work(attend), "plain product"))
    what = "training, bf16" if training else "inference, fp32"
    return compare(f"Attention, {what}, length {length}", "tokens/s", contenders, **timing)


def run(**timing: Any) -> list[Table]:
    return [table(length, training, **timing) for training in (True, False) for length in LENGTHS]


if __name__ == "__main__":
    torch.set_num_threads(threads())
    run()
