"""Audio: log-mel -> embeddings on the way in; patches of log-mel <-> FSQ codes, and a vocoder, on the way out.

A sample is float16 (T, bands): 100 frames a second of log-mel, scaled to about [-1, 1]. Where a pretrained encoder
reads, what it wants to hear of a frame's 10 ms (its own log-mel, or the waveform) follows in the same row. Values in a
batch are (N, T, row) with lengths (N,) in frames; beyond its length a sample is silence.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageDraw
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.core.config import Size
from plait.core.errors import PlaitError
from plait.modalities.audio_files import decode_audio, resample
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
from plait.modalities.fsq import FSQ
from plait.modalities.hf_encoder import HFEncoder, HFEncoderSettings, transformers_for
from plait.modalities.recogniser import AudioRecogniser

SILENCE = -1.4  # the scaled log-mel of no audio
FLOOR = 1e-4  # mel power below which everything is silence, the waveform's RMS being 0.1
LONG = 2.5  # seconds of a clip above which an encoder of labels looks at every other frame
PATCH = 4  # frames that share their codes, and that one embedding covers: 40 ms


class AudioSettings(BaseModel):
    """How audio is fitted, read, written and augmented; kept in the checkpoint's preprocessor file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Not part of the network.
    TRAINING: ClassVar = frozenset({"stretch", "warp", "mask_time", "mask_bands", "equalise", "freeze"})

    rate: int = Field(8000, description="Samples a second, Hz.")
    seconds: float = Field(2.0, description="The longest clip; longer ones are read in overlapping windows.")
    bands: int = Field(64, description="Mel bands.")
    encoder: str | None = Field(
        None, description="hf:NAME-OR-FOLDER, a pretrained audio encoder in the encoder's place."
    )
    freeze: bool = Field(
        True, description="The pretrained encoder stays as it is; a projection of what it hears is trained."
    )
    hf_encoder: HFEncoderSettings | None = Field(None, description="Filled in from the pretrained encoder's files.")
    classes: dict[str, int] = Field(
        {}, description="Column of labels -> how many; where there are any, the encoder is trained to recognise them."
    )
    stem: int = Field(32, description="Channels of the encoder's first layer.")
    time_stride: int = Field(
        1, ge=1, le=4, description="Frames from one place to the next that an encoder of labels looks at."
    )
    codec_width: int = Field(160, description="Channels of the codec.")
    levels: list[int] = Field(
        [8, 5, 5, 5], description="Levels of each FSQ dimension; their product is the number of codes."
    )
    codes_per_patch: int = Field(2, description="Codes of a patch of four frames.")
    stretch: float = Field(1.25, description="Augmentation: time is stretched by up to this factor.")
    warp: float = Field(1.12, description="Augmentation: the mel axis is warped by up to this factor.")
    mask_time: float = Field(0.1, description="Augmentation: share of the clip that is masked.")
    mask_bands: float = Field(0.12, description="Augmentation: share of the mel bands that is masked.")
    equalise: float = Field(
        0.0, description="Augmentation: tilt and bow of the spectrum, as other microphones have; 1 is 26 dB."
    )
    normalise: bool = Field(
        False, description="Read without the clip's mean spectrum: the microphone's, the room's, part of the voice."
    )

    @classmethod
    def fitted(cls, size: Size, examples: list[bytes], overrides: dict[str, Any]) -> AudioSettings:
        """The settings that a row of the table of sizes and some of the user's recordings call for."""
        clips = [decode_audio(example) for example in examples]
        rate = int(np.median([rate for _, rate in clips]))
        longest = max(len(wave) / rate for wave, rate in clips)
        if overrides.get("hf_encoder"):
            hf_encoder = HFEncoderSettings.model_validate(overrides["hf_encoder"])
            longest, limit = min(longest, hf_encoder.longest / 1.1), overrides.get("seconds", 0)
            if isinstance(limit, (int, float)) and limit > hf_encoder.longest:
                raise PlaitError(
                    f"model.audio.seconds is {limit}, but {overrides['encoder']} reads {hf_encoder.longest:g}."
                )
        limit = size.rate, size.seconds
        if overrides.get("classes"):  # what tells clips apart may come late or be high, and nothing has to be written
            limit = max(limit[0], 16000), max(limit[1], 10.0)
        fitting = next(r for r in (8000, 16000, 24000) if r >= min(rate, limit[0]))
        seconds = min(limit[1], math.ceil(longest * 11) / 10)
        chosen = {"seconds": seconds, **overrides}
        if overrides.get("classes") and chosen["seconds"] > LONG:  # as many steps then fit as for shorter clips
            chosen = {"time_stride": 2, **chosen}
        return cls.sized(fitting, chosen)

    @classmethod
    def of_size(cls, size: Size, overrides: dict[str, Any]) -> AudioSettings:
        """The settings for audio as long as a row of the table of sizes says, where there are no data."""
        return cls.sized(size.rate, {"seconds": size.seconds, **overrides})

    @classmethod
    def for_recognition(cls, overrides: dict[str, Any], mirrors: Callable[[], bool]) -> Recognition:
        """What differs where audio is recognised and not made."""
        chosen = {"stretch": 1.2, "warp": 1.15, "mask_time": 0.15, "mask_bands": 0.2, "equalise": 0.3}
        return Recognition(chosen)

    @classmethod
    def sized(cls, rate: int, overrides: dict[str, Any]) -> AudioSettings:
        """The settings for audio of a rate, in samples a second."""
        return cls.model_validate({"rate": rate, "bands": 64 if rate <= 8000 else 80, **overrides})

    @property
    def hop(self) -> int:
        """Samples from one frame to the next: 10 ms."""
        return self.rate // 100

    @property
    def window(self) -> int:
        return int(self.rate * 0.032)

    @property
    def fft(self) -> int:
        """Samples of a frame's Fourier transform."""
        return 2 ** math.ceil(math.log2(self.rate * 0.064))

    @property
    def frames(self) -> int:
        """The longest sample, a whole number of patches."""
        return math.ceil(self.seconds * 100 / PATCH) * PATCH


