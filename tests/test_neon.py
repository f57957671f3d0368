"""The kernels on NEON: built by a cross compiler and run under an emulator, against PyTorch here.

Needs `apt install g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import plait.kernels
from plait.core.device import Device
from plait.inference.decoder import Decoder, Ways
from plait.kernels.choice import PYTORCH
from plait.kernels.compile import FLAGS
from plait.kernels.linear import FORMATS
from plait.kernels.quantisation import STORAGES, dequantise, quantise
from plait.model.layers import rms_norm, rotary, rotate
from plait.model.transformer import KVCache, Transformer, TransformerConfig, rotary_frequencies

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or {EMULATOR}"),
]


class Emulated:
    """The driver `other_processor.cpp`, built for arm64."""

    def __init__(self, folder: Path, use: str) -> None:
        self.folder, self.program = folder, folder / use
        here = Path(__file__).with_name("other_processor.cpp")
        flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
        kernels = Path(plait.kernels.__file__).parent
        subprocess.run(
            [COMPILER, *flags, f"-D{use.upper()}", f"-I{kernels}", str(here), "-o", str(self.program)], check=True
        )

    def __call__(self, call: str, inputs: list[Tensor], sizes: list[int]) -> Tensor:
        """All that the call writes, as one vector."""
        given, written = self.folder / "in", self.folder / "out"
        given.write_bytes(b"".join(x.detach().float().contiguous().numpy().tobytes() for x in inputs))
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(self.program), call, str(given), str(written)]
        subprocess.run([*command, *map(str, sizes)], check=True)
        return torch.from_numpy(np.fromfile(written, np.float32))


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("neon"), "generation")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("neon"), "training")


def assert_same(found: Tensor, wanted: list[Tensor], bound: float) -> None:
    parts = found.split([part.numel() for part in wanted])
    for one, other in zip(parts, wanted, strict=True):
        other = other.detach().flatten()
        assert (one - other).norm() <= bound * other.norm() + 1e-6


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_packed_layers(generation: Emulated, storage: str, rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(70, 45), torch.randn(rows, 45)
    found = generation("product", [weight, x], [70, 45, rows, FORMATS[storage]])
    plain = F.linear(x, dequantise(quantise(weight, storage), 45))
    assert_same(found, [plain], 0.01 if storage.startswith("int") else 1e-6)


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_a_step(generation: Emulated, storage: str) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=96, layers=2, heads=6, kv_heads=2, head_width=24, hidden=88, max_length=32)
    network, rows = Transformer(config).eval(), 3
    decoder = Decoder(network, Device("cpu", torch.float32), Ways.all(PYTORCH))
    x = torch.randn(rows, config.width)
    cache = KVCache(config, rows, config.max_length, torch.device("cpu"), torch.float32)
    cache.keys.normal_(), cache.values.normal_()
    lengths = np.array([config.max_length - 1 - row for row in range(rows)])
    cache.lengths.copy_(torch.from_numpy(lengths))
    angle = torch.arange(config.max_length)[:, None] * rotary_frequencies(config)
    inputs = [torch.cat((angle.cos(), angle.sin()), -1), network.final_norm.weight]
    for block in network.blocks:
        inputs += [block.attention_norm.weight, block.feed_norm.weight]
        inputs += [part.weight for part in (block.qkv, block.attention_out, block.feed_in, block.feed_out)]
        inputs += [block.q_norm.weight, block.k_norm.weight]
    sizes = [config.layers, config.width, config.heads, config.kv_heads, config.head_width, config.hidden]
    found = generation(
        "step", [*inputs, x, cache.keys, cache.values], [*sizes, rows, config.max_length, FORMATS[storage]]
    )
    with torch.inference_mode():
        wanted = decoder.step(x, cache, lengths)
    assert_same(found, [wanted], 0.03 if storage == "int8" else 1e-5)


def test_products_of_training(training: Emulated) -> None:
    torch.manual_seed(0)
    for rows, inner, outputs in ((64, 96, 70), (33, 300, 128)):
        x, weight = torch.randn(rows, inner), torch.randn(outputs, inner)
        assert_same(training("product", [x, weight], [rows, inner, outputs]), [x @ weight.t()], 1e-6)


def test_attention(training: Emulated) -> None:
    torch.manual_seed(0)
    batch, length, heads, kv_heads, width = 2, 50, 4, 2, 32
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, width, requires_grad=True)
    norms = [torch.rand(width).add(0.5).requires_grad_() for _ in range(2)]
    cosines, sines = rotary(torch.arange(length)[None], torch.rand(width // 2))
    grad = torch.randn(batch, length, heads, width)
    found = training("attention", [qkv, *norms, cosines, sines, grad], [batch, length, heads, kv_heads, width])
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
    q, k = (rotate(rms_norm(part, norm, 1e-6), cosines, sines) for part, norm in zip((q, k), norms, strict=True))
    k, v = (part.repeat_interleave(heads // kv_heads, 2) for part in (k, v))
    heads_first = [part.transpose(1, 2) for part in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    gradients = torch.autograd.grad(mixed, [qkv, *norms], grad)
    assert_same(found, [mixed, gradients[0], torch.cat(gradients[1:])], 1e-5)


def test_between_the_products(training: Emulated) -> None:
    torch.manual_seed(0)
    rows, width = 7, 45
    x, grad, weight, bias = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width), torch.randn(width)
    gates = torch.randn(rows, 2 * width)
    found = training("between", [x, grad, weight, bias, gates], [rows, width])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, gates)]
    given, w, b, both = leaves
    normed = F.layer_norm(given, (width,), w, b, 1e-5)
    wanted = [normed, *torch.autograd.grad(normed, [given, w, b], grad)]
    gated = F.silu(both[:, :width]) * both[:, width:]
    wanted += [gated, *torch.autograd.grad(gated, [both], grad)]
    for approximate in ("none", "tanh"):
        curve = F.gelu(given, approximate=approximate)
        wanted += [curve, *torch.autograd.grad(curve, [given], grad)]
    losses = F.cross_entropy(given, torch.arange(rows), reduction="none", label_smoothing=0.1)
    wanted += [losses, *torch.autograd.grad(losses.sum(), [given])]
    assert_same(found, wanted, 1e-5)
