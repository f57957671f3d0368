"""What pretrained encoders say of texts, images and audio: features, made once and kept by their content.

Shapes: N inputs, V views of each, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn

from plait.core.device import Device, keep_memory
from plait.core.errors import PlaitError
from plait.core.interruption import pause_point
from plait.data.dataset import Dataset
from plait.hf.pretrained import Pretrained, load_pretrained
from plait.modalities.audio_files import decode_audio
from plait.modalities.base import ENCODER_SOURCES, MediaModality
from plait.modalities.descriptor import MediaError
from plait.modalities.inputs import as_audio
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.adapted import weight_sums

VERSION = 4  # of what is kept
# How fast a clip is heard, each a view of it that the head learns and whose scores are averaged: slower and lower, it
# sounds like another speaker (docs/benchmarks/quality.md).
SPEEDS = {"audio": (1.0, 0.85)}
BATCH = 32  # media at a time


class Encoder(Protocol):
    """A frozen network that turns inputs of a kind into features."""

    kind: str
    settings: dict[str, Any]  # what is needed to build it again, beside the encoder's own files
    views: int  # of each input, V

    def features(self, values: Sequence[Any]) -> np.ndarray:
        """(N, V F) float32, the features of each view one after the other. Raises PlaitError for what is none of its
        kind, and for a file that cannot be read."""
        ...


@dataclass(frozen=True)
class LabelledRecords:
    """The records of a split that have a label and what is read.

    Attributes:
        source: The column of what is read.
        indices: Numbers of the records, (N,), ascending.
        classes: The number of each one's label, (N,).
    """

    dataset: Dataset
    source: str
    indices: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, split: str, source: str, target: str, labels: Sequence[str]) -> LabelledRecords:
        """Those of a split that have one of the labels in the column `target`."""
        indices, texts = records_with(dataset, split, source), dataset.texts(target)
        number = {label: i for i, label in enumerate(labels)}
        indices = np.array([i for i in indices if texts[i] in number], np.int64)
        return cls(dataset, source, indices, np.array([number[str(texts[i])] for i in indices], np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int) -> Iterator[list[Any]]:
        """What is read, so many at a time."""
        records = self.dataset.iterate(self.indices, [self.source])
        while part := list(islice(records, size)):
            yield [record.parts[self.source] for record in part]


def records_with(dataset: Dataset, split: str, column: str) -> np.ndarray:
    """The numbers of a split's records that have something in a column, ascending."""
    indices = dataset.indices(split)
    present = [cells.is_valid().to_numpy(False) for cells in dataset.cells(column, indices)]
    return indices[np.concatenate([np.zeros(0, bool), *present])]


@dataclass(frozen=True)
class Variant:
    """How an input is read: how fast a clip is heard, and whether an image is mirrored."""

    speed: float = 1.0
    mirrored: bool = False


def _variants(kind: str, settings: dict[str, Any]) -> tuple[Variant, ...]:
    """The views of an input, itself first. Images are mirrored where that means the same."""
    if settings.get("flip"):
        return Variant(), Variant(mirrored=True)
    return tuple(Variant(speed) for speed in SPEEDS.get(kind, (1.0,)))


class TextEncoder:
    """Embeddings of unit length, as sentence-transformers has them."""

    kind, views = "text", 1

    def __init__(self, folder: Path, device: Device) -> None:
        """Raises PlaitError where the folder holds no text encoder."""
        self.settings: dict[str, Any] = {}
        self.model: Pretrained = load_pretrained(folder, device.name, device.storage)

    def features(self, values: Sequence[Any]) -> np.ndarray:
        pause_point()
        return self.model.embed_inputs(list(values))


