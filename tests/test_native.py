"""The compiled step against PyTorch's: every family, odd sizes, rows of unequal lengths, both precisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.generation import native
from plait.generation.decoder import Decoder
from plait.model.transformer import KVCache, Transformer, TransformerConfig
from plait.runtime import Device, compiler

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


def decoder(shape: dict, family: dict, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(max_length=64, **shape, **family)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    made = Decoder(network, Device("cpu", dtype))
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


@pytest.mark.parametrize("threads", [1, 2])
def test_linear(threads, monkeypatch):
    monkeypatch.setattr(native, "SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, bias = torch.randn(70, 45), torch.randn(70)
        for dtype in (torch.float32, torch.bfloat16):
            product = native.NativeLinear(native.library(), weight, dtype, bias)
            for rows in (1, 6, 33, 3):
                x = torch.randn(rows, 45).to(dtype)
                wanted = torch.nn.functional.linear(x.double(), weight.to(dtype).double(), bias.double())
                torch.testing.assert_close(product(x).double(), wanted, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler(monkeypatch, caplog, tmp_path):
    """PyTorch's step takes over: where nothing compiles, where the source does not, and where it is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = Device("cpu", torch.float32)
    broken = tmp_path / "broken.cpp"
    broken.write_text("int plait_step( {")
    for name, value in (("SOURCE", broken), ("compiler", lambda: None)):
        with monkeypatch.context() as patch:
            patch.setattr(native, name, value)
            native.library.cache_clear()
            assert native.library() is None and "PyTorch" in native.chosen(device)
    assert "could not be compiled" in caplog.text
    monkeypatch.setenv("PLAIT_NATIVE", "0")
    native.library.cache_clear()
    torch.manual_seed(0)
    plain = Decoder(Transformer(TransformerConfig(max_length=64, **SHAPES["odd"])).eval(), device)
    assert (
        plain.native is None and len(steps(plain, plain.cache(1, 8), np.zeros(1, np.int64), [torch.randn(1, 20)])) == 1
    )
    native.library.cache_clear()
