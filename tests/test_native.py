"""Compiled C++ against PyTorch: packed layers; a step of generation of every family, odd sizes, rows of unequal lengths
and both precisions; and blocks in training, with their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import plait.kernels.build
import plait.kernels.compile
from plait.core import isa
from plait.core.device import Device, compiler
from plait.inference.decoder import Decoder, Ways, copied
from plait.kernels import generation as native
from plait.kernels import linear as packed
from plait.kernels import training as in_training
from plait.kernels.choice import KERNEL
from plait.kernels.linear import PackedLinear
from plait.kernels.quantisation import STORAGES, dequantise, quantise
from plait.model.cross_entropy import total_loss
from plait.model.transformer import KVCache, Transformer, TransformerConfig, rotary_frequencies

FAMILIES = {
    "qwen3": {},
    "llama": {"qk_norm": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "gpt2": {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "qk_norm": False, "bias": True,
             "qkv_bias": True, "norm_eps": 1e-5},
    "exact gelu": {"position": "learned", "norm": "layer", "activation": "gelu", "qk_norm": False},
}  # fmt: skip
SHAPES = {
    "grouped": {"width": 96, "layers": 2, "heads": 6, "kv_heads": 2, "head_width": 24, "hidden": 88},
    "odd": {"width": 20, "layers": 2, "heads": 4, "kv_heads": 4, "head_width": 6, "hidden": 33},
    "wide heads": {"width": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 80, "hidden": 352},
}

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def portable(lanes: int) -> isa.Level:
    """The arithmetic of a processor with so many lanes, in the compiler's own vectors."""
    return isa.Level(f"portable{lanes}", "any", lanes, (f"-DPLAIT_LANES={lanes}", "-O1"), frozenset())


LEVELS = {"here": None, **{f"{lanes} lanes": portable(lanes) for lanes in (4, 8, 16)}}


def backbone(shape: dict, family: dict) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(max_length=64, **shape, **family)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


def decoder(shape: dict, family: dict, dtype: torch.dtype) -> Decoder:
    made = Decoder(backbone(shape, family), Device("cpu", dtype), Ways.all(KERNEL))
    assert made.native is not None
    return made


def filled(made: Decoder, lengths: np.ndarray, dtype: torch.dtype) -> KVCache:
    """A cache with something in it, and a row more than is used."""
    cache = KVCache(made.config, len(lengths) + 1, 32, torch.device("cpu"), dtype)
    torch.manual_seed(1)
    cache.keys.copy_(torch.randn(cache.keys.shape))
    cache.values.copy_(torch.randn(cache.values.shape))
    cache.lengths[:-1] = torch.from_numpy(lengths)
    return cache