class MediaEncoder:
    """The hidden states of a vision or audio encoder over places: of images their mean and their greatest or first, of
    audio their mean, spread, and the means of a clip's beginning, middle and end."""

    def __init__(self, kind: str, folder: Path, settings: dict[str, Any], device: Device) -> None:
        if device.kind == "cpu":
            keep_memory()  # the states of each block are large: some 2.5 times as fast at 224 pixels
        self.kind, self.settings, self.device = kind, settings, device
        self.variants = _variants(kind, settings)
        self.views = len(self.variants)
        self.means_only = False  # of images, as where the last blocks are trained
        modality: Any = MODALITIES[kind](SETTINGS[kind].model_validate({**settings, "encoder": f"hf:{folder}"}), 8)
        ENCODER_SOURCES.one().fill(modality)
        self.modality: MediaModality = modality.eval().to(device.torch)
        self.network: nn.Module = self.modality.encoder.hf_encoder.network
        self.network.to(memory_format=torch.channels_last)

    @property
    def reads_pixels(self) -> bool:
        """Whether it is a vision encoder."""
        encoder: Any = self.modality.encoder
        return bool(encoder.known.reads == "pixels")

    def load_blocks(self, file: Path) -> None:
        """Put trained blocks in the place of the encoder's own."""
        self.network.load_state_dict(load_tensors(file), strict=False)
        self.means_only = True

    def features(self, values: Sequence[Any]) -> np.ndarray:
        return np.concatenate([self._view(values, variant) for variant in self.variants], 1)

    def pixels(self, values: Sequence[Any], variant: Variant) -> Tensor:
        """What the encoder reads of images, (N, 3, H, W)."""
        inputs, _ = self.modality.batch([self._sample(value, variant) for value in values])
        encoder: Any = self.modality.encoder
        pixels: Tensor = encoder.pixels(inputs.to(self.device.torch))
        return pixels.contiguous(memory_format=torch.channels_last)

    def raw_pixels(self, values: Sequence[Any]) -> Tensor:
        """Images as large as the encoder reads them, (N, 3, H, W), in [0, 1]."""
        encoder: Any = self.modality.encoder
        pixels: Tensor = self.pixels(values, Variant()) * encoder.std + encoder.mean
        return pixels

    def scale_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Read pixels with another mean and deviation than the encoder's files say."""
        encoder: Any = self.modality.encoder
        self.settings["hf_encoder"] = {**self.settings["hf_encoder"], "mean": list(mean), "std": list(std)}
        encoder.mean = torch.tensor(mean, device=self.device.torch).view(-1, 1, 1)
        encoder.std = torch.tensor(std, device=self.device.torch).view(-1, 1, 1)

    def _view(self, values: Sequence[Any], variant: Variant) -> np.ndarray:
        rows = []
        for start in range(0, len(values), BATCH):
            pause_point()
            samples = [self._sample(value, variant) for value in values[start : start + BATCH]]
            inputs, lengths = self.modality.batch(samples)
            with torch.inference_mode(), self.device.autocast():
                rows.append(self._pooled(inputs.to(self.device.torch), lengths.to(self.device.torch)).float().cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, 0), np.float32)

    def _sample(self, value: Any, variant: Variant) -> np.ndarray:
        if not isinstance(value, np.ndarray):
            accepted = isinstance(value, (Path, bytes, PILImage.Image if self.reads_pixels else tuple))
            if not accepted:  # nor a str, which may come over the network, and must open no file
                what = "a text" if isinstance(value, str) else type(value).__name__
                raise PlaitError(f"An input of kind {self.kind} is wanted, not {what}.")
            try:
                if variant.speed != 1.0:
                    wave, rate = as_audio(value) or decode_audio(value)
                    value = wave, round(rate * variant.speed)
                value = self.modality.windows(value)[0]
            except MediaError as error:
                raise PlaitError(f"{value if isinstance(value, Path) else 'The ' + self.kind}: {error}.") from error
        return np.ascontiguousarray(value[:, ::-1]) if variant.mirrored else value

    def pool_image(self, states: Tensor) -> Tensor:
        """Features (N, F) of the last hidden states of images."""
        if states.ndim != 4:
            return torch.cat((states[:, 0], states.mean(1)), 1)
        return states.mean((2, 3)) if self.means_only else torch.cat((states.mean((2, 3)), states.amax((2, 3))), 1)

    def _pooled(self, values: Tensor, lengths: Tensor) -> Tensor:
        encoder: Any = self.modality.encoder
        if encoder.known.reads == "pixels":
            pixels = encoder.pixels(values).contiguous(memory_format=torch.channels_last)
            return self.pool_image(encoder.hf_encoder(pixel_values=pixels))
        states = encoder.hf_encoder(**encoder.heard(values, lengths))
        share = lengths.float() / encoder.settings.frames  # of the states that belong to the clip
        count = (share * states.shape[1]).ceil().clamp(min=1)
        exists = (torch.arange(states.shape[1], device=states.device) < count[:, None])[..., None]
        mean = (states * exists).sum(1) / count[:, None]
        spread = (((states - mean[:, None]) * exists).square().sum(1) / count[:, None]).sqrt()
        place = torch.arange(states.shape[1], device=states.device) / count[:, None]  # in the clip, from 0 to 1
        thirds = []
        for third in range(3):
            inside = ((place >= third / 3) & (place < (third + 1) / 3)).float()[..., None]
            thirds.append((states * inside).sum(1) / inside.sum(1).clamp(min=1))
        return torch.cat((mean, spread, *thirds), 1)


class FeatureCache:
    """Features on disk, known by the content of the encoder and of the data."""

    def __init__(self, folder: Path, encoder: Encoder, place: Path, dataset: Dataset) -> None:
        content = [weight_sums(place), encoder.settings, [shard.sha256 for shard in dataset.manifest.shards], VERSION]
        self.key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder

    def _file(self, split: str) -> Path:
        return self.folder / f"features-{split}-{self.key}.safetensors"

    def get(self, split: str) -> np.ndarray | None:
        """(N, F), None where they are not there, or damaged."""
        try:
            features: np.ndarray = load_file(self._file(split))["features"]
        except Exception:  # of whatever kind, they are made again
            return None
        return features

    def put(self, split: str, features: np.ndarray) -> None:
        """Keep the features (N, F) of a split."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file(split).with_suffix(".tmp")
        save_file({"features": np.ascontiguousarray(features, np.float32)}, temporary)
        temporary.replace(self._file(split))
