"""A real model of half a billion parameters beside transformers and llama.cpp: tokens/s at batch 1 and 8, a prompt of
512, memory.

    python bench/real_model.py MODEL_FOLDER MODEL.gguf          # Qwen2.5-0.5B or the like, and its GGUF
    python bench/real_model.py MODEL_FOLDER MODEL.gguf --memory int8   # what one process takes at most to generate

Ours keeps weights in fp32, int8 and int4 as `plait.load(..., precision=...)` does; llama.cpp in F32, Q8_0 and Q4_K_M,
made here from the GGUF file; transformers in fp32. All write the same number of ids, greedily. llama.cpp takes part
after `pip install llama-cpp-python`, which is compiled for this processor: where PLAIT_ISA caps ours it is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait  # isort: skip (before torch, which PLAIT_ISA may cap)

import numpy as np
import torch
from llama_cpp_peer import LlamaCpp
from measure import OURS, Contender, Table, compare

from plait.core import isa
from plait.core.device import threads
from plait.inference.engine import Engine
from plait.inference.requests import Request
from plait.model.multimodal import Sequence

READ, WRITE, PROMPT, BATCHES = 32, 32, 512, (1, 8)
PAIRS = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_K_M"}  # our precision -> llama.cpp's of as many bits
FILE_TYPES = {"F32": 0, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype


def quantised(source: Path, kind: str, folder: Path) -> Path:
    """The GGUF file in another precision, as llama.cpp's own tool makes it."""
    import llama_cpp

    target = folder / f"{kind}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], torch.get_num_threads()
    settings.allow_requantize = True  # for speed, what the numbers were before does not count
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not make {kind} of {source}")
    return target


def prompts(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 20_000, (rows, length))


def ours(engine: Engine, given: np.ndarray, count: int) -> Callable[[], float]:
    def work() -> float:
        requests = [
            Request(Sequence().read_ids(row.tolist()), max_new_tokens=count, min_new_tokens=count) for row in given
        ]
        results = engine.run(requests)
        return float(given.size if count == 1 else sum(len(result.samples[0].ids) for result in results))

    return work


def llamas(peer: LlamaCpp, given: np.ndarray, count: int) -> Callable[[], float]:
    def work() -> float:
        written = peer.write(given.tolist(), count)
        return float(given.size if count == 1 else sum(map(len, written)))

    return work


def transformers_of(folder: Path) -> Any:
    """The model as transformers loads it, in fp32."""
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return peer


def theirs(peer: Any, given: np.ndarray, count: int) -> Callable[[], float]:
    ids = torch.from_numpy(given)

    def work() -> float:
        written = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        return float(ids.numel() if count == 1 else written[:, ids.shape[1] :].numel())

    return work


def llama_cpp(gguf: Path, kind: str) -> LlamaCpp | None:
    """The file in a precision at work in llama.cpp; None, with a line that says why, where it cannot take part."""
    if isa.cap() is not None:
        print(f"llama.cpp is left out: {isa.VARIABLE} does not cap it.\n")
        return None
    try:
        with tempfile.TemporaryDirectory() as aside:
            return LlamaCpp.of_file(quantised(gguf, kind, Path(aside)), max(BATCHES), PROMPT + WRITE)
    except ImportError as error:
        print(f"llama.cpp is left out: {error}. To include it: pip install llama-cpp-python gguf\n")
        return None


def tables(folder: Path, gguf: Path, rounds: int, seconds: float) -> list[Table]:
    """Batch 1, batch 8 and a prompt, in each precision."""
    found = []
    for precision, kind in PAIRS.items():
        model = plait.load(str(folder), "cpu", precision).plait_model
        assert model is not None
        peer, other = llama_cpp(gguf, kind), transformers_of(folder) if precision == "fp32" else None
        tasks = [(f"batch {rows}", prompts(rows, READ), WRITE) for rows in BATCHES]
        for name, given, count in [*tasks, (f"a prompt of {PROMPT}", prompts(1, PROMPT), 1)]:
            mine = Contender(f"ours, {precision}", ours(model.engine, given, count), matmul=OURS)
            contenders = [mine]
            if peer is not None:
                contenders.append(Contender(f"llama.cpp {kind}", llamas(peer, given, count), mine.name))
            if other is not None:
                contenders.append(Contender("transformers", theirs(other, given, count), mine.name))
            title = f"{folder.name}, {name}, {precision}"
            found.append(compare(title, "tokens/s", contenders, rounds=rounds, seconds=seconds))
        if peer is not None:
            peer.close()
    return found


def memory(folder: Path, precision: str) -> None:
    """Peak resident memory of this process above `import plait, torch`, to load and to write some ids."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = plait.load(str(folder), "cpu", precision).plait_model
    assert model is not None
    ours(model.engine, prompts(1, READ), WRITE)()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{folder.name}, {precision}: {(after - before) / 1e6:.2f} GB above the libraries at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument(
        "--memory", choices=["fp32", "bf16", "fp16", "int8", "int5", "int4"], help="that of a precision alone"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    if options.memory:
        memory(options.folder, options.memory)
    else:
        tables(options.folder, options.gguf, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