def mel_filters(rate: int, fft: int, bands: int) -> Tensor:
    """Triangular filters on the HTK mel scale from 0 to rate / 2, (fft / 2 + 1, bands), each with peak 1."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    points = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)[:, None]
    rise = (bins - points[:-2]) / (points[1:-1] - points[:-2])
    fall = (points[2:] - bins) / (points[2:] - points[1:-1])
    return torch.minimum(rise, fall).clamp(min=0).float()


class LogMel:
    """Waveform <-> scaled log-mel, the way back by Griffin and Lim (1984) with 32 iterations."""

    def __init__(self, settings: AudioSettings) -> None:
        self.settings = settings
        self.filters = mel_filters(settings.rate, settings.fft, settings.bands)
        self.window = torch.hann_window(settings.window)

    def _stft(self, wave: Tensor) -> Tensor:
        s = self.settings
        return torch.stft(wave, s.fft, s.hop, s.window, self.window, center=True, return_complex=True)

    def forward(self, wave: Tensor) -> Tensor:
        """(samples,) to (frames, bands); the loudness of the whole is set first, so that volume says nothing."""
        level = wave.square().mean().sqrt().clamp(min=1e-5)
        wave = F.pad(wave, (0, max(self.settings.fft // 2 + 1 - len(wave), 0)))  # its ends are mirrored
        power = self._stft(wave * (0.1 / level)).abs().square()
        mel = power.transpose(-1, -2) @ self.filters
        return (mel.clamp(min=FLOOR).log() - math.log(FLOOR)) / 6 + SILENCE

    @cached_property
    def inverse(self) -> Tensor:
        """The pseudo-inverse of the filters: from mel bands to the bins of the spectrum."""
        return torch.linalg.pinv(self.filters)

    def invert(self, mel: Tensor, iterations: int = 32) -> Tensor:
        """(frames, bands) to (frames * hop,), with a seeded first phase so that it is a function of the mel."""
        s = self.settings
        power = ((mel.float() - SILENCE) * 6 + math.log(FLOOR)).exp()
        power = torch.where(power <= FLOOR * 1.05, 0.0, power)
        magnitude = (power @ self.inverse).clamp(min=0).sqrt().transpose(-1, -2)
        phase = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
        spectrum = torch.polar(magnitude, phase)
        length = s.hop * mel.shape[0]
        wave = torch.zeros(length)
        previous = torch.zeros_like(spectrum)
        for _ in range(iterations):
            wave = torch.istft(spectrum, s.fft, s.hop, s.window, self.window, center=True, length=length)
            rebuilt = self._stft(wave)[:, : mel.shape[0]]
            direction = rebuilt - 0.497 * previous  # Perraudin, Balazs and Sondergaard (2013)
            previous = rebuilt
            spectrum = magnitude * direction / direction.abs().clamp(min=1e-8)
        return wave / wave.abs().max().clamp(min=1e-4) * 0.9


def _shades(values: np.ndarray) -> np.ndarray:
    """Log-mel (T, bands) as pixels (bands, T, 3): time to the right, low tones at the bottom, dark to bright."""
    values = np.asarray(values, np.float32)
    low, high = float(values.min()), float(values.max())
    x = ((values - low) / max(high - low, 1e-6)).T[::-1]
    stops = np.array([0.0, 0.3, 0.55, 0.8, 1.0])
    colours = np.array([[12, 8, 40], [88, 24, 110], [190, 55, 85], [245, 140, 50], [252, 245, 180]])
    return np.stack([np.interp(x, stops, colours[:, c]) for c in range(3)], -1).astype(np.uint8)


def spectrogram(values: np.ndarray) -> bytes:
    """A PNG of log-mel (T, bands)."""
    buffer = io.BytesIO()
    PILImage.fromarray(_shades(values)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class AudioEncoder(nn.Module):
    """A small CNN over time and mel bands: (N, T, bands) to (N, T / 4, D)."""

    def __init__(self, settings: AudioSettings, width: int) -> None:
        super().__init__()
        channels = [settings.stem, 2 * settings.stem, 2 * settings.stem]
        self.normalise = settings.normalise
        self.strides = [(1, 2), (2, 2), (2, 2)]
        before, bands = 1, settings.bands
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for after, stride in zip(channels, self.strides, strict=True):
            self.convolutions.append(nn.Conv2d(before, after, (5, 5), stride, padding=2))
            self.norms.append(ChannelNorm(after))
            before, bands = after, math.ceil(bands / stride[1])
        self.out = nn.Linear(before * bands, width)
        self.norm = nn.LayerNorm(before * bands)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        exists = within(lengths, values.shape[1])[..., None]
        x = (values.float() - SILENCE) * exists
        if self.normalise:  # cepstral mean normalisation: Atal (1974)
            x = (x - x.sum(1, keepdim=True) / lengths[:, None, None]) * exists
        x = x[:, None]  # (N, 1, T, bands)
        remaining = lengths
        for convolution, norm, (stride, _) in zip(self.convolutions, self.norms, self.strides, strict=True):
            remaining = (remaining + stride - 1) // stride
            x = F.silu(norm(convolution(x)))
            x = x * within(remaining, x.shape[2])[:, None, :, None]
        return self.out(self.norm(x.transpose(1, 2).flatten(2)))


class HFEncoderInput:
    """Waveform to what a pretrained encoder reads, in rows of 10 ms."""

    def __init__(self, hf_encoder: HFEncoderSettings) -> None:
        self.hf_encoder = hf_encoder

    def forward(self, wave: np.ndarray, rate: int, frames: int) -> np.ndarray:
        """(samples,) to float32 (frames, row), as the encoder's own preprocessor has it."""
        hf_encoder = self.hf_encoder
        wave = resample(wave, rate, hf_encoder.rate)
        if hf_encoder.reads == "wave":
            if hf_encoder.normalise:
                wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
            size = frames * hf_encoder.row
            return np.pad(wave, (0, max(size - len(wave), 0)))[:size].reshape(frames, hf_encoder.row).astype(np.float32)
        extract = transformers_for("Whisper's log-mel").WhisperFeatureExtractor(hf_encoder.bands, hf_encoder.rate)
        # Silence follows, as in the window of 30 s; the extractor takes off nothing but the last, incomplete frame.
        wave = np.pad(wave, (0, max(frames * extract.hop_length - len(wave), 0) + extract.n_fft))
        features = extract(
            wave, sampling_rate=hf_encoder.rate, padding="longest", truncation=False, return_tensors="np"
        )
        return np.asarray(features["input_features"][0].T[:frames], np.float32)

    def silence(self, values: Tensor, exists: Tensor) -> Tensor:
        """(N, 1, 1): what fills up values (N, T, row) where they do not exist."""
        if self.hf_encoder.reads == "wave":
            return torch.zeros(len(values), 1, 1, device=values.device)
        # Whisper's log-mel is cut 8 powers of ten below its highest, and at 1e-10; a power is a quarter.
        top = values.masked_fill(~exists, -torch.inf).amax((1, 2), keepdim=True)
        return (top - 2).clamp(min=-1.5)