def steps(made: Decoder, cache: KVCache, lengths: np.ndarray, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    found = []
    with torch.inference_mode():
        for at, x in enumerate(inputs):
            found.append(made.step(x, cache, lengths + at).float())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_pytorch(family, shape, dtype):
    made = decoder(SHAPES[shape], FAMILIES[family], dtype)
    for rows in (1, 4, 7, 18, 37):
        lengths = np.random.default_rng(rows).integers(0, 20, rows)
        inputs = [torch.randn(rows, made.config.width).to(dtype) for _ in range(3)]
        ours, plain = filled(made, lengths, dtype), filled(made, lengths, torch.float32)
        found = steps(made, ours, lengths, inputs)
        compiled, made.native, made.cache_dtype = made.native, None, torch.float32
        wanted = steps(made, plain, lengths, inputs)
        made.native = compiled
        bound = 1e-5 if dtype is torch.float32 else 0.06  # some last places of bf16
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=bound, rtol=bound)
        torch.testing.assert_close(ours.keys.float(), plain.keys.to(dtype).float(), atol=bound, rtol=bound)
        assert torch.equal(ours.lengths, plain.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_a_step_with_any_lanes(lanes, dtype):
    """The same step in portable vectors of each length, and in int8: what other processors run."""
    lengths = np.array([0, 17, 5])
    for family, shape in (("qwen3", "grouped"), ("gpt2", "odd"), ("llama", "wide heads")):
        made = decoder(SHAPES[shape], FAMILIES[family], dtype)
        assert made.native is not None
        expected = steps(made, filled(made, lengths, dtype), lengths, [torch.ones(3, made.config.width).to(dtype)])
        for storage in ("fp32" if dtype is torch.float32 else "bf16", "int8"):
            level = portable(lanes)

            def pack(layer, storage=storage, level=level):
                return PackedLinear(layer.weight, layer.bias, storage, level)

            network = copied(backbone(SHAPES[shape], FAMILIES[family]), pack, dtype, torch.device("cpu"))
            frequencies = rotary_frequencies(made.config) if made.config.position == "rotary" else None
            made.native = native.NativeStep(native.library(level), network, dtype, frequencies)
            cache = filled(made, lengths, dtype)
            found = steps(made, cache, lengths, [torch.ones(3, made.config.width).to(dtype)])
            difference = (found[0] - expected[0]).norm() / expected[0].norm()
            assert difference < (0.05 if storage == "int8" else 1e-5 if dtype is torch.float32 else 0.02)


def test_an_unknown_switch_is_left_to_pytorch():
    class Newer(TransformerConfig):
        logit_softcap: float = 0.0
        local_sinks: tuple[int, ...] = ()

    shape = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16, "hidden": 64, "max_length": 32}
    assert native.supports(Newer(**shape)) and native.supports(Newer(**shape, logit_softcap=0.0))
    assert not native.supports(Newer(**shape, logit_softcap=30.0)) and not native.supports(
        Newer(**shape, local_sinks=(1,))
    )
    refused = ({"post_norm": True}, {"embed_scale": 2.0}, {"layers_without_rotary": [0]}, {"activation": "geglu_tanh"})
    assert not any(native.supports(TransformerConfig(**shape, **switch)) for switch in refused)


def test_a_row_does_not_depend_on_its_company():
    made = decoder(SHAPES["grouped"], FAMILIES["qwen3"], torch.float32)
    lengths = np.random.default_rng(0).integers(0, 20, 37)
    inputs = [torch.randn(37, made.config.width)]
    together = steps(made, filled(made, lengths, torch.float32), lengths, inputs)[0]
    assert made.native is not None
    for row in (0, 5, 36):
        cache = filled(made, lengths, torch.float32)
        cache.copy([row], [37], 32)
        alone = KVCache(made.config, 1, 32, torch.device("cpu"), torch.float32)
        alone.keys.copy_(cache.keys[:, row : row + 1])
        alone.values.copy_(cache.values[:, row : row + 1])
        alone.lengths[0] = int(lengths[row])
        assert torch.equal(steps(made, alone, lengths[row : row + 1], [inputs[0][row : row + 1]])[0][0], together[row])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("level", LEVELS)
