"""The precisions that weights are kept in, and how they are rounded to int8, int4 and int5.

Such weights have a scale for each 32 inputs of an output, int4 an offset too; both are bf16, so that an int8 weight
takes 8.5 bits and an int4 weight 5. int5 is Q5_0 of GGUF files, -16 to 15 times a scale in fp16: 5.5 bits. `linear.py`
has the layers that compute with such weights, `generation.cpp` their kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STORAGES = ("fp32", "bf16", "fp16", "int8", "int4", "int5")  # as `Format` in generation.cpp
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUP = 32  # inputs that share a scale


def quantise(weight: Tensor, storage: str) -> dict[str, Tensor]:
    """A weight (O, I) as PyTorch keeps it where there is no kernel: "weight" in its storage, or "numbers" (O, G, 32) in
    uint8 with "scale" in 16 bit and "offset" (O, G, 1); the inputs are filled up with zeros to G groups."""
    if storage in DTYPES:
        return {"weight": weight.to(DTYPES[storage])}
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    if storage == "int8":
        scale, offset = torch.maximum(high, -low) / 127, torch.zeros_like(low)
        least, most = -127, 127
    elif storage == "int5":
        scale, offset = torch.where(high > -low, high, low) / -16, torch.zeros_like(low)
        least, most = -16, 15
    else:
        scale, offset, least, most = (high - low) / 15, low, 0, 15
    scale, offset = scale.to(torch.float16 if storage == "int5" else torch.bfloat16), offset.bfloat16()
    unit = scale.float()
    numbers = torch.where(unit != 0, (groups - offset.float()) / unit, 0).round().clamp(least, most)
    if least < 0:
        offset = least * unit  # numbers are kept from 0 on
        numbers = numbers - least
    return {"numbers": numbers.to(torch.uint8), "scale": scale, "offset": offset.to(torch.float32)}


def dequantise(parts: dict[str, Tensor], inputs: int) -> Tensor:
    """What `quantise` keeps, as a weight (O, I) in fp32."""
    if "weight" in parts:
        return parts["weight"].float()
    return (parts["numbers"] * parts["scale"].float() + parts["offset"]).flatten(1)[:, :inputs]
