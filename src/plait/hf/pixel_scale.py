"""Whether a vision encoder's files say rightly how its pixels are scaled: a first batch norm remembers what came to it
in pretraining, and images that are scaled otherwise do not look like that.

Shapes: N images, K channels behind the first convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ODD = 0.3  # nats by which the statistics must differ before the files are doubted
SURELY = 0.1  # share of that which another scale must leave


@dataclass(frozen=True)
class PixelScale:
    """Mean and deviation of pixels in [0, 1], of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"mean {_told(self.mean)} and deviation {_told(self.std)}"


USUAL = (
    PixelScale((0.5,) * 3, (0.5,) * 3),
    PixelScale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    PixelScale((0.0,) * 3, (1.0,) * 3),
)


def _told(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in dict.fromkeys(values))


def better_scale(network: nn.Module, pixels: Tensor, known: PixelScale) -> PixelScale | None:
    """The usual scale that fits a network's first batch norm far better than the `known` one; None where none does, or
    the network has no such norm. `pixels` are images (N, 3, H, W) in [0, 1]."""
    first = next((module for module in network.modules() if isinstance(module, nn.BatchNorm2d)), None)
    if first is None or first.running_var is None:
        return None
    own = _difference(network, first, pixels, known)
    if own < ODD:
        return None
    others = {scale: _difference(network, first, pixels, scale) for scale in USUAL if scale != known}
    best = min(others, key=lambda scale: others[scale])
    return best if others[best] < SURELY * own else None


def _difference(network: nn.Module, norm: nn.BatchNorm2d, pixels: Tensor, scale: PixelScale) -> float:
    """The median over channels of the divergence, in nats, of what the norm gets from what it remembers, as normal
    distributions."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _SeenError

    handle = norm.register_forward_pre_hook(see)
    mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (scale.mean, scale.std))
    try:
        with torch.no_grad():
            network(pixel_values=(pixels - mean) / std)
    except _SeenError:
        pass
    finally:
        handle.remove()
    assert norm.running_mean is not None and norm.running_var is not None
    alive = norm.running_var > 1e-3 * norm.running_var.median()  # a channel that never moved tells nothing
    shift = seen[0].mean((0, 2, 3)) - norm.running_mean
    ratio = seen[0].var((0, 2, 3)) / norm.running_var
    divergence = 0.5 * (ratio - 1 - ratio.clamp(min=1e-12).log() + shift.square() / norm.running_var)
    return float(divergence[alive].median())


class _SeenError(Exception):
    """The first norm was reached."""