def test_linear(level, storage):
    """A packed layer against PyTorch on the same numbers: few rows and many, sizes that fill no panel, both precisions
    of inputs; a row is the same in any company."""
    torch.manual_seed(0)
    for outputs, inputs in ((70, 45), (96, 352)):
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        layer = PackedLinear(weight, bias, storage, LEVELS[level])
        plain = dequantise(quantise(weight, storage), inputs)
        assert torch.equal(layer.dense(), plain)
        ids = torch.tensor([outputs - 1, 0, 33])
        assert torch.equal(layer.rows(ids), plain[ids])
        bound = 0.01 if storage.startswith("int") else 1e-6  # inputs are rounded to 8 bits
        for rows in (1, 2, 3, 6, 13, 33, 200):
            x = torch.randn(rows, inputs)
            expected = torch.nn.functional.linear(x, plain, bias)
            product = layer(x)
            assert (product - expected).norm() <= bound * expected.norm()
            assert torch.equal(layer(x[-1:])[0], product[-1])
            halved = layer(x.bfloat16())
            assert halved.dtype is torch.bfloat16 and (halved - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("storage", ["fp32", "int8", "int4"])
def test_linear_without_a_kernel(storage, monkeypatch):
    """PyTorch computes the same from the same numbers, and gradients reach the input."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 70), torch.randn(40), torch.randn(2, 5, 70, requires_grad=True)
    here = PackedLinear(weight, bias, storage)
    monkeypatch.setattr(packed, "library", lambda level=None: None)
    plain = PackedLinear(weight, bias, storage)
    assert torch.equal(here.dense(), plain.dense())
    assert (here(x) - plain(x)).norm() < 0.01 * plain(x).norm()
    here(x).sum().backward()
    torch.testing.assert_close(x.grad, here.dense().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads, monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(70, 45)
        for storage in STORAGES:
            layer = PackedLinear(weight, None, storage)
            for rows in (1, 6, 33, 3):
                x = torch.randn(rows, 45)
                expected = torch.nn.functional.linear(x, layer.dense())
                assert (layer(x) - expected).norm() <= 0.01 * expected.norm()
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler(monkeypatch, caplog, tmp_path):
    """PyTorch's step takes over: without a compiler, with one that fails or hangs, and where it is asked for. A failure
    is remembered and told with its reason."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = Device("cpu", torch.float32)
    monkeypatch.setattr(plait.kernels.build, "compiler", lambda: None)
    _forget()
    assert native.library() is None and "no C++ compiler" in native.backend_name(device)
    assert in_training.library() is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken, runs = tmp_path / "broken", tmp_path / "runs"
    for script, reason in (
        (f"echo run >> {runs}; echo no such thing >&2; exit 1", "no such thing"),
        (f"echo run >> {runs}; sleep 60 & wait", "did not end"),
    ):
        broken.write_text(f"#!/bin/sh\n{script}\n")
        broken.chmod(0o700)
        monkeypatch.setenv("CXX", str(broken))
        monkeypatch.setattr(plait.kernels.compile, "COMPILE_SECONDS", 0.5)
        runs.unlink(missing_ok=True)
        counts = []
        for _ in range(2):
            _forget()
            assert native.library() is None and reason in plait.kernels.build.kernel("generation").reason
            counts.append(len(runs.read_text().splitlines()))
        assert counts[0] == counts[1]
    assert "could not be compiled" in caplog.text
    monkeypatch.setenv("PLAIT_NATIVE", "0")
    _forget()
    plain = Decoder(Transformer(TransformerConfig(max_length=64, **SHAPES["odd"])).eval(), device)
    assert (
        plain.native is None and len(steps(plain, plain.cache(1, 8), np.zeros(1, np.int64), [torch.randn(1, 20)])) == 1
    )
    assert "PyTorch" in in_training.backend_name(Device("cpu", torch.bfloat16))
    _forget()


def test_where_binaries_lie(monkeypatch, tmp_path):
    """A wrapped compiler works; where others may write to the cache, a folder of one's own serves."""
    wrapper, temporary = tmp_path / "wrapper", tmp_path / "tmp"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o700)
    temporary.mkdir()
    monkeypatch.setenv("CXX", f"{wrapper} {' '.join(compiler() or [])}")
    monkeypatch.setattr(plait.kernels.compile, "FLAGS", (*plait.kernels.compile.FLAGS, "-O0"))
    monkeypatch.setattr(plait.kernels.build.tempfile, "gettempdir", lambda: str(temporary))
    shared = tmp_path / "shared"
    (shared / "plait" / "native").mkdir(parents=True)
    (shared / "plait" / "native").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
    _forget()
    assert native.library() is not None
    assert not list(shared.rglob("*.so")) and len(list(temporary.rglob("generation-*.so"))) == 1
    (made,) = temporary.rglob("*.so")
    made.unlink()  # not written over: it is mapped
    made.write_bytes(b"planted")
    made.chmod(0o777)  # by anybody: it is made anew, not loaded
    _forget()
    assert native.library() is not None and made.stat().st_size > 1000
    _forget()


def _forget() -> None:
    for found in (plait.kernels.build.kernel, packed.library, native.library, in_training.library):
        found.cache_clear()