class HFAudioEncoder(nn.Module):
    """A pretrained encoder: (N, T, row) to (N, T / 4, D). It always reads the length of the longest clip, so that what
    it hears of an audio clip does not depend on the others of a batch."""

    def __init__(self, settings: AudioSettings, width: int) -> None:
        super().__init__()
        assert settings.hf_encoder is not None
        self.settings, self.known = settings, settings.hf_encoder
        config = self.known.config
        if self.known.reads == "mel":
            config = {**config, "max_source_positions": settings.frames // 2}
        self.hf_encoder = HFEncoder(config, settings.freeze)
        self.prepared = HFEncoderInput(self.known)
        self.norm = nn.LayerNorm(self.hf_encoder.width)
        self.out = nn.Linear(self.hf_encoder.width, width)

    def heard(self, values: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The encoder's inputs of a batch."""
        x = values[..., self.settings.bands :].float()[:, : self.settings.frames]
        exists = within(lengths, x.shape[1])[..., None]
        silence = self.prepared.silence(x, exists)
        x = torch.where(exists, x, silence)
        missing = self.settings.frames - x.shape[1]
        x = torch.cat((x, silence.expand(-1, missing, x.shape[2])), 1)
        if self.known.reads == "mel":
            return {"input_features": x.transpose(1, 2)}
        inputs = {"input_values": x.flatten(1)}
        if self.known.masked:
            inputs["attention_mask"] = within(lengths * self.known.row, x.shape[1] * x.shape[2]).long()
        return inputs

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        states = self.hf_encoder(**self.heard(values, lengths)).transpose(1, 2)
        pooled = F.adaptive_avg_pool1d(states, self.settings.frames // PATCH)
        return self.out(self.norm(pooled.transpose(1, 2)[:, : math.ceil(values.shape[1] / PATCH)]))


class Residual1d(nn.Module):
    """x + conv(silu(norm(x))) over time, blind to what lies beyond a sample's end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first = nn.Conv1d(width, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)) * mask))) * mask


class AudioCodec(nn.Module):
    """An autoencoder over patches of four frames with FSQ between: `codes_per_patch` codes for each patch."""

    def __init__(self, settings: AudioSettings) -> None:
        super().__init__()
        self.settings, self.levels = settings, settings.levels
        width, groups, digits = settings.codec_width, settings.codes_per_patch, len(settings.levels)
        self.quantizer = FSQ(settings.levels)
        self.patches_in = nn.Linear(PATCH * settings.bands, width)
        self.encoder = nn.ModuleList(Residual1d(width) for _ in range(2))
        self.to_digits = nn.Linear(width, groups * digits)
        self.from_digits = nn.Linear(groups * digits, width)
        self.decoder = nn.ModuleList(Residual1d(width) for _ in range(3))
        self.patches_out = nn.Linear(width, PATCH * settings.bands)

    def _patches(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, bands) to patches (N, P, 4 * bands) and their mask (N, 1, P)."""
        values = values[..., : self.settings.bands].float()
        values = torch.where(within(lengths, values.shape[1])[..., None], values, SILENCE)
        values = F.pad(values, (0, 0, 0, -values.shape[1] % PATCH), value=SILENCE)
        patches = values.unflatten(1, (-1, PATCH)).flatten(2)
        return patches, within((lengths + PATCH - 1) // PATCH, patches.shape[1])[:, None]

    def _digits(self, patches: Tensor, mask: Tensor) -> Tensor:
        """Quantised vectors (N, P, codes per patch, digits)."""
        x = self.patches_in(patches - SILENCE).transpose(1, 2) * mask
        for block in self.encoder:
            x = block(x, mask)
        return self.quantizer.quantize(self.to_digits(x.transpose(1, 2)).unflatten(-1, (-1, len(self.levels))))

    def _rebuild(self, quantized: Tensor, mask: Tensor) -> Tensor:
        x = self.from_digits(quantized.flatten(2)).transpose(1, 2) * mask
        for block in self.decoder:
            x = block(x, mask)
        return self.patches_out(x.transpose(1, 2)) + SILENCE

    def loss(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Mean absolute plus half of mean squared error of the log-mel, silence weighted .15."""
        patches, mask = self._patches(values, lengths)
        error = self._rebuild(self._digits(patches, mask), mask) - patches
        weight = torch.where(patches > SILENCE + 0.1, 1.0, 0.15) * mask.transpose(1, 2)
        return (weight * (error.abs() + 3 * error.square())).sum() / weight.sum().clamp(min=1)

    def encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(N, P * codes per patch), the codes of a patch side by side."""
        return self.quantizer.codes(self._digits(*self._patches(values, lengths))).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(N, P * codes per patch) to (N, P * 4, bands); an odd code at the end is left out."""
        groups = self.settings.codes_per_patch
        codes = codes[:, : codes.shape[1] // groups * groups].unflatten(1, (-1, groups))
        mask = torch.ones(len(codes), 1, codes.shape[1], device=codes.device)
        return self._rebuild(self.quantizer.vectors(codes), mask).unflatten(-1, (PATCH, -1)).flatten(1, 2)


def _encoder(settings: AudioSettings, width: int) -> nn.Module:
    if settings.hf_encoder is not None:
        return HFAudioEncoder(settings, width)
    if settings.classes:
        return AudioRecogniser(
            settings.bands, SILENCE, settings.stem // 2, width, settings.classes, settings.time_stride
        )
    return AudioEncoder(settings, width)


class Audio(nn.Module):
    """The modality: settings, encoder, codec and vocoder."""

    name: ClassVar[str] = "audio"
    writable: ClassVar[bool] = True
    making_task: ClassVar[str] = "speaking"
    made_per_row: ClassVar[int] = 1
    codec_metric: ClassVar[str] = "mel_error"
    shown: ClassVar[int] = 2
    variable_length: ClassVar[bool] = True
    occluded: ClassVar[Sequence[tuple[int, int]]] = [(2, 2), (6, 2)]  # half a second: most of a tone would else remain

    def __init__(self, settings: AudioSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = _encoder(settings, width)
        self.prepared = None if settings.hf_encoder is None else HFEncoderInput(settings.hf_encoder)
        self.codec = AudioCodec(settings)
        self.mel = LogMel(settings)

    def _frames(self, raw: Any) -> np.ndarray:
        """Bytes, a path or (waveform, rate) to float16 (T, row), whatever its length."""
        if isinstance(raw, tuple):
            wave, rate = np.asarray(raw[0], np.float32), int(raw[1])
            wave = wave.mean(-1) if wave.ndim == 2 else wave
        else:
            wave, rate = decode_audio(Path(raw) if isinstance(raw, str) else raw)
        own = self.mel.forward(torch.from_numpy(resample(wave, rate, self.settings.rate))).half().numpy()
        return own if self.prepared is None else self._beside(own, wave, rate)

    def _beside(self, own: np.ndarray, wave: np.ndarray, rate: int) -> np.ndarray:
        """Our frames and the encoder's in one row."""
        assert self.prepared is not None
        return np.concatenate((own, self.prepared.forward(wave, rate, len(own))), 1, dtype=np.float16)

    def sample(self, raw: Any) -> np.ndarray:
        """The first `seconds` of the audio. Read longer ones with `windows`."""
        return self._frames(raw)[: self.settings.frames]

    def blank(self) -> np.ndarray:
        row = self.settings.bands + (self.settings.hf_encoder.row if self.settings.hf_encoder else 0)
        return np.full((self.settings.frames, row), SILENCE, np.float16)

    def windows(self, raw: Any) -> list[np.ndarray]:
        """Windows of the longest clip's length that overlap by half and cover the audio."""
        return overlapping_windows(self._frames(raw), self.settings.frames)

    def batch(self, samples: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        longest = math.ceil(max(map(len, samples)) / PATCH) * PATCH
        if self.prepared is not None:  # what was decoded from codes is heard as it audio clips
            samples = [s if s.shape[1] > self.settings.bands else self._beside(s, *self.to_object(s)) for s in samples]
        return padded(samples, SILENCE, np.float16, longest)

    @property
    def augments(self) -> bool:
        one = self.settings
        return one.stretch != 1 or one.warp != 1 or bool(one.mask_time or one.mask_bands or one.equalise)

    def augment(
        self, values: Tensor, lengths: Tensor, uniforms: Tensor, mask_parts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Time stretch, warp of the mel axis, and a masked stretch of time and of bands, as `uniforms` (N, 8) says."""
        settings = self.settings
        signed = (uniforms * 2 - 1).float()
        stretch = settings.stretch ** signed[:, 0]
        warp = settings.warp ** signed[:, 1]
        longest = min(math.ceil(values.shape[1] * settings.stretch / PATCH) * PATCH, settings.frames)
        new_lengths = (lengths * stretch).long().clamp(1, longest)
        matrix = torch.zeros(len(values), 2, 3)
        # The output's place p is the input's place p / stretch, both counted from the start; likewise for bands.
        time = longest / values.shape[1] / stretch
        matrix[:, 0, 0], matrix[:, 0, 2] = 1 / warp, 1 / warp - 1
        matrix[:, 1, 1], matrix[:, 1, 2] = time, time - 1
        own, others = values.float().split([settings.bands, values.shape[2] - settings.bands], 2)
        x = bilinear_warp(own[:, None], matrix, (longest, settings.bands), SILENCE)[:, 0]
        if self.prepared is not None:
            silence = self.prepared.silence(others, within(lengths, others.shape[1])[..., None])
            others = self._stretched(others, matrix, longest, silence)
        if not mask_parts:
            return torch.cat((x, others), 2) if self.prepared is not None else x, new_lengths
        bands, frames = torch.arange(settings.bands), torch.arange(longest)
        height = bands / (settings.bands - 1)
        curve = signed[:, 6, None] * (2 * height - 1) + signed[:, 7, None] * (2 * math.pi * height).cos()
        x = (x + settings.equalise * curve[:, None]).clamp(min=SILENCE)
        width = uniforms[:, 2, None] * settings.mask_bands * settings.bands
        start = uniforms[:, 3, None] * (settings.bands - width)
        x = x.masked_fill(((bands >= start) & (bands < start + width))[:, None, :], SILENCE)
        span = uniforms[:, 4, None] * settings.mask_time * new_lengths[:, None]
        start = uniforms[:, 5, None] * (new_lengths[:, None] - span)
        gone = ((frames >= start) & (frames < start + span))[..., None]
        x = x.masked_fill(gone, SILENCE)
        if self.prepared is None:
            return x, new_lengths
        return torch.cat((x, torch.where(gone, silence, others)), 2), new_lengths

    def _stretched(self, others: Tensor, matrix: Tensor, longest: int, silence: Tensor) -> Tensor:
        """What the encoder hears (N, T, row), changed by the same maps; of a waveform the tempo and with it the
        pitch."""
        assert self.prepared is not None
        row = others.shape[2]
        if self.prepared.hf_encoder.reads == "mel":
            return bilinear_warp((others - silence)[:, None], matrix, (longest, row), 0.0)[:, 0] + silence
        matrix = matrix.clone()
        matrix[:, 0] = torch.tensor([1.0, 0.0, 0.0])
        wave = bilinear_warp(others.flatten(1)[:, None, :, None], matrix, (longest * row, 1), 0.0)
        return wave[:, 0, :, 0].unflatten(1, (longest, row))

    def token_count(self, length: int) -> int:
        return math.ceil(length / PATCH)

    def code_count(self, length: int) -> int:
        return math.ceil(length / PATCH) * self.settings.codes_per_patch

    def features(self, samples: np.ndarray) -> Tensor:
        """(N, 1, bands, frames), every sample cut or padded to the longest clip."""
        values = np.full((len(samples), self.settings.frames, self.settings.bands), SILENCE, np.float32)
        for row, sample in zip(values, samples, strict=True):
            row[: len(sample)] = sample[: len(row), : self.settings.bands]
        return torch.from_numpy(values).transpose(1, 2)[:, None] - SILENCE

    def grid(self, sample: np.ndarray) -> tuple[int, int]:
        """Regions of some 80 ms and 8 bands; beside what an encoder hears, of time alone."""
        return math.ceil(len(sample) / 8), 1 if self.prepared is not None else self.settings.bands // 8

    @staticmethod
    def test_views(samples: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
        """The samples as they are, alone."""
        return [samples]

    def removed(self, sample: np.ndarray) -> np.ndarray:
        """Silence."""
        if self.prepared is None:
            return np.full_like(sample, SILENCE)
        own, others = np.split(sample, [self.settings.bands], 1)
        values = torch.from_numpy(others.astype(np.float32))[None]
        silent = float(self.prepared.silence(values, torch.ones(1, len(sample), 1, dtype=torch.bool)))
        return np.concatenate((np.full_like(own, SILENCE), np.full_like(others, silent)), 1)

    def spot(self, sample: np.ndarray, row: int, column: int) -> str:
        rows, columns = self.grid(sample)
        start, stop = (-(-k * len(sample) // rows) / 100 for k in (row, row + 1))
        time = f"{start:.2f} to {stop:.2f} s"
        if columns == 1:
            return time
        top = 2595 * math.log10(1 + self.settings.rate / 2 / 700)
        low, high = (700 * (10 ** (top * k / columns / 2595) - 1) for k in (column, column + 1))
        return f"{time}, {low:.0f} to {high:.0f} Hz"

    def code_cells(self, count: int) -> tuple[tuple[int, int], np.ndarray]:
        groups = self.settings.codes_per_patch
        return (math.ceil(count / groups), 1), np.arange(count) // groups

    def marked(self, sample: np.ndarray, weights: np.ndarray | None) -> PILImage.Image:
        """A spectrogram above its seconds."""
        bands = self.settings.bands
        pixels = tinted(_shades(sample[:, :bands]), None if weights is None else weights[:, :bands].T[::-1])
        wide = max(480 // len(sample), 1)
        pixels = pixels.repeat(3, 0).repeat(wide, 1)
        image = PILImage.new("RGB", (pixels.shape[1], pixels.shape[0] + 14), "white")
        image.paste(PILImage.fromarray(pixels), (0, 0))
        pen = ImageDraw.Draw(image)
        for tenth in range(0, len(sample) // 10 + 1, 2):
            pen.text((tenth * 10 * wide + 2, pixels.shape[0] + 1), f"{tenth / 10:.1f} s", fill="black")
            pen.line((tenth * 10 * wide, pixels.shape[0], tenth * 10 * wide, pixels.shape[0] + 5), fill="black")
        return image

    def codec_errors(self, samples: list[np.ndarray], rebuilt: list[np.ndarray]) -> np.ndarray:
        """Mean absolute differences of the scaled log-mel."""
        pairs = zip(samples, rebuilt, strict=True)
        return np.array([np.abs(a.astype(np.float32)[:, : b.shape[1]] - b[: len(a)]).mean() for a, b in pairs])

    def preview_sample(self, sample: np.ndarray) -> SamplePreview:
        """A spectrogram, and the clip."""
        return SamplePreview(spectrogram(sample[:, : self.settings.bands]), self.to_bytes(sample))

    def to_object(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """(waveform float32, rate)."""
        own = torch.tensor(values[:, : self.settings.bands])  # a copy: what a reader maps may not be written to
        return self.mel.invert(own).numpy(), self.settings.rate

    def to_bytes(self, values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        wave, rate = self.to_object(values)
        soundfile.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
        return buffer.getvalue()
