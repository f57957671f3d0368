"""What pretrained weights cost and give: LoRA's speed and memory beside transformers with PEFT, and more below.

    python bench/pretrained.py lora MODEL [--rounds 3] [--batch 4] [--length 512]

MODEL is a folder of a causal language model. PLAIT_ISA=avx2 caps the instructions of both.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

from plait.core import isa

isa.cap()  # PLAIT_ISA, before torch loads

import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def lora_ours(model: Path, ids: Tensor, rank: int) -> Any:
    """A step of `plait train --lora` on sequences (B, L), all of whose tokens are learned."""
    from plait.core.device import Device, keep_memory
    from plait.hf.huggingface import load
    from plait.model import lora
    from plait.model.extend import extend_frozen
    from plait.model.objectives import total_loss
    from plait.training.optimizer import make_optimizer

    keep_memory()
    source = load(model, compact=True)
    network = extend_frozen(source, source.model.config).requires_grad_(False)
    lora.adapt(network.backbone, rank, 2.0 * rank)
    optimizer = make_optimizer([network], 1e-4, 0.0, (0.9, 0.98))
    device = Device("cpu", torch.float32)
    table = network.token_embedding.split_table()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with device.autocast():
            hidden = network.backbone(table.rows(ids.flatten()).view(*ids.shape, -1))
            loss = total_loss(hidden[:, :-1].flatten(0, 1), table, ids[:, 1:].flatten()) / ids[:, 1:].numel()
            loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def lora_theirs(model: Path, ids: Tensor, rank: int, dtype: torch.dtype) -> Any:
    """The same step in transformers and PEFT."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    network = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def lora(arguments: argparse.Namespace) -> None:
    ids = torch.randint(1000, 50_000, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0))
    makers = {
        "plait": lambda: lora_ours(arguments.model, ids, 8),
        "peft fp32": lambda: lora_theirs(arguments.model, ids, 8, torch.float32),
        "peft bf16": lambda: lora_theirs(arguments.model, ids, 8, torch.bfloat16),
    }
    steps = {}
    for name in arguments.who.split(","):
        steps[name] = makers[name]()
        print(f"{name}: loss {steps[name]():.4f}, peak memory {_peak():.2f} GB", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            begun = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            step()
            ended = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            rates[name].append(ids.numel() / (ended - begun))
            print(f"{name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    for name in rates if arguments.rounds else ():
        ratio = median(a / b for a, b in zip(rates["plait"], rates[name], strict=True)) if "plait" in rates else 0
        print(f"{name}: {median(rates[name]):.1f} tokens/s, plait / this {ratio:.2f}")
    print(f"peak memory {_peak():.2f} GB")


def _peak() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("lora")
    one.add_argument("model", type=Path)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--batch", type=int, default=4)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--who", default="plait,peft fp32", help="plait, peft fp32, peft bf16")
    one.set_defaults(run=lora)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
