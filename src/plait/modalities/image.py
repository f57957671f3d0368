"""Images: pixels -> a short grid of embeddings on the way in; pixels <-> a grid of FSQ codes on the way out.

A sample is uint8 (H, W, C). Values in a batch are uint8 or float (N, H, W, C); inside the networks (N, C, H, W)
in [-1, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.core.config import Size
from plait.modalities.base import ChannelNorm, Recognition, SamplePreview, bilinear_warp, tinted
from plait.modalities.fsq import FSQ
from plait.modalities.hf_encoder import HFEncoder, HFEncoderSettings
from plait.modalities.image_files import decode_image
from plait.modalities.recogniser import ImageRecogniser

VIEW_SHIFT = 1 / 32  # of a side, by which the views differ that a recogniser is asked about


class ImageSettings(BaseModel):
    """How images are fitted, read, written and augmented; kept in the checkpoint's preprocessor file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    TRAINING: ClassVar = frozenset({"rotate", "scale", "shift", "flip", "erase", "freeze"})  # not part of the network

    size: int = Field(32, description="Side in pixels; other shapes are fitted by `fit`.")
    channels: int = Field(3, description="1 for grey images, 3 for coloured ones.")
    fit: str = Field("crop", description="crop (the middle square), pad (to a square) or stretch.")
    background: int = Field(255, description="What transparent parts and padding become, 0 to 255.")
    grid: int = Field(4, description="Side of the encoder's grid of embeddings: an image is grid x grid positions.")
    encoder: str | None = Field(
        None, description="hf:NAME-OR-FOLDER, a pretrained vision encoder in the encoder's place."
    )
    freeze: bool = Field(
        True, description="The pretrained encoder stays as it is; a projection of what it sees is trained."
    )
    hf_encoder: HFEncoderSettings | None = Field(None, description="Filled in from the pretrained encoder's files.")
    classes: dict[str, int] = Field(
        {}, description="Column of labels -> how many; where there are any, the encoder is trained to recognise them."
    )
    stem: int = Field(32, description="Channels of the encoder's first layer.")
    stride: int = Field(1, description="Of that layer, in pixels.")
    patch: int = Field(4, description="Side in pixels of what one code stands for.")
    codec_width: int = Field(96, description="Channels of the codec.")
    codec_blocks: int = Field(1, description="Residual blocks of the codec, on each side.")
    local: bool = Field(
        False,
        description="A code tells of its surroundings alone; new runs have it, older ones norms over the whole image.",
    )
    levels: list[int] = Field(
        [8, 5, 5, 5], description="Levels of each FSQ dimension; their product is the number of codes."
    )
    rotate: float = Field(8.0, description="Augmentation: rotation up to so many degrees.")
    scale: float = Field(0.1, description="Augmentation: zoom by up to this share.")
    shift: float = Field(0.08, description="Augmentation: shift by up to this share of the side.")
    flip: bool = Field(False, description="Augmentation: mirror half of the samples.")
    erase: float = Field(0.0, description="Augmentation: share of samples that lose a random rectangle.")

    @classmethod
    def fitted(cls, size: Size, examples: list[bytes], overrides: dict[str, Any]) -> ImageSettings:
        """The settings that a row of the table of sizes and some of the user's images call for."""
        images = [decode_image(example) for example in examples]
        side = int(np.median([max(image.size) for image in images]))
        grey = all(image.convert("RGB").convert("L").convert("RGB") == image.convert("RGB") for image in images)
        largest = overrides["hf_encoder"]["size"] if overrides.get("hf_encoder") else size.image
        fitting = min(largest, max(math.ceil(side / 4) * 4, 8))
        return cls.sized(fitting, {"channels": 1 if grey else 3, **overrides})

    @classmethod
    def of_size(cls, size: Size, overrides: dict[str, Any]) -> ImageSettings:
        """The settings for coloured images as large as a row of the table of sizes says, where there are no data."""
        side = overrides["hf_encoder"]["size"] if overrides.get("hf_encoder") else size.image
        return cls.sized(side, {"channels": 3, **overrides})

    @classmethod
    def for_recognition(cls, overrides: dict[str, Any], mirrors: Callable[[], bool]) -> Recognition:
        """What differs where images are recognised and not made; `mirrors` finds out whether a mirrored image means
        the same, and is asked where `overrides`, the recipe's settings, do not say."""
        chosen = {"grid": 4, "rotate": 0.0, "scale": 0.0, "shift": 0.12, "erase": 0.75}
        if "flip" in overrides:
            return Recognition(chosen)
        flip = mirrors()
        what = "a mirrored image means the same" if flip else "mirrored images mean something else"
        return Recognition({**chosen, "flip": flip}, [f"Found in the images: {what}."])

    @classmethod
    def sized(cls, size: int, overrides: dict[str, Any]) -> ImageSettings:
        """The settings for images of a side, in pixels."""
        pixels = overrides.get("size", size)
        small, middling = (not isinstance(pixels, int) or pixels <= limit for limit in (32, 128))
        patch, grid = (4, 4) if small else (8, 8) if middling else (16, 8)
        stride = 1 if small else 2
        chosen: dict[str, Any] = {"size": size, "patch": patch, "grid": grid, "stride": stride, "local": True}
        if overrides.get("hf_encoder") and overrides.get("freeze", True):  # what it sees of an image is kept then
            chosen |= {"rotate": 0.0, "scale": 0.0, "shift": 0.0}
        return cls.model_validate({**chosen, **overrides})


