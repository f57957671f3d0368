"""Finite scalar quantisation: a vector of few bounded numbers, each rounded to one of few levels, is a code.

Mentzer, Minnen, Agustsson and Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple" (2023). No codebook to
learn, no commitment loss, and the digits of a code say which codes are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Quantises (..., len(levels)) to one integer below `size` = prod(levels); has no parameters."""

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.size = math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        places = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        self.register_buffer("places", places, persistent=False)

    def quantize(self, x: Tensor) -> Tensor:
        """Unbounded x to the nearest levels, in [-1, 1]; gradients pass straight through the rounding."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        bounded = torch.tanh(x + shift) * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / (self.levels // 2)

    def codes(self, quantized: Tensor) -> Tensor:
        """Quantised vectors (..., digits) to integers (...)."""
        half = self.levels // 2
        return ((quantized * half + half).round().long() * self.places).sum(-1)

    def digits(self, codes: Tensor) -> Tensor:
        """Integers (...) to the level number of each digit, (..., digits)."""
        return codes[..., None] // self.places % self.levels

    def vectors(self, codes: Tensor) -> Tensor:
        """Integers (...) to quantised vectors (..., digits)."""
        half = self.levels // 2
        return (self.digits(codes) - half) / half
