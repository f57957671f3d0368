"""Networks that recognise: residual convolutions with a linear head for each column of labels, trained on the labels
directly, then frozen. The backbone reads what they see, in an encoder's place.

Batch statistics are used while the recogniser itself is trained, by one process; everywhere else they are frozen.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.2  # of what the heads read
SEGMENTS = 6  # of a clip, relative to its length, whose means the heads read
UNHEARD = 0.3  # share of the clips whose mean spectrum is kept from a network that learns, so that it needs none


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm."""

    def __init__(self, before: int, after: int, stride: int | tuple[int, int] = 1) -> None:
        super().__init__(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after))


class ResidualBlock(nn.Module):
    """silu(x + norm(conv(silu(norm(conv(x)))))); the last norm begins at zero (He et al., 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(width, width), ConvNorm(width, width)
        nn.init.zeros_(next(self.second[1].parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.second(F.silu(self.first(x))))


class Recogniser(nn.Module):
    """What images and audio clips share: the switch between training and use, and the heads."""

    optimizer_groups: ClassVar = {"places": "no_decay"}

    trunk: nn.ModuleList
    heads: nn.ModuleList

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        self.columns = list(classes)
        self.learning = False

    def _frozen(self) -> None:
        """Called once everything is built: nothing but the way into the backbone is trained from outside."""
        self.trunk.requires_grad_(False)
        self.heads.requires_grad_(False)

    def learn(self, learning: bool) -> Recogniser:
        """Whether trunk and heads are being trained, on labels; else they are as in use."""
        self.learning = learning
        self.trunk.requires_grad_(learning).train(learning)
        self.heads.requires_grad_(learning).train(learning)
        return self

    def train(self, mode: bool = True) -> Recogniser:
        super().train(mode)
        self.trunk.train(self.learning)
        self.heads.train(self.learning)
        return self

    def pooled(self, values: Tensor, lengths: Tensor) -> Tensor:
        """What the heads read, (N, F)."""
        raise NotImplementedError

    def logits(self, values: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Column -> (N, classes)."""
        pooled = F.dropout(self.pooled(values, lengths), DROPOUT, self.learning)
        return {column: head(pooled) for column, head in zip(self.columns, self.heads, strict=True)}


class ImageRecogniser(Recogniser):
    """(N, H, W, C) pixels to (N, grid * grid, D), and to logits."""

    def __init__(
        self, size: int, channels: int, stride: int, grid: int, stem: int, width: int, classes: dict[str, int]
    ) -> None:
        super().__init__(classes)
        self.grid = grid
        halvings = max(math.ceil(math.log2(size / stride / 4)), 1)
        self.trunk, before = nn.ModuleList(), channels
        for stage in range(halvings):
            after = min(stem * 2**stage, 4 * stem)
            layers: list[nn.Module] = [ConvNorm(before, after, stride if stage == 0 else 1), nn.SiLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            layers += [ResidualBlock(after)] if stage else []
            self.trunk.append(nn.Sequential(*layers))
            before = after
        self.heads = nn.ModuleList(nn.Linear(2 * before, count) for count in classes.values())
        self.norm = nn.LayerNorm(before)
        self.out = nn.Linear(before, width)
        self.places = nn.Parameter(torch.randn(grid**2, width) * 0.02)
        self._frozen()

    def _seen(self, values: Tensor) -> Tensor:
        # Channels last in memory, in which pooling and convolutions are twice as fast.
        x = values.contiguous().permute(0, 3, 1, 2).float() / 64 - 2
        for stage in self.trunk:
            x = stage(x)
        return x

    def pooled(self, values: Tensor, lengths: Tensor) -> Tensor:
        x = self._seen(values)
        return torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        places = F.adaptive_avg_pool2d(self._seen(values), self.grid).flatten(2).transpose(1, 2)
        return self.out(self.norm(places)) + self.places


class AudioRecogniser(Recogniser):
    """(N, T, bands) log-mel to (N, T / 4, D), and to logits.

    A clip is seen twice: without its mean spectrum, which is the microphone's, the room's and part of the voice, and
    with it, by which rain is told from a saw. The second view is dropped for some clips while it learns, so that what
    is said by an unknown voice is heard from the first.
    """

    def __init__(
        self, bands: int, silence: float, stem: int, width: int, classes: dict[str, int], time_stride: int = 1
    ) -> None:
        super().__init__(classes)
        self.silence, self.time_stride = silence, time_stride
        self.trunk, before = nn.ModuleList(), 2
        for stage in range(3):
            after = stem * 2**stage
            stride = (time_stride, 2) if stage == 0 else 1
            layers: list[nn.Module] = [ConvNorm(before, after, stride), nn.SiLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True), ResidualBlock(after)] if stage else []
            self.trunk.append(nn.Sequential(*layers))
            bands, before = math.ceil(bands / 2), after
        features = before * bands
        self.quarters: Tensor  # (bands / 8, 4): the mean of each quarter of the bands
        self.register_buffer("quarters", F.adaptive_avg_pool1d(torch.eye(bands)[None], 4)[0], persistent=False)
        self.heads = nn.ModuleList(nn.Linear(before * 4 * (SEGMENTS + 1), count) for count in classes.values())
        self.norm = nn.LayerNorm(features)
        self.out = nn.Linear(features, width)
        self._frozen()

    def _seen(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F, T / 4 / time stride, bands / 8) and the lengths that are left."""
        exists = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        x = (values.float() - self.silence) * exists[..., None]
        spectrum = x.sum(1, keepdim=True) / lengths[:, None, None]
        kept = spectrum - spectrum.mean(2, keepdim=True)  # how loud it is as a whole says nothing
        if self.learning:
            kept = kept * (torch.rand(len(x), 1, 1, device=x.device) >= UNHEARD)
        without = x - spectrum
        x = torch.stack((without, without + kept), 1) * exists[:, None, :, None]
        x = x.contiguous(memory_format=torch.channels_last)
        for number, stage in enumerate(self.trunk):
            x = stage(x)
            strides = 2 if number else self.time_stride
            lengths = torch.div(lengths + strides - 1, strides, rounding_mode="floor")
            exists = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
            x = x * exists[:, None, :, None]
        return x, lengths

    def pooled(self, values: Tensor, lengths: Tensor) -> Tensor:
        x, lengths = self._seen(values, lengths)
        x = (x @ self.quarters).permute(0, 2, 1, 3).flatten(2)  # (N, T / 4, F * 4)
        places = torch.arange(x.shape[1], device=x.device)[None, None]
        edges = torch.linspace(0, 1, SEGMENTS + 1, device=x.device)[None] * lengths[:, None]
        low, high = edges[:, :-1, None], edges[:, 1:, None]
        share = (torch.minimum(high, places + 1.0) - torch.maximum(low, places + 0.0)).clamp(min=0)
        means = torch.bmm(share / share.sum(2, keepdim=True).clamp(min=1e-6), x)
        return torch.cat((means.flatten(1), x.amax(1)), 1)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        x, _ = self._seen(values, lengths)
        states = self.out(self.norm(x.transpose(1, 2).flatten(2)))
        return states.repeat_interleave(self.time_stride, 1)[:, : (values.shape[1] + 3) // 4]