halved = pytest.mark.skipif(
    not (in_training.library() and in_training.library().plait_products()),
    reason="the processor does not multiply bf16",
)
BLOCKS = {
    "qwen3": {"heads": 4, "kv_heads": 4, "head_width": 32},
    "grouped": {"heads": 6, "kv_heads": 2, "head_width": 32},
    "llama": {"heads": 2, "kv_heads": 1, "head_width": 64, "qk_norm": False},
    "learned positions": {"heads": 2, "kv_heads": 2, "head_width": 96, "position": "learned"},
    "gpt2": {"heads": 2, "kv_heads": 2, "head_width": 32, **FAMILIES["gpt2"]},
}


@halved
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", BLOCKS)
def test_training_as_pytorch(family, threads, monkeypatch):
    """Losses and gradients lie no further from those of fp32 than PyTorch's own in bf16 do."""
    monkeypatch.setattr(in_training, "SMALL", 0)
    shape = BLOCKS[family]
    config = TransformerConfig(width=72, layers=2, hidden=100, max_length=128, **shape)
    torch.manual_seed(0)
    network = Transformer(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def gradients(native: bool, dtype: torch.dtype, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        network.zero_grad()
        with monkeypatch.context() as patch, Device("cpu", dtype).autocast():
            if not native:
                patch.setattr(in_training, "library", lambda: None)
            assert in_training.supports_attention(x, config.head_width) == native
            out = network(x, positions=torch.arange(x.shape[1]) + torch.arange(len(x))[:, None])
            out.float().backward(grad)
        return [out.detach().float(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, length in ((3, 1), (2, 50), (1, 96), (2, 128)):
            x, grad = torch.randn(batch, length, 72), torch.randn(batch, length, 72)
            exact = gradients(False, torch.float32, x, grad)
            found, plain = (gradients(native, torch.bfloat16, x, grad) for native in (True, False))
            for a, b, c in zip(found, plain, exact, strict=True):
                assert (a - c).norm() <= 1.25 * (b - c).norm() + 0.002 * c.norm() + 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ours", [True, False], ids=["our products", "torch's"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", [*BLOCKS, "exact gelu"])
def test_training_in_fp32(family, threads, ours, monkeypatch):
    """Losses and gradients are those of PyTorch up to rounding; heads that no kernel takes go through PyTorch."""
    monkeypatch.setattr(in_training, "SMALL", 0)
    monkeypatch.setattr(in_training, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(in_training, "FEWEST", 1)
    monkeypatch.setattr(in_training, "multiplies", lambda: ours)
    shape = BLOCKS.get(family) or {"heads": 2, "kv_heads": 2, "head_width": 24, **FAMILIES[family]}
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(width=72, layers=2, hidden=100, max_length=128, **shape))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def gradients(native: bool, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        network.zero_grad()
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(in_training, "library", lambda: None)
                patch.setattr(in_training, "multiplies", lambda: False)
            assert in_training.supports(x) == native
            out = network(x, positions=torch.arange(x.shape[1]) + torch.arange(len(x))[:, None])
            out.backward(grad)
        return [out.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, length in ((2, 50), (1, 96), (2, 128)):
            x, grad = torch.randn(batch, length, 72), torch.randn(batch, length, 72)
            for a, b in zip(gradients(True, x, grad), gradients(False, x, grad), strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_tokens_in_fp32(smoothing, monkeypatch):
    torch.manual_seed(0)
    hidden, table, targets = 2 * torch.randn(70, 24), torch.randn(300, 24), torch.randint(300, (70,))
    found = []
    for native_loss in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, table)]
        with monkeypatch.context() as patch:
            if not native_loss:
                patch.setattr(in_training, "library", lambda: None)
            loss = total_loss(*leaves, targets, smoothing)
        (loss / 7).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


@halved
def test_dropout_of_attention():
    """Which chances are taken is seen where they are all alike and values are unit vectors; the rest follows."""
    heads, share = 3, 0.3

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        with Device("cpu", torch.bfloat16).autocast():
            return in_training.attention(qkv, None, None, heads, 1e-6, share)

    seen = torch.zeros(2, 32, 3 * heads, 32)
    seen[:, :, 2 * heads :] = torch.eye(32)[:, None]
    kept = attend(seen).float().transpose(1, 2) * torch.arange(1, 33)[:, None]  # (B, H, L, T)
    taken = (kept == 0)[..., torch.ones(32, 32).tril().bool()].float()
    assert abs(taken.mean() - share) < 4 * (share * (1 - share) / taken.numel()) ** 0.5
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - share)), rtol=0.01)
    assert len({tuple(head.flatten().tolist()) for head in kept.flatten(0, 1)}) == 2 * heads

    qkv, grad = torch.randn(2, 32, 3 * heads, 32), torch.randn(2, 32, heads, 32)
    mine, plain = (qkv.clone().requires_grad_() for _ in range(2))
    found = attend(mine).float()
    q, k, v = plain.bfloat16().float().transpose(1, 2).split(heads, 1)
    hidden = torch.ones(32, 32).triu(1).bool()
    chances = (q @ k.transpose(-1, -2) / 32**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = (chances * kept @ v).transpose(1, 2)
    for out in (found, wanted):
        out.backward(grad)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert (mine.grad - plain.grad).norm() < 0.01 * plain.grad.norm()


@halved
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [5, 300])
def test_the_loss_of_tokens(rows, smoothing, monkeypatch):
    torch.manual_seed(0)
    hidden, table = 2 * torch.randn(70, 24), torch.randn(rows, 24)
    targets = torch.randint(rows, (70,))

    def gradients(native: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, table)]
        with monkeypatch.context() as patch, Device("cpu", dtype).autocast():
            if not native:
                patch.setattr(in_training, "library", lambda: None)
            loss = total_loss(leaves[0].to(dtype), leaves[1], targets, smoothing)
        (loss / 7).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    exact, plain, found = (
        gradients(*how) for how in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16))
    )
    for a, b, c in zip(found, plain, exact, strict=True):
        assert (a - c).norm() <= 1.25 * (b - c).norm() + 0.002 * c.norm()