def view_places(shape: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of shifted views of an image of (H, W) pixels: by a thirty-second of its sides, at least a
    pixel, both ways; what lies outside is mirrored."""
    places = []
    for sign in (-1, 1):
        both = []
        for extent in shape:
            moved = np.abs(np.arange(extent) + sign * max(round(extent * VIEW_SHIFT), 1))
            both.append(np.where(moved >= extent, 2 * (extent - 1) - moved, moved).clip(0))
        places.append((both[0], both[1]))
    return places


def psnr(original: np.ndarray, rebuilt: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels of each of N samples, (N,); 100 at most, for equal ones."""
    error = (np.asarray(original, float) - np.asarray(rebuilt, float)).reshape(len(original), -1)
    mean = np.square(error).mean(1)
    return 10 * np.log10(peak**2 / np.maximum(mean, peak**2 * 1e-10))


def group_norm(width: int) -> nn.Module:
    """A norm of (N, width, H, W) over eight groups of channels."""
    return nn.GroupNorm(8, width)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = group_norm) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(
            norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            norm(width),
            nn.SiLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def to_unit(values: Tensor) -> Tensor:
    """(N, H, W, C) uint8, or floats in the same range, to (N, C, H, W) in [-1, 1], channels last in memory: what was
    augmented comes with channels first, in which pooling and convolutions are half as fast."""
    return values.contiguous().movedim(-1, 1).float() / 127.5 - 1


class ImageEncoder(nn.Module):
    """A small CNN: (N, H, W, C) to (N, grid * grid, D)."""

    optimizer_groups: ClassVar = {"places": "no_decay"}

    def __init__(self, settings: ImageSettings, width: int) -> None:
        super().__init__()
        halvings = max(round(math.log2(settings.size / settings.stride / settings.grid)), 1)
        channels = settings.stem
        layers: list[nn.Module] = [nn.Conv2d(settings.channels, channels, 3, settings.stride, padding=1)]
        for step in range(halvings):
            wider = min(channels * 2, 4 * settings.stem)
            layers += [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, wider, 3, padding=1)]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            if step > 0:
                layers += [Residual(wider)]
            channels = wider
        layers += [nn.AdaptiveAvgPool2d(settings.grid), nn.GroupNorm(8, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(channels, width)
        self.places = nn.Parameter(torch.randn(settings.grid**2, width) * 0.02)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        return self.out(self.layers(to_unit(values)).flatten(2).transpose(1, 2)) + self.places


class HFImageEncoder(nn.Module):
    """A pretrained encoder: (N, H, W, C) to (N, grid * grid, D).

    Its patches are averaged on the grid; each place, beside the summary that the encoder makes of the whole (its first
    token, else the mean), is normed and projected.
    """

    optimizer_groups: ClassVar = {"places": "no_decay"}

    mean: Tensor
    std: Tensor
    gain: Tensor

    def __init__(self, settings: ImageSettings, width: int) -> None:
        super().__init__()
        assert settings.hf_encoder is not None
        self.settings, self.known = settings, settings.hf_encoder
        self.hf_encoder = HFEncoder(self.known.config, settings.freeze)
        self.register_buffer("mean", torch.tensor(self.known.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.known.std).view(-1, 1, 1), persistent=False)
        self.norm = nn.LayerNorm(2 * self.hf_encoder.width)
        self.out = nn.Linear(2 * self.hf_encoder.width, width)
        self.register_buffer("gain", torch.ones(()))  # of the projection, in front of a model with small embeddings
        self.places = nn.Parameter(torch.randn(settings.grid**2, width) * 0.02)

    def pixels(self, values: Tensor) -> Tensor:
        """What the encoder reads, (N, 3, size, size): a sample of another size is resampled."""
        x = values.movedim(-1, 1).float() / 255
        if x.shape[-1] != self.known.size:
            size = (self.known.size, self.known.size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self.mean) / self.std  # one channel becomes three

    def features(self, values: Tensor) -> Tensor:
        """What is normed and projected, (N, grid * grid, 2 H): each place, and beside it the summary."""
        states = self.hf_encoder(pixel_values=self.pixels(values))
        if states.ndim == 4:
            patches, summary = states, states.mean((2, 3))
        else:
            patch = self.known.config.get("patch_size", 0)
            side = self.known.size // patch if isinstance(patch, int) and patch else 0
            if not side or side**2 > states.shape[1]:
                side = math.isqrt(states.shape[1])
            first = states.shape[1] - side**2  # a summary, registers
            patches = states[:, first:].transpose(1, 2).unflatten(2, (side, side))
            summary = states[:, 0] if first else patches.mean((2, 3))
        places = F.adaptive_avg_pool2d(patches, self.settings.grid).flatten(2).transpose(1, 2)
        return torch.cat((places, summary[:, None].expand_as(places)), -1)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        return self.gain * self.out(self.norm(self.features(values))) + self.places


class ImageCodec(nn.Module):
    """A CNN autoencoder with FSQ between: one code for each patch of pixels."""

    def __init__(self, settings: ImageSettings) -> None:
        super().__init__()
        patch, width = settings.patch, settings.codec_width
        self.levels = settings.levels
        self.side = math.ceil(settings.size / patch)
        self.size = settings.size
        self.padded = self.side * patch
        self.quantizer = FSQ(settings.levels)
        digits = len(settings.levels)
        fine = max(width // 4, 16)
        norm = ChannelNorm if settings.local else group_norm
        self.encoder = nn.Sequential(
            nn.Conv2d(settings.channels, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, fine, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(fine, width, patch // 2, stride=patch // 2),
            *(Residual(width, norm) for _ in range(settings.codec_blocks)),
            norm(width),
            nn.SiLU(),
            nn.Conv2d(width, digits, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(digits, width, 1),
            *(Residual(width) for _ in range(settings.codec_blocks + 1)),
            group_norm(width),
            nn.SiLU(),
            nn.Conv2d(width, fine * (patch // 2) ** 2, 1),
            nn.PixelShuffle(patch // 2),
            nn.SiLU(),
            nn.Conv2d(fine, fine * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(fine, settings.channels, 3, padding=1),
        )

    def _quantized(self, values: Tensor) -> tuple[Tensor, Tensor]:
        x = to_unit(values)
        margin = self.padded - self.size
        x = F.pad(x, (0, margin, 0, margin), mode="replicate") if margin else x
        return x, self.quantizer.quantize(self.encoder(x).movedim(1, -1))

    def loss(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Mean absolute plus five times mean squared error of the reconstruction."""
        x, quantized = self._quantized(values)
        error = self.decoder(quantized.movedim(-1, 1)) - x
        return error.abs().mean() + 5 * error.square().mean()

    def encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        return self.quantizer.codes(self._quantized(values)[1]).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(N, side * side) codes to uint8 (N, H, W, C)."""
        vectors = self.quantizer.vectors(codes.view(-1, self.side, self.side))
        x = self.decoder(vectors.movedim(-1, 1))[:, :, : self.size, : self.size]
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)


def _encoder(settings: ImageSettings, width: int) -> nn.Module:
    if settings.hf_encoder is not None:
        return HFImageEncoder(settings, width)
    if settings.classes:
        s = settings
        return ImageRecogniser(s.size, s.channels, s.stride, s.grid, s.stem, width, s.classes)
    return ImageEncoder(settings, width)


class Image(nn.Module):
    """The modality: settings, encoder and codec."""

    name: ClassVar[str] = "image"
    writable: ClassVar[bool] = True
    making_task: ClassVar[str] = "drawing"
    made_per_row: ClassVar[int] = 6
    codec_metric: ClassVar[str] = "psnr"
    shown: ClassVar[int] = 6
    variable_length: ClassVar[bool] = False
    occluded: ClassVar[Sequence[tuple[int, int]]] = [(2, 2)]

    def __init__(self, settings: ImageSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = _encoder(settings, width)
        self.codec = ImageCodec(settings)

    def sample(self, raw: Any) -> np.ndarray:
        """Bytes, a path, a PIL image or an array to uint8 (H, W, C)."""
        settings = self.settings
        if isinstance(raw, np.ndarray):
            raw = PILImage.fromarray(raw)
        image = raw if isinstance(raw, PILImage.Image) else decode_image(Path(raw) if isinstance(raw, str) else raw)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = PILImage.new("RGBA", image.size, (settings.background,) * 3 + (255,))
            image = PILImage.alpha_composite(ground, image)
        image = image.convert("L" if settings.channels == 1 else "RGB")
        width, height = image.size
        if width != height and settings.fit != "stretch":
            side = min(width, height) if settings.fit == "crop" else max(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = PILImage.new(image.mode, (side, side), (settings.background,) * len(image.getbands()))
            square.paste(image, (-left, -top))
            image = square
        if image.size != (settings.size, settings.size):
            image = image.resize((settings.size, settings.size), PILImage.Resampling.LANCZOS)
        return np.asarray(image, np.uint8).reshape(settings.size, settings.size, settings.channels)

    def blank(self) -> np.ndarray:
        s = self.settings
        return np.full((s.size, s.size, s.channels), s.background, np.uint8)

    def windows(self, raw: Any) -> list[np.ndarray]:
        return [self.sample(raw)]

    def batch(self, samples: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.stack(samples)), torch.ones(len(samples), dtype=torch.long)

    @property
    def augments(self) -> bool:
        one = self.settings
        return bool(one.rotate or one.scale or one.shift or one.flip or one.erase)

    def augment(
        self, values: Tensor, lengths: Tensor, uniforms: Tensor, mask_parts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Rotation, scale, shift, flip and erasing, each a function of `uniforms` (N, 8).

        Without rotation and scale, shifts are of whole pixels, the image mirrored at its edges: nothing is blurred.
        """
        settings = self.settings
        x = values.movedim(-1, 1).float()
        border = torch.cat((x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]), -1).mean(-1)
        border = border[..., None, None]
        x = self._warped(x, border, uniforms) if settings.rotate or settings.scale else self._shifted(x, uniforms)
        if settings.erase and mask_parts:
            place = torch.arange(settings.size, device=x.device) / settings.size
            side = 0.15 + 0.25 * uniforms[:, 5, None]
            top, left = uniforms[:, 6, None] * (1 - side), uniforms[:, 7, None] * (1 - side)
            gone = (
                (((place >= top) & (place < top + side))[:, :, None])
                & (((place >= left) & (place < left + side))[:, None, :])
            )
            chosen = (uniforms[:, 5] * 997 % 1 < settings.erase)[:, None, None]
            x = torch.where((gone & chosen)[:, None], border, x)
        return x.movedim(1, -1), lengths

    def _shifted(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Images (N, C, H, W), flipped, and shifted by whole pixels."""
        settings = self.settings
        mirror = ((uniforms[:, 4] < 0.5) & torch.tensor(settings.flip, device=x.device))[:, None, None, None]
        x = torch.where(mirror, x.flip(3), x)
        most = min(round(settings.shift * settings.size), settings.size - 1)
        if not most:
            return x
        padded = F.pad(x, (most,) * 4, mode="reflect")
        places = torch.arange(settings.size, device=x.device)
        down, right = ((uniforms[:, n] * (2 * most + 1)).long().clamp(max=2 * most)[:, None] + places for n in (2, 3))
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return padded.movedim(1, -1)[rows, down[:, :, None], right[:, None, :]].movedim(-1, 1)

    def _warped(self, x: Tensor, border: Tensor, uniforms: Tensor) -> Tensor:
        """Images (N, C, H, W), rotated, scaled, shifted and flipped by one resampling, with `border` around them."""
        settings = self.settings
        signed = (uniforms * 2 - 1).float()
        angle = signed[:, 0] * math.radians(settings.rotate)
        zoom = 1 + signed[:, 1] * settings.scale
        mirror = torch.where((uniforms[:, 4] < 0.5) & torch.tensor(settings.flip), -1.0, 1.0)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        matrix = torch.stack(
            (
                torch.stack((cos * mirror, -sin, signed[:, 2] * 2 * settings.shift), -1),
                torch.stack((sin * mirror, cos, signed[:, 3] * 2 * settings.shift), -1),
            ),
            1,
        )
        return bilinear_warp(x - border, matrix, (settings.size, settings.size), 0.0) + border

    def test_views(self, samples: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
        """The images as they are, and shifted a little both ways, mirrored at their edges."""
        places = view_places(samples[0].shape[:2])
        shifted = [[np.ascontiguousarray(one[rows][:, columns]) for one in samples] for rows, columns in places]
        return [samples, *shifted]

    def token_count(self, length: int) -> int:
        return self.settings.grid**2

    def code_count(self, length: int) -> int:
        return self.codec.side**2

    def features(self, samples: np.ndarray) -> Tensor:
        return to_unit(torch.from_numpy(np.asarray(samples)))

    @staticmethod
    def grid(sample: np.ndarray) -> tuple[int, int]:
        return min(8, sample.shape[0]), min(8, sample.shape[1])

    @staticmethod
    def removed(sample: np.ndarray) -> np.ndarray:
        """All of the mean colour that the image has at its edge, as its background."""
        edge = np.concatenate((sample[0], sample[-1], sample[:, 0], sample[:, -1]))
        return np.broadcast_to(edge.mean(0).round().astype(sample.dtype), sample.shape)

    @staticmethod
    def spot(sample: np.ndarray, row: int, column: int) -> str:
        (height, width), (rows, columns) = sample.shape[:2], Image.grid(sample)
        x, y = (-(-k * size // n) for k, size, n in ((column, width, columns), (row, height, rows)))
        right, low = (-(-(k + 1) * size // n) for k, size, n in ((column, width, columns), (row, height, rows)))
        return f"x {x} to {right}, y {y} to {low} px"

    def code_cells(self, count: int) -> tuple[tuple[int, int], np.ndarray]:
        return (self.codec.side, self.codec.side), np.arange(count)

    @staticmethod
    def marked(sample: np.ndarray, weights: np.ndarray | None) -> PILImage.Image:
        pixels = np.broadcast_to(sample, (*sample.shape[:2], 3))
        times = max(320 // max(sample.shape[:2]), 1)
        return PILImage.fromarray(tinted(pixels, weights).repeat(times, 0).repeat(times, 1))

    def codec_errors(self, samples: list[np.ndarray], rebuilt: list[np.ndarray]) -> np.ndarray:
        """Peak signal-to-noise ratios, dB."""
        return psnr(np.stack(samples), np.stack(rebuilt))

    def preview_sample(self, sample: np.ndarray) -> SamplePreview:
        return SamplePreview(self.to_bytes(sample))

    def to_object(self, values: np.ndarray) -> PILImage.Image:
        return PILImage.fromarray(values[..., 0] if values.shape[-1] == 1 else values)

    def to_bytes(self, values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        self.to_object(values).save(buffer, "PNG")
        return buffer.getvalue()
