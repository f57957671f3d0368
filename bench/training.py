"""Training: one step of our trainer beside one step of transformers, from the same weights on the same tokens.

The peer is our model exported, so both hold the same network; the note shows how far their first losses lie apart.
Each trains as it ships (no dropout): autocast, fused AdamW, gradients clipped at 1. `python bench/run.py` runs it.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import OURS, Contender, Table, compare
from torch import Tensor

from plait.core.device import Device
from plait.hf.export import export_transformers
from plait.kernels import training as native
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import IGNORE, Batch, ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig
from plait.training.batches import Step
from plait.training.losses import LossModule
from plait.training.optimizer import AdamW, make_optimizer


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    batch: int


QUICK = Shape("quick", 2, 64, 2, 32, 512, 4)
SHAPES = {
    "0.8M": Shape("0.8M", 4, 128, 4, 64, 512, 32),
    "14M": Shape("14M", 6, 384, 6, 256, 8192, 4),
    "124M": Shape("124M", 12, 768, 12, 1024, 50304, 1),
    "350M": Shape("350M", 24, 1024, 16, 1024, 50304, 8),
    "1.3B": Shape("1.3B", 24, 2048, 16, 2048, 50304, 2),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "qk_norm": False, "qkv_bias": True,
              "bias": True, "norm_eps": 1e-5},
    "Llama": {"qk_norm": False},
    "Qwen3": {},
}  # fmt: skip


def make_model(shape: Shape, family: str, tied: bool = True, length: int | None = None) -> Multimodal:
    """A text-only model with random weights, the same at each call."""
    hidden = 4 * shape.width if family == "GPT-2" else round(shape.width * 8 / 3 / 16) * 16
    backbone = TransformerConfig(
        width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.heads,
        head_width=shape.width // shape.heads, hidden=hidden, max_length=length or shape.length, **FAMILIES[family],
    )  # fmt: skip
    vocabulary = Vocabulary(text=shape.vocabulary - 2, columns={}, levels={}, closers=[])
    gc.collect()  # the last pair's, which its closures tie in knots
    torch.manual_seed(0)
    return Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=tied))


def as_transformers(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The same network and weights as a model of transformers, on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        export_transformers(checkpoint, Path(folder) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)


def text_checkpoint(model: Multimodal) -> Checkpoint:
    """The model with a tokenizer of bare bytes: ids above have no spelling, and none is needed."""
    return Checkpoint(model, Text.train([], 256))


def flops_a_token(model: Multimodal) -> float:
    """6 N for products with weights, and 12 L D T for attention, whose causal half is counted whole as is usual."""
    c = model.config.backbone
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "positions" not in name)
    return 6 * weights + 12 * c.layers * c.heads * c.head_width * c.max_length


def with_parts(module: Any, **parts: Any) -> Any:
    """A module that shares all with another but for some of its parts."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **parts}
    return twin


def step_of(optimizer: torch.optim.Optimizer, model: Any, losses: Any, tokens: int) -> Any:
    """One step as the trainer takes it, given what computes the loss; returns the tokens seen."""

    def work() -> float:
        loss = losses()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if isinstance(optimizer, AdamW):  # ours, as the trainer clips
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.clip(norm, 1.0)
        else:
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens

    return work


def alone(work: Callable[[], float]) -> Callable[[], float]:
    """The same work without compiled C++ of ours."""

    def without() -> float:
        with mock.patch.object(native, "library", return_value=None):
            return work()

    return without


def losses(shape: Shape, device: Device) -> tuple[Callable[[Multimodal], Tensor], Callable[[Any], Tensor], int]:
    """What computes the loss of one batch, with our network and with that of transformers; and the batch's tokens."""
    tokens = torch.randint(
        shape.vocabulary - 2, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1)
    )
    targets = torch.cat([tokens[:, 1:], torch.full((shape.batch, 1), IGNORE)], 1)
    batch = Batch(tokens, targets, torch.full((shape.batch,), shape.length), {}, [])
    step = Step([batch], [np.zeros(0, np.int64)], np.zeros(0, np.int64))

    def ours(network: Multimodal) -> Tensor:
        return LossModule(network, device)(step, True, False).sums["text"] / targets.ne(IGNORE).sum()

    def theirs(network: Any) -> Tensor:
        ids = tokens.to(device.torch)
        with device.autocast():
            loss: Tensor = network(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return ours, theirs, tokens.numel()


def pair(shape: Shape, family: str, device: Device, compiled: bool, peak: float, **timing: Any) -> Table:
    """Our model and its twin in transformers, in turn; `peak` in FLOP/s, 0 where it is not known."""
    torch.compiler.reset()  # what earlier pairs compiled counts against a limit
    model = make_model(shape, family)
    peer = as_transformers(text_checkpoint(model)).to(device.torch).train()
    model.to(device.torch).train()
    ours, theirs, tokens = losses(shape, device)
    with torch.no_grad():
        apart = abs(float(ours(model)) - float(theirs(peer)))
    optimizer, peer_optimizer = (make_optimizer([m], 1e-4, 0.1, (0.9, 0.95)) for m in (model, peer))
    work = step_of(optimizer, model, lambda: ours(model), tokens)
    peer_work = step_of(peer_optimizer, peer, lambda: theirs(peer), tokens)
    blocks = native.backend_name(device, model.config.backbone)
    contenders = [
        Contender("ours", work, "", OURS, f"{blocks}; first losses {apart:.4f} nats apart"),
        Contender(f"transformers {family}", peer_work, "ours"),
    ]
    if fast := native.beats_compile(device, model.config.backbone):
        contenders.append(Contender("ours, PyTorch alone", alone(work), "ours", OURS))
    if compiled:
        # Parameters and optimizer are shared with the eager twins: less memory, the same work.
        twin = with_parts(model, backbone=with_parts(
            model.backbone, blocks=torch.nn.ModuleList(copy.copy(block) for block in model.backbone.blocks)
        ))  # fmt: skip
        twin.backbone.compile_blocks()
        peer_twin = torch.compile(peer)
        twin_work = alone(step_of(optimizer, model, lambda: ours(twin), tokens))
        name = "ours, PyTorch alone, compiled" if fast else "ours, compiled"
        best = "ours" if fast else name  # as `plait train` does
        contenders += [
            Contender(name, twin_work, "ours", OURS),
            Contender(f"transformers {family}, compiled",
                      step_of(peer_optimizer, peer, lambda: theirs(peer_twin), tokens), best),
        ]  # fmt: skip
    precision = str(device.dtype).removeprefix("torch.")
    title = f"Training {shape.name}, {family}: {shape.batch} x {shape.length} tokens, {precision}"
    limit = ("of peak", peak / flops_a_token(model))
    return compare(title, "tokens/s", contenders, device.name, limit, **timing)
