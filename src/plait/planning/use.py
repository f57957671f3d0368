"""What using a pretrained model takes of this machine: memory and speed in each precision, before a weight is read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.system import available_memory
from plait.hf.catalogue import LocalModel, models
from plait.inference.memory import BESIDE, BYTES
from plait.kernels.linear import PackedLinear
from plait.planning.networks import Network

SIDE = 6144  # of the matrix that stands for a model's: larger than the processor's caches, in int8 too
PROMPT = 256  # rows that are multiplied at once for a prompt's speed
LENGTH = 2048  # tokens whose keys and values are counted
SECONDS = 0.4  # that each speed is measured for
ATTAINED = 0.65  # of the speed of its products alone, which generation of one text reaches (bench/real_model.py)


def use_here(network: Network) -> list[dict[str, Any]]:
    """For each precision: bytes of weights and in use, whether they fit, and tokens/s of writing one text and of
    reading a prompt, estimated from products of one matrix measured here. Attention over long texts takes more."""
    tokens = min(network.config.backbone.max_length, LENGTH)
    multiplied = network.parameters - (0 if network.config.tied else network.parts["token embedding"])
    inner = network.parts["attention"] + network.parts["feed-forward"]  # of a prompt the last token alone is scored
    free, rows = available_memory(), []
    for precision in BYTES:
        weights = network.parameters * BYTES[precision]
        in_use = weights * BESIDE + network.cache_a_token(4) * tokens
        one, many = _product_seconds(precision)
        writing, reading = one / SIDE**2 * multiplied / ATTAINED, many / PROMPT / SIDE**2 * inner
        rows.append(
            {
                "precision": precision, "weights": weights, "in use": in_use, "fits": in_use <= free,
                "tokens/s": 1 / writing, "prompt tokens/s": 1 / reading,
            }
        )  # fmt: skip
    return rows


def _product_seconds(precision: str) -> tuple[float, float]:
    """Seconds of a product of a SIDE x SIDE matrix with one row, and with PROMPT rows."""
    layer = PackedLinear(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)), None, precision)
    seconds = []
    with torch.inference_mode():
        for rows in (1, PROMPT):
            x = torch.randn(rows, SIDE)
            times: list[float] = []
            layer(x)
            begun = time.perf_counter()
            while len(times) < 3 or time.perf_counter() - begun < SECONDS:
                start = time.perf_counter()
                layer(x)
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
    return seconds[0], seconds[1]


def encoder_plan(source: str) -> dict[str, Any] | None:
    """The plan of a folder whose model is no language model of our engine: what it weighs; None for no such folder."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") == "plait":
        return None
    matching = [one for one in models([folder], cache=False) if one.folder == folder and not one.writes]
    return _facts(matching[0]) if matching else None


def _facts(model: LocalModel) -> dict[str, Any]:
    if not model.verbs:
        raise PlaitError(f"{model.name}: no use is made here of a model of type '{model.model_type}'.")
    free = available_memory()
    rows = []
    for precision in ("fp32", "bf16"):
        weights = model.parameters * BYTES[precision]
        rows.append(
            {"precision": precision, "weights": weights, "in use": weights * BESIDE, "fits": weights * BESIDE <= free}
        )
    return {
        "network": model.name,
        "parameters": model.parameters,
        "warnings": [],
        "use": rows,
        "what for": {"type": model.model_type, "licence": model.licence or "not said", "verbs": list(model.verbs)},
    }