@halved
def test_recomputed_and_moved():
    """What the backward pass reads may lie elsewhere than in the forward pass, and weights may be bf16 (FSDP)."""
    torch.manual_seed(0)
    shape = {"heads": 4, "kv_heads": 2, "head_width": 32}
    network = Transformer(TransformerConfig(width=72, layers=3, hidden=100, max_length=128, **shape))
    x, grad = torch.randn(4, 100, 72), torch.randn(4, 100, 72)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        given = x.clone().requires_grad_()
        with Device("cpu", torch.bfloat16).autocast():
            network(given).float().backward(grad)
        return [given.grad, *(p.grad for p in network.parameters())]

    wanted = gradients()
    network.set_activation_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))
    network.set_activation_checkpointing(False)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))
    network.bfloat16()
    for a, b in zip(gradients(), wanted, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


@halved
def test_what_is_not_finite_shows():
    gates = torch.tensor([-1000.0, -89.0, 3.0, torch.nan, torch.inf, 1.0, 1.0, 1.0, 1.0, 1.0])[None].requires_grad_()
    out = in_training.gate(gates)
    out[0, :3].sum().backward()
    assert torch.allclose(out[0, :3].float(), torch.tensor([0.0, 0.0, 2.86]), atol=0.01)
    assert out[0, 3].isnan() and out[0, 4].isinf() and gates.grad[0, [0, 1, 2]].isfinite().all()
    with Device("cpu", torch.bfloat16).autocast():
        hidden, rows = torch.randn(3, 8).bfloat16(), torch.randn(5, 8, requires_grad=True)
        hidden[1, 2] = torch.nan
        assert total_loss(hidden, rows, torch.tensor([0, 1, 2])).isnan()
        with pytest.raises(IndexError, match="outside of the 5 rows"):
            total_loss(hidden, rows, torch.tensor([0, 5, 2]))
