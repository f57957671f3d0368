"""A whole classifier as one network: pixels or a waveform in, probabilities of labels and an out-of-distribution score
out. It computes what `modalities.simple_features` and `modalities.audio` compute with NumPy and FFTs, in operations
that ONNX has.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.classifiers.classifier import Classifier
from plait.core.errors import PlaitError
from plait.modalities.audio import FLOOR, SILENCE, AudioSettings, mel_filters
from plait.modalities.base import MediaModality
from plait.modalities.image import view_places
from plait.modalities.recogniser import Recogniser
from plait.modalities.simple_features import (
    BEATS,
    BINS,
    CELL,
    CEPSTRA,
    CHANGES,
    COLOUR_GRID,
    EMPTY,
    FLAT,
    SEGMENTS,
    SIDE,
    STRIDE,
)


class ImageFeatures(nn.Module):
    """`modalities.simple_features.image_features` of images (N, H, W, C) from 0 to 255: (N, F).

    Up to the choice of a channel it computes in the same order, so that both choose the same; see there.
    """

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.block = max(min(height, width) // SIDE, 1)
        self.height, self.width = (size // self.block for size in (height, width))
        self.channels = channels
        self.cell = min(CELL, self.height, self.width)
        grids = []
        for extent in (self.height, self.width):
            parts = [part for part in np.array_split(np.arange(extent), COLOUR_GRID) if len(part)]
            grids.append(
                torch.tensor(np.array([np.isin(np.arange(extent), part) / len(part) for part in parts])).float()
            )
        self.rows: Tensor
        self.columns: Tensor
        self.brightest = float(255 * self.block**2)
        self.register_buffer("rows", grids[0])  # (R, H) means of stripes
        self.register_buffer("columns", grids[1])

    def forward(self, values: Tensor) -> Tensor:
        height, width = self.height * self.block, self.width * self.block
        x = values[:, :height, :width].permute(0, 3, 1, 2)
        if self.block > 1:
            x = x.unflatten(3, (self.width, self.block)).unflatten(2, (self.height, self.block)).sum((3, 5))
        return torch.cat((self._gradients(x), self._colours(x / self.brightest)), 1)

    def _gradients(self, x: Tensor) -> Tensor:
        down, right = _slope(x, 2), _slope(x, 3)
        strongest = (down * down + right * right).argmax(1, keepdim=True)
        down, right = (one.gather(1, strongest)[:, 0] for one in (down, right))
        size = (down * down + right * right).sqrt() / self.brightest
        upright = right == 0  # ONNX has no atan2, and its replacement is not a number where there is no gradient
        angle_bin = torch.atan(down / torch.where(upright, torch.ones_like(right), right))
        angle_bin = torch.where(upright, torch.full_like(angle_bin, math.pi / 2), angle_bin)
        angle_bin = torch.remainder(angle_bin, math.pi) * (BINS / math.pi)
        low, share = angle_bin.floor(), angle_bin - angle_bin.floor()
        bins = torch.arange(BINS)[None, :, None, None]
        first = (torch.remainder(low, BINS)[:, None] == bins) * (size * (1 - share))[:, None]
        second = (torch.remainder(low + 1, BINS)[:, None] == bins) * (size * share)[:, None]
        cells = F.avg_pool2d(first + second, self.cell, STRIDE) * self.cell**2
        cells = cells.permute(0, 2, 3, 1)
        for _ in range(2):
            cells = (cells / (cells.square().sum(-1, keepdim=True).sqrt() + 0.05)).clamp(max=0.4)
        return ((cells.clamp(min=0) + EMPTY).sqrt() - math.sqrt(EMPTY)).flatten(1)

    def _colours(self, x: Tensor) -> Tensor:
        mean = self.rows @ x @ self.columns.t()  # (N, C, R, S)
        away = x - (self.rows > 0).float().t() @ mean @ (self.columns > 0).float()
        spread = (self.rows @ away.square() @ self.columns.t()).sqrt()
        features = [one.permute(0, 2, 3, 1).flatten(1) for one in (mean, spread)]
        if self.channels == 3:
            red, green, blue = (x * 3.999).floor().unbind(1)
            codes = (red * 16 + green * 4 + blue).flatten(1)
            counts = (codes[:, None] == torch.arange(64)[None, :, None]).float().mean(2)
            features.append(counts.sqrt())
        return torch.cat(features, 1)


def _slope(x: Tensor, axis: int) -> Tensor:
    """`numpy.gradient` along an axis of x (N, C, H, W)."""
    length = x.shape[axis]
    before, after = x.narrow(axis, 0, length - 2), x.narrow(axis, 2, length - 2)
    first = x.narrow(axis, 1, 1) - x.narrow(axis, 0, 1)
    last = x.narrow(axis, length - 1, 1) - x.narrow(axis, length - 2, 1)
    return torch.cat((first, (after - before) / 2, last), axis)


class LogMelGraph(nn.Module):
    """`LogMel.forward` of a waveform that is filled up behind its end: (1, frames, bands) and the number of frames."""

    def __init__(self, settings: AudioSettings) -> None:
        super().__init__()
        self.settings = settings
        places = torch.arange(settings.window, dtype=torch.float64)
        window = torch.hann_window(settings.window, dtype=torch.float64)
        turns = (
            torch.arange(settings.fft // 2 + 1, dtype=torch.float64)[:, None] * places * (2 * math.pi / settings.fft)
        )
        basis = torch.cat((turns.cos() * window, turns.sin() * window)).float()[:, None]  # (2 bins, 1, window)
        self.basis: Tensor
        self.filters: Tensor
        self.register_buffer("basis", basis)
        self.register_buffer("filters", mel_filters(settings.rate, settings.fft, settings.bands))

    def forward(self, waveform: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """`waveform` (1, frames * hop), of which `samples` (1,) count."""
        s, count = self.settings, samples[:, None]
        wave = waveform * (torch.arange(waveform.shape[1])[None] < count)
        level = (wave.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-5)
        least = torch.maximum(count, torch.tensor(s.fft // 2 + 1))  # short ones are filled up before they are mirrored
        places = _distance(torch.arange(s.frames * s.hop + s.fft)[None] - s.fft // 2)
        places = (least - 1) - _distance((least - 1) - places)  # mirrored at both ends
        room = F.pad(wave, (0, s.fft)) * (0.1 / level)
        mirrored = room.gather(1, places.clamp(min=0, max=room.shape[1] - 1))
        margin = (s.fft - s.window) // 2
        spectrum = F.conv1d(mirrored[:, None, margin:], self.basis, stride=s.hop)[:, :, : s.frames]
        cosines, sines = spectrum.chunk(2, 1)
        mel = (cosines.square() + sines.square()).transpose(1, 2) @ self.filters
        frames = torch.div(least[:, 0], s.hop, rounding_mode="floor") + 1
        scaled = (mel.clamp(min=FLOOR).log() - math.log(FLOOR)) / 6 + SILENCE
        return scaled.half().float(), frames.clamp(max=s.frames)


def _distance(x: Tensor) -> Tensor:
    """|x| of integers, for which LiteRT has no operation."""
    return torch.maximum(x, -x)


class AudioFeatures(nn.Module):
    """`modalities.simple_features.audio_features` of one log-mel (1, T, bands) of which `frames` (1,) count: (1, F)."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        basis = np.cos(math.pi / bands * np.outer(np.arange(bands) + 0.5, np.arange(CEPSTRA))) / math.sqrt(bands)
        self.basis: Tensor
        self.register_buffer("basis", torch.from_numpy(basis).float())

    def forward(self, values: Tensor, frames: Tensor) -> Tensor:
        count = frames[:, None].float()
        places = torch.arange(values.shape[1])[None].float()
        exists = (places < count).float()[..., None]
        cepstra = (values @ self.basis) * exists
        mean = cepstra.sum(1) / count
        centred = (cepstra - mean[:, None]) * exists
        edges = torch.arange(SEGMENTS + 1)[None].float() * count / SEGMENTS
        starts = torch.minimum((edges[:, :-1] + 1e-4).floor(), count - 1)
        stops = torch.maximum((edges[:, 1:] - 1e-4).ceil(), starts + 1)
        inside = ((places[:, None] >= starts[..., None]) & (places[:, None] < stops[..., None])).float()
        grid = inside @ centred / (stops - starts)[..., None]
        spread = (centred.square().sum(1) / count).sqrt()
        beyond = (1 - exists) * 1e4  # what does not exist is no extreme
        most, least = (cepstra - beyond).amax(1), (cepstra + beyond).amin(1)
        third = (centred**3).sum(1) / count
        skewness = third.sign() * third.abs().clamp(min=1e-18) ** (1 / 3)
        changes = []
        for frames_apart in (1, *CHANGES):
            moved = (cepstra[:, frames_apart:] - cepstra[:, :-frames_apart]).abs() * exists[:, frames_apart:]
            changes.append(moved.sum(1) / (count - frames_apart).clamp(min=1))
        level = values.mean(2) * exists[..., 0]
        middle = level.sum(1, keepdim=True) / count
        above = ((level - middle).clamp(min=0) + FLAT) * exists[..., 0]
        loud = (cepstra * above[..., None]).sum(1) / above.sum(1, keepdim=True)
        steady = (mean, spread, most, least, skewness, *changes, loud)
        return torch.cat(
            (grid.flatten(1), *steady, self._loudness(level, middle, exists[..., 0], count), count.log()), 1
        )

    @staticmethod
    def _loudness(level: Tensor, middle: Tensor, exists: Tensor, count: Tensor) -> Tensor:
        """`modalities.simple_features._loudness` of levels (1, T) about their mean (1, 1), where they exist."""
        about = (level - middle) * exists
        spread = (about.square().sum(1, keepdim=True) / count).sqrt()
        unit = about / (spread + 1e-3)
        again = [(unit[:, n:] * unit[:, :-n]).sum(1, keepdim=True) / (count - n).clamp(min=1) for n in BEATS]
        beyond = (1 - exists) * 1e4
        extremes = (level - beyond).amax(1, keepdim=True), (level + beyond).amin(1, keepdim=True)
        return torch.cat((*extremes, spread, *again), 1)


