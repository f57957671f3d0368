"""Video: frames and sound -> a few embeddings for each moment, under a budget of tokens. It is read, never written.

A clip is cut into slots of equal length. A sample is uint8 (T, row), a row a slot: its frame (size x size x 3), then
its sound, STEPS x BANDS of log-mel. Values in a batch are (N, T, row) with lengths (N,) in slots.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.core.config import Size
from plait.modalities.audio import SILENCE, AudioSettings, LogMel
from plait.modalities.base import (
    ChannelNorm,
    Recognition,
    SamplePreview,
    bilinear_warp,
    overlapping_windows,
    padded,
    tinted,
    within,
)  # fmt: skip
from plait.modalities.recogniser import ConvNorm, Recogniser, ResidualBlock
from plait.modalities.video_files import BANDS, RATE, SOUND, STEPS, Clip, animated, decode_video, frames_of, strip_of

MOMENT = 2.0  # seconds of what a search finds in a longer clip; moments overlap by half


@dataclass(frozen=True)
class Moment:
    """A part of a clip: from when to when, in seconds, and its sample."""

    start: float
    stop: float
    sample: np.ndarray


class VideoSettings(BaseModel):
    """How video is fitted, read and augmented; kept in the checkpoint's preprocessor file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    TRAINING: ClassVar = frozenset({"scale", "shift", "flip", "light", "mute"})  # not part of the network

    size: int = Field(32, description="Side of a frame in pixels; other shapes are stretched.")
    fps: float = Field(4.0, description="Slots a second, each with one frame and its sound.")
    tokens: int = Field(128, description="Positions that a clip may take; longer ones are read in windows.")
    grid: int = Field(2, description="Side of a frame's grid of embeddings: a slot is grid x grid + 1 positions.")
    encoder: None = Field(None, description="To be left out: there are no pretrained encoders of video yet.")
    hf_encoder: None = Field(None, description="To be left out, likewise.")
    classes: dict[str, int] = Field(
        {}, description="Column of labels -> how many; where there are any, the encoder learns to recognise them."
    )
    stem: int = Field(16, description="Channels of the encoder's first layer.")
    levels: list[int] = Field([], description="Must be left out: video is read, not written.", max_length=0)
    scale: float = Field(0.1, description="Augmentation: frames are scaled by up to this share.")
    shift: float = Field(0.08, description="Augmentation: frames are shifted by up to this share of the side.")
    flip: bool = Field(False, description="Augmentation: mirror half of the clips.")
    light: float = Field(0.15, description="Augmentation: brightness changes by up to this share.")
    mute: float = Field(0.1, description="Augmentation: share of clips without sound.")

    @classmethod
    def fitted(cls, size: Size, examples: list[bytes], overrides: dict[str, Any]) -> VideoSettings:
        """The settings that a row of the table of sizes and some of the user's clips call for."""
        longest = max(decode_video(example).seconds for example in examples[:32])
        settings = cls.of_size(size, overrides)
        fitting = [fps for fps in (8.0, 4.0, 2.0) if fps * longest <= settings.slots]
        return cls.of_size(size, {"fps": fitting[0] if fitting else 2.0, **overrides})

    @classmethod
    def of_size(cls, size: Size, overrides: dict[str, Any]) -> VideoSettings:
        """The settings for a row of the table of sizes, where there are no data."""
        return cls.model_validate({"size": min(size.image, 64), "tokens": size.context // 4, **overrides})

    @classmethod
    def for_recognition(cls, overrides: dict[str, Any], mirrors: Callable[[], bool]) -> Recognition:
        """What differs where video is recognised: nothing but the classes."""
        return Recognition({})

    @property
    def row(self) -> int:
        """Numbers of a slot."""
        return 3 * self.size**2 + SOUND

    @property
    def slot_tokens(self) -> int:
        """Positions of a slot."""
        return self.grid**2 + 1

    @property
    def slots(self) -> int:
        """The longest sample."""
        return max(self.tokens // self.slot_tokens, 1)

    @property
    def seconds(self) -> float:
        """Of the longest sample."""
        return self.slots / self.fps


class VideoTrunk(nn.Module):
    """What both encoders share: (N, T, row) to visual features (N, T, grid * grid, F) and those of sound (N, T, F).
    A frame is read beside its difference from the one before."""

    def __init__(self, settings: VideoSettings, learns_alone: bool) -> None:
        super().__init__()
        self.settings = settings
        stem = settings.stem

        def block(before: int, after: int, residual: bool) -> nn.Module:
            if learns_alone:  # with batch statistics, which are frozen afterwards
                layers: list[nn.Module] = [ConvNorm(before, after), nn.SiLU(), nn.MaxPool2d(2, ceil_mode=True)]
                return nn.Sequential(*layers, *([ResidualBlock(after)] if residual else []))
            convolution = nn.Conv2d(before, after, 3, padding=1)
            return nn.Sequential(convolution, ChannelNorm(after), nn.SiLU(), nn.MaxPool2d(2, ceil_mode=True))

        halvings = max(round(math.log2(settings.size / 4)), 2)
        widths = [6, *(min(stem * 2**n, 4 * stem) for n in range(halvings))]
        self.frames = nn.Sequential(*(block(a, b, n > 0) for n, (a, b) in enumerate(pairwise(widths))))
        self.sound = nn.Sequential(block(1, stem, False), block(stem, 2 * stem, True))
        self.features = widths[-1]
        self.heard = nn.Linear(2 * stem * (STEPS // 4) * (BANDS // 4), self.features)
        self.time = nn.ModuleList(nn.Conv1d(self.features, self.features, 3, padding=1) for _ in range(2))

    def _mixed(self, series: Tensor, exists: Tensor, number: int) -> Tensor:
        """Features (N, T, places, F) and what they become beside those of the slots around."""
        count, slots, places, _ = series.shape
        rows = (series * exists[:, :, None, None]).permute(0, 2, 3, 1).flatten(0, 1)  # (N * places, F, T)
        mixed = F.silu(self.time[number](rows)).view(count, places, self.features, slots)
        return series + mixed.permute(0, 3, 1, 2)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        count, slots, size = len(values), values.shape[1], self.settings.size
        exists = within(lengths, slots)
        pixels = values[..., : 3 * size * size].reshape(count, slots, size, size, 3).float() / 64 - 2
        change = F.pad(pixels[:, 1:] - pixels[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        both = torch.cat((pixels, change), -1) * exists[:, :, None, None, None]
        # Channels last in memory, in which pooling and convolutions are twice as fast.
        seen = self.frames(both.flatten(0, 1).movedim(-1, 1))
        seen = F.adaptive_avg_pool2d(seen, self.settings.grid).flatten(2)  # (N * T, F, places)
        seen = seen.view(count, slots, self.features, -1).transpose(2, 3)
        # A slot's sound is read as a small image of its own, so that padding is never heard.
        sound = values[..., -SOUND:].float().reshape(count * slots, 1, STEPS, BANDS) / 64
        heard = self.heard(self.sound(sound).flatten(1)).view(count, slots, 1, self.features)
        return self._mixed(seen, exists, 0), self._mixed(heard, exists, 1)[:, :, 0]


class Projection(nn.Module):
    """Features to what the backbone reads: (N, T * (grid * grid + 1), D)."""

    optimizer_groups: ClassVar = {"places": "no_decay"}

    def __init__(self, settings: VideoSettings, features: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(features), nn.LayerNorm(features)))
        self.outs = nn.ModuleList((nn.Linear(features, width), nn.Linear(features, width)))
        self.places = nn.Parameter(torch.randn(settings.slot_tokens, width) * 0.02)

    def forward(self, seen: Tensor, heard: Tensor) -> Tensor:
        parts = [out(norm(x)) for out, norm, x in zip(self.outs, self.norms, (seen, heard[:, :, None]), strict=True)]
        return (torch.cat(parts, 2) + self.places).flatten(1, 2)


class VideoEncoder(nn.Module):
    """(N, T, row) to (N, tokens, D)."""

    def __init__(self, settings: VideoSettings, width: int) -> None:
        super().__init__()
        self.trunk = VideoTrunk(settings, learns_alone=False)
        self.project = Projection(settings, self.trunk.features, width)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        projected: Tensor = self.project(*self.trunk(values, lengths))
        return projected


class VideoRecogniser(Recogniser):
    """(N, T, row) to (N, tokens, D), and to logits."""

    def __init__(self, settings: VideoSettings, width: int) -> None:
        super().__init__(settings.classes)
        read = VideoTrunk(settings, learns_alone=True)
        self.trunk = nn.ModuleList([read])
        self.heads = nn.ModuleList(nn.Linear(4 * read.features, n) for n in settings.classes.values())
        self.project = Projection(settings, read.features, width)
        self._frozen()

    def pooled(self, values: Tensor, lengths: Tensor) -> Tensor:
        seen, heard = self.trunk[0](values, lengths)
        exists = within(lengths, values.shape[1])[..., None]
        pooled = []
        for x, there in ((seen.flatten(1, 2), exists.repeat_interleave(seen.shape[2], 1)), (heard, exists)):
            pooled += [(x * there).sum(1) / there.sum(1), x.masked_fill(~there, -1e4).amax(1)]
        return torch.cat(pooled, 1)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        projected: Tensor = self.project(*self.trunk[0](values, lengths))
        return projected


class Video(nn.Module):
    """The modality: settings and encoder. It has no codec."""

    name: ClassVar[str] = "video"
    variable_length: ClassVar[bool] = True
    writable: ClassVar[bool] = False
    making_task: ClassVar[str] = "filming"
    made_per_row: ClassVar[int] = 1
    codec_metric: ClassVar[str] = ""
    shown: ClassVar[int] = 3
    occluded: ClassVar[Sequence[tuple[int, int]]] = [(1, 1), (2, 1)]

    def __init__(self, settings: VideoSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = (VideoRecogniser if settings.classes else VideoEncoder)(settings, width)
        self.codec = nn.Identity()
        self.mel = LogMel(AudioSettings(rate=RATE, bands=BANDS))

    def _slots(self, raw: Any) -> np.ndarray:
        """Bytes, a path, a clip or frames (T, H, W, 3) at the settings' rate to uint8 (T, row), all of it."""
        if isinstance(raw, np.ndarray):
            raw = Clip(raw, self.settings.fps, np.zeros(0, np.float32), len(raw) / self.settings.fps, raw.shape[1])
        clip = raw if isinstance(raw, Clip) else decode_video(Path(raw) if isinstance(raw, str) else raw)
        count = max(round(clip.seconds * self.settings.fps), 1)
        places = np.minimum((np.arange(count) / self.settings.fps * clip.fps).astype(int), len(clip.frames) - 1)
        side = (self.settings.size, self.settings.size)
        distinct, number = np.unique(places, return_inverse=True)
        small = np.stack(
            [np.asarray(Image.fromarray(clip.frames[n]).resize(side, Image.Resampling.BOX)) for n in distinct]
        )
        return np.concatenate((small[number].reshape(count, -1), self._heard(clip, count)), 1)

    def _heard(self, clip: Clip, count: int) -> np.ndarray:
        """The sound of each slot, uint8 (count, SOUND); 0 is silence."""
        if not len(clip.wave) or float(np.abs(clip.wave).max()) < 1e-4:
            return np.zeros((count, SOUND), np.uint8)
        mel = (self.mel.forward(torch.from_numpy(clip.wave)) - SILENCE).clamp(min=0).T[None]  # (1, bands, frames)
        frames = round(count * 100 / self.settings.fps)
        mel = F.pad(mel, (0, max(frames - mel.shape[2], 0)))[..., :frames]
        steps = F.adaptive_avg_pool1d(mel, count * STEPS)[0].T
        return (steps * 80).clamp(0, 255).to(torch.uint8).numpy().reshape(count, SOUND)

    def sample(self, raw: Any) -> np.ndarray:
        """The first `seconds` of a clip. Read longer ones with `windows`."""
        return self._slots(raw)[: self.settings.slots]

    def blank(self) -> np.ndarray:
        return np.zeros((self.settings.slots, self.settings.row), np.uint8)

    def windows(self, raw: Any) -> list[np.ndarray]:
        """Windows of the longest clip's length that overlap by half and cover the clip."""
        return overlapping_windows(self._slots(raw), self.settings.slots)

    def moments(self, raw: Any) -> list[Moment]:
        """The parts of a clip that a search tells apart: MOMENT seconds that overlap by half."""
        slots, fps = self._slots(raw), self.settings.fps
        length = max(min(round(MOMENT * fps), self.settings.slots), 1)
        if len(slots) <= 1.5 * length:
            return [Moment(0.0, len(slots) / fps, slots[: self.settings.slots])]
        starts = [*range(0, len(slots) - length, max(length // 2, 1)), len(slots) - length]
        return [Moment(at / fps, (at + length) / fps, slots[at : at + length]) for at in starts]

    def batch(self, samples: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        return padded(samples, 0, np.uint8)

    @property
    def augments(self) -> bool:
        return True  # its sound goes off in any case

    def augment(
        self, values: Tensor, lengths: Tensor, uniforms: Tensor, mask_parts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Scale, shift, mirror and brightness of all frames of a clip alike, and its sound off, as `uniforms` says."""
        s = self.settings
        signed = (uniforms * 2 - 1).float()
        zoom = 1 + signed[:, 0] * s.scale
        mirror = torch.where((uniforms[:, 1] < 0.5) & torch.tensor(s.flip), -1.0, 1.0)
        none = torch.zeros_like(zoom)
        matrix = torch.stack(
            (
                torch.stack((zoom * mirror, none, signed[:, 2] * 2 * s.shift), -1),
                torch.stack((none, zoom, signed[:, 3] * 2 * s.shift), -1),
            ),
            1,
        )
        count, slots = values.shape[:2]
        pixels, sound = values.float().split([3 * s.size**2, SOUND], 2)
        x = pixels.reshape(count * slots, s.size, s.size, 3).movedim(-1, 1)
        edge = torch.cat((x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]), -1).mean(-1)[..., None, None]
        x = bilinear_warp(x - edge, matrix.repeat_interleave(slots, 0), (s.size, s.size), 0.0) + edge
        x = x.movedim(1, -1).reshape(count, slots, -1) * (1 + signed[:, 4] * s.light)[:, None, None]
        sound = sound * (uniforms[:, 5] >= (s.mute if mask_parts else 0.0))[:, None, None]
        return torch.cat((x.clamp(0, 255), sound), 2), lengths

    def token_count(self, length: int) -> int:
        return length * self.settings.slot_tokens

    def code_count(self, length: int) -> int:
        return 0

    def features(self, samples: np.ndarray) -> Tensor:
        """(N, 12, size, size): four frames, in [-1, 1]."""
        four = [frames_of(s)[((np.arange(4) + 0.5) / 4 * len(s)).astype(int)] for s in samples]
        return torch.from_numpy(np.stack(four)).movedim(-1, 2).flatten(1, 2).float() / 127.5 - 1

    def codec_errors(self, samples: list[np.ndarray], rebuilt: list[np.ndarray]) -> np.ndarray:
        raise NotImplementedError("video has no codec")

    def preview_sample(self, sample: np.ndarray) -> SamplePreview:
        """A strip of frames."""
        out = io.BytesIO()
        strip_of(frames_of(sample)).save(out, "PNG")
        return SamplePreview(out.getvalue())

    def grid(self, sample: np.ndarray) -> tuple[int, int]:
        """Regions in time alone."""
        return len(sample), 1

    @staticmethod
    def test_views(samples: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
        """The samples as they are, alone."""
        return [samples]

    def removed(self, sample: np.ndarray) -> np.ndarray:
        """The mean frame throughout, and silence."""
        gone = np.broadcast_to(sample.mean(0).round().astype(np.uint8), sample.shape).copy()
        gone[:, -SOUND:] = 0
        return gone

    def spot(self, sample: np.ndarray, row: int, column: int) -> str:
        return f"{row / self.settings.fps:.2f} to {(row + 1) / self.settings.fps:.2f} s"

    def code_cells(self, count: int) -> tuple[tuple[int, int], np.ndarray]:
        raise NotImplementedError("video has no codes")

    def marked(self, sample: np.ndarray, weights: np.ndarray | None) -> Image.Image:
        """Frames in a strip, tinted by what their slot counts."""
        frames = frames_of(sample)
        if weights is None:
            return strip_of(frames)
        shares = np.broadcast_to(weights[:, :1, None], frames.shape[:3])
        return strip_of(np.stack([tinted(f, w) for f, w in zip(frames, shares, strict=True)]))

    def to_object(self, values: np.ndarray) -> list[Image.Image]:
        """The frames."""
        return [Image.fromarray(frame) for frame in frames_of(values)]

    def to_bytes(self, values: np.ndarray) -> bytes:
        """An animated WebP."""
        return animated(frames_of(values), len(values), self.settings.size)
