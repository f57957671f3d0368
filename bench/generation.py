"""Generation: our engine beside `transformers.generate` on the same weights, greedy, 32 ids read and 128 written.

The note shows the share of ids that both wrote alike: 100 % in fp32, less in bf16, where near ties fall either way.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from llama_cpp_peer import LlamaCpp
from measure import OURS, Contender, Table, compare
from training import Shape, as_transformers, make_model, text_checkpoint

from plait.core.device import choose_device
from plait.inference.engine import Engine
from plait.inference.requests import Request
from plait.kernels import generation as native
from plait.model.multimodal import Sequence

READ, WRITE = 32, 128
BATCHES = (1, 8, 32)


def weights_read(model: Any) -> int:
    """Parameters that one step for one row must read: the backbone, and the rows it predicts with."""
    return sum(p.numel() for part in (model.backbone, model.output_embedding) for p in part.parameters())


def tables(
    shape: Shape, device_name: str, precision: str, compiled: bool, bandwidth: float, write: int = WRITE, **timing: Any
) -> list[Table]:
    """One table a batch size; `bandwidth` in bytes/s, `write` ids a row."""
    device = choose_device(device_name, precision)
    model = make_model(shape, "Qwen3", tied=False, length=max(shape.length, READ + write)).eval()
    with torch.no_grad():  # the end and padding, which our grammar keeps out here, never win in the peers either
        model.output_embedding.free[model.vocabulary.text :] = 0
    checkpoint = text_checkpoint(model)
    peer = as_transformers(checkpoint, device.dtype).to(device.torch).eval()
    peer.generation_config = type(peer.generation_config)(
        do_sample=False, max_new_tokens=write, eos_token_id=None, pad_token_id=shape.vocabulary - 1
    )
    llama = LlamaCpp.of(checkpoint, precision, max(BATCHES)) if device.name == "cpu" else None
    model.to(device.torch)
    engine = Engine(checkpoint, device)
    with mock.patch.object(native, "library", return_value=None):
        plain = Engine(checkpoint, device)
    small = Engine(checkpoint, choose_device("cpu", "int8")) if device.name == "cpu" and precision == "fp32" else None
    limit = bandwidth / (weights_read(model) * device.dtype.itemsize)
    found = []
    for rows in BATCHES:
        prompts = np.random.default_rng(0).integers(0, shape.vocabulary - 2, (rows, READ))
        ids = torch.from_numpy(prompts).to(device.torch)

        def ours(prompts: np.ndarray = prompts, engine: Engine = engine) -> list[list[int]]:
            requests = [Request(Sequence().read_ids(p.tolist()), max_new_tokens=write) for p in prompts]
            return [result.samples[0].ids for result in engine.run(requests)]

        def theirs(ids: torch.Tensor = ids, **options: Any) -> list[list[int]]:
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
            return out[:, READ:].tolist()

        def llamas(prompts: np.ndarray = prompts) -> list[list[int]]:
            assert llama is not None
            return llama.write(prompts.tolist(), write)

        def contender(name: str, writes: Any, matmul: str, wanted: list[list[int]] | None = None) -> Contender:
            """Counts what was written; says how much of it is as `wanted`."""
            against = note = ""
            if wanted is not None:
                torch.set_float32_matmul_precision(matmul)
                alike = np.mean(np.array(writes()) == np.array(wanted))
                against, note = "ours", f"{alike:.0%} of ids alike"
            return Contender(name, lambda: float(sum(map(len, writes()))), against, matmul, note)

        torch.set_float32_matmul_precision(OURS)
        written = ours()
        assert all(len(row) == write for row in written)
        contenders = [
            contender("ours", ours, OURS),
            contender("transformers", theirs, "highest", written),
        ]
        if device.dtype is torch.float32 and OURS != "highest":
            contenders.append(contender(f"transformers, products at '{OURS}' as ours", theirs, OURS, written))
        if compiled:
            fast = lambda: theirs(cache_implementation="static")  # noqa: E731 (it compiles the model on a GPU by itself)
            contenders.append(contender("transformers, static cache", fast, "highest", written))
        if device.name == "cpu":
            contenders.append(contender("ours, PyTorch alone", lambda ours=ours: ours(engine=plain), OURS, written))
        if small is not None:
            contenders.append(contender("ours, int8", lambda ours=ours: ours(engine=small), OURS, written))
        if llama is not None:
            contenders.append(contender("llama.cpp", llamas, "highest", written))
        note = ", ".join(f"batch {rows} {way}" for rows, way in engine.decoder.ways.steps.items())
        contenders[0].note = f"measured choice: {note}"
        title = f"Generation {shape.name}, batch {rows}, {precision}"
        share = ("of bandwidth limit", limit) if rows == 1 else ("", 0.0)
        found.append(compare(title, "tokens/s", contenders, device.name, share, **timing))
    return found