class ClassifierGraph(nn.Module):
    """Inputs to `probabilities` (1, L) and `ood_score` (1,). Opinions are those that need no backbone."""

    def __init__(self, classifier: Classifier, modality: MediaModality) -> None:
        super().__init__()
        self.timed = modality.variable_length  # log-mel, else pixels
        encoder = modality.encoder
        self.target = classifier.target
        self.encoder = encoder if isinstance(encoder, Recogniser) and self.target in encoder.columns else None
        self.mirrored = classifier.mirrored
        self.shifts = 0
        mixture = classifier.portable
        if mixture is None or classifier.features.grams is not None:
            raise PlaitError(
                f"The classifier of {classifier.target} reads texts or was fitted without a network; only classifiers "
                "of images and audio clips are exported. Serve it: plait serve."
            )
        self.mixture = mixture
        features = classifier.features
        assert features.mean is not None and features.scale is not None
        settings: Any = modality.settings
        if self.timed:
            self.features: nn.Module = AudioFeatures(features.bands)
            self.mel = LogMelGraph(settings)
        else:
            self.features = ImageFeatures(settings.size, settings.size, settings.channels)
            places = view_places((settings.size, settings.size))
            self.shifts = len(places)
            for number, (rows, columns) in enumerate(places):
                self.register_buffer(f"view_rows{number}", torch.from_numpy(rows))
                self.register_buffer(f"view_columns{number}", torch.from_numpy(columns))
        for name, value in {
            "mean": features.mean, "scale": features.scale, "weights": classifier.linear.weights,
            "bias": classifier.linear.bias, "quantiles": np.array(mixture.quantiles),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.from_numpy(np.asarray(value)).float())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        views = self._views(*inputs)
        scores = {name: self._opinion(name, views) for name in self.mixture.used}
        total = torch.stack([self.mixture.weights[name] * value for name, value in scores.items()]).sum(0)
        scale = sum(self.mixture.weights[name] * self.mixture.spreads[name] for name in scores)
        familiar = torch.stack(
            [
                self.mixture.weights[name] / scale * (value.amax(1) - self.mixture.centres[name])
                for name, value in scores.items()
            ]
        ).sum(0)
        quantiles = self.get_buffer("quantiles")
        less_familiar = (quantiles[None] <= familiar[:, None]).float().sum(1)
        return self._calibrated(total.softmax(1)), 1 - (1 + less_familiar) / (1 + len(quantiles))

    def _calibrated(self, chances: Tensor) -> Tensor:
        """Probabilities (1, L) whose likeliest class is calibrated on its own, as `Mixture.log_probabilities` does."""
        if (self.mixture.slope, self.mixture.offset) == (1.0, 0.0):
            return chances
        top = chances.amax(1, keepdim=True)
        labels = torch.arange(chances.shape[1], device=chances.device)[None]
        first = (chances.argmax(1, keepdim=True) == labels).to(chances.dtype)
        others = chances * (1 - first)
        other_mass = others.sum(1, keepdim=True).clamp_min(1e-30)
        top_probability = (self.mixture.slope * (top.log() - other_mass.log()) + self.mixture.offset).sigmoid()
        second = others.amax(1, keepdim=True)
        top_probability = torch.maximum(top_probability, second / (other_mass + second))
        return others * ((1 - top_probability) / other_mass) + first * top_probability

    def _views(self, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is looked at, with lengths: images and where they mean the same their mirrored ones, or log-mel."""
        if self.timed:
            return [self.mel(*inputs)]
        pixels = inputs[0].float()
        ones = torch.ones(1, dtype=torch.long)
        return [(pixels, ones), (pixels.flip(2), ones)] if self.mirrored else [(pixels, ones)]

    def _opinion(self, name: str, views: list[tuple[Tensor, Tensor]]) -> Tensor:
        if name == "linear":
            return torch.stack([self._linear(*view) for view in views]).mean(0)
        if self.timed:
            return torch.stack([self._network(*view) for view in views]).mean(0)
        values, ones = views[0]
        looks = [values, *(self._shifted(values, number) for number in range(self.shifts))]
        if self.mirrored:  # after the shift, as `network_scores` has it
            looks += [look.flip(2) for look in looks]
        return torch.stack([self._network(look, ones) for look in looks]).mean(0)

    def _shifted(self, values: Tensor, number: int) -> Tensor:
        """Images as `Image.test_views` shifts them."""
        rows, columns = (self.get_buffer(f"view_{axis}{number}") for axis in ("rows", "columns"))
        return values.index_select(1, rows).index_select(2, columns)

    def _linear(self, values: Tensor, lengths: Tensor) -> Tensor:
        rows = self.features(values, lengths) if self.timed else self.features(values)
        rows = (rows - self.get_buffer("mean")) / self.get_buffer("scale")
        return rows @ self.get_buffer("weights") + self.get_buffer("bias")

    def _network(self, values: Tensor, lengths: Tensor) -> Tensor:
        assert self.encoder is not None
        return self.encoder.logits(values, lengths)[self.target]
