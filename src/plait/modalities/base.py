"""What every modality answers, and the one vocabulary they share.

A modality is one file. It turns a raw input into a *sample* (an array the same for every use), samples into a
padded batch, a batch into embeddings (its encoder) and into codes and back (its codec).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from plait.core.features import ExtensionPoint

END, PAD = "<|endoftext|>", "<|pad|>"
AUGMENT_DRAWS = 8  # random numbers that a sample's augmentation is given


class Codec(Protocol):
    """The way out: samples <-> codes. Trained before the backbone, then frozen."""

    levels: list[int]  # of each FSQ digit of one code

    def loss(self, values: Tensor, lengths: Tensor) -> Tensor: ...

    def encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(N, ...) samples to (N, codes) integers; what lies beyond `code_count(length)` is padding."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """(N, codes) integers to samples (N, ...)."""
        ...


@dataclass(frozen=True)
class SamplePreview:
    """A sample for people: an image (PNG) of it, and where it is heard, an audio file (WAV)."""

    image: bytes
    audio: bytes | None = None


@dataclass(frozen=True)
class Recognition:
    """Settings of a modality that is recognised and not made, and what to tell of them, a line each."""

    settings: dict[str, Any]
    lines: list[str] = field(default_factory=list)


class MediaModality(Protocol):
    """A modality other than text. Its modules live in the model; its settings in `preprocessor_config.json`."""

    name: ClassVar[str]
    variable_length: ClassVar[bool]  # whether the number of codes differs from sample to sample
    writable: ClassVar[bool]  # whether it has a codec; else it is read alone
    made_per_row: ClassVar[int]  # samples made for a label that a report shows
    making_task: ClassVar[str]  # the task of metric keys in which samples are made from labels: "drawing"
    codec_metric: ClassVar[str]  # the metric that `codec_errors` gives: "psnr"
    shown: ClassVar[int]  # samples that a report shows in a row

    settings: BaseModel
    encoder: nn.Module  # (values, lengths) -> (N, tokens, D)
    codec: Any

    def sample(self, raw: Any) -> np.ndarray:
        """A file's bytes or a Python object (PIL image, waveform) to a sample, fitted as the settings say."""
        ...

    def blank(self) -> np.ndarray:
        """A sample as large as one may be, with nothing in it."""
        ...

    def windows(self, raw: Any) -> list[np.ndarray]:
        """The samples that cover an input longer than one sample may be; usually one."""
        ...

    def batch(self, samples: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Samples to values (N, ...), padded, and lengths (N,)."""
        ...

    @property
    def augments(self) -> bool:
        """Whether `augment` changes anything, by the settings."""
        ...

    def augment(
        self, values: Tensor, lengths: Tensor, uniforms: Tensor, mask_parts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Changes that keep the meaning; `uniforms` (N, AUGMENT_DRAWS) is uniform in [0, 1). Without `mask_parts`,
        nothing is masked: for samples that are to be written, not read."""
        ...

    def token_count(self, length: int) -> int:
        """How many embeddings a sample of this length becomes."""
        ...

    def code_count(self, length: int) -> int:
        """How many codes a sample of this length becomes."""
        ...

    def features(self, samples: np.ndarray) -> Tensor:
        """Samples to (N, C, H, W) floats for a plain convolutional classifier."""
        ...

    def grid(self, sample: np.ndarray) -> tuple[int, int]:
        """How many regions an explanation cuts a sample into, along its first two dimensions."""
        ...

    @property
    def occluded(self) -> Sequence[tuple[int, int]]:
        """The sizes, in (rows, columns) of a sample's grid, of what occlusion takes away at once."""
        ...

    def test_views(self, samples: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
        """The samples in the views that a recogniser is asked about, whose answers are averaged; the first is as they
        are."""
        ...

    def removed(self, sample: np.ndarray) -> np.ndarray:
        """A sample of the same shape with nothing in it: what a region becomes that is taken away."""
        ...

    def spot(self, sample: np.ndarray, row: int, column: int) -> str:
        """Where a region of the grid lies, for people."""
        ...

    def code_cells(self, count: int) -> tuple[tuple[int, int], np.ndarray]:
        """The grid that a sample's codes make along its first two dimensions, and the cell (count,) of each."""
        ...

    def marked(self, sample: np.ndarray, weights: np.ndarray | None) -> PILImage.Image:
        """The sample as an image, marked red where weights (its first two dimensions), in [-1, 1], are positive and
        blue where they are negative; without weights as it is."""
        ...

    def codec_errors(self, samples: list[np.ndarray], rebuilt: list[np.ndarray]) -> np.ndarray:
        """`codec_metric` of each sample (N,) after the codec."""
        ...

    def preview_sample(self, sample: np.ndarray) -> SamplePreview:
        """A sample to look at, or to listen to."""
        ...

    def to_bytes(self, values: np.ndarray) -> bytes:
        """A decoded sample to the bytes of a file."""
        ...

    def to_object(self, values: np.ndarray) -> Any:
        """A decoded sample to what a Python user expects: a PIL image, or (waveform, rate)."""
        ...


class RowModality(Protocol):
    """A modality of things that have one row each, for reading and for predicting, with ids beyond the vocabulary."""

    name: ClassVar[str]
    counts: Tensor  # (N,) how often each thing stands in the training data

    @property
    def sampled(self) -> int:
        """How many things are drawn to stand for all in the softmax of a training step; 0: all of them."""
        ...

    def __len__(self) -> int: ...

    def rows(self) -> Tensor:
        """The row of each thing, (N, D)."""
        ...


Role = Literal["media", "rows", "codes"]


def role_of(modality: object) -> Role:
    """How a modality takes part in a model: through an encoder and a codec ("media"), with a row a thing beyond the
    vocabulary ("rows"), or by codes that were fitted before training ("codes"). Its class says so as `role`."""
    role: Role = getattr(modality, "role", "media")
    return role


def code_levels(name: str, settings: Any) -> dict[str, list[int]]:
    """Token type -> the levels of one code's digits: what a modality of these settings adds to the vocabulary."""
    own: dict[str, list[int]] | None = getattr(settings, "code_levels", None)
    if own is not None:
        return own
    return {name: settings.levels} if settings.levels else {}


class EncoderSource(Protocol):
    """Pretrained encoders, which a feature adds."""

    def describe(self, encoder: object, modality: str) -> BaseModel:
        """The settings of the encoder that a recipe names for a modality. Raises PlaitError where it is none."""
        ...

    def fill(self, modality: MediaModality) -> None:
        """Give a new modality's encoder its pretrained weights. Raises PlaitError where they are missing."""
        ...


ENCODER_SOURCES: ExtensionPoint[EncoderSource] = ExtensionPoint("encoder_source")


class Vocabulary(BaseModel):
    """All ids of a model: text, special tokens, then the codes of each modality, in disjoint ranges.

    Text may be followed by `<|endoftext|>`, `<|pad|>`, one opener for each column of the data (`<|image|>`, `<|en|>`)
    and one for each side of a conversation (`<|user|>`): they belong to the text space. A modality's space holds its
    codes and, where its length varies, a closing token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: int
    columns: dict[str, str]  # column -> modality, in the data's order
    levels: dict[str, list[int]]  # modality -> levels of the FSQ digits of one code
    closers: list[str]  # modalities whose spans end with a token of their own
    end_id: int | None = None  # of an imported tokenizer that brings its own end token
    more_ends: list[int] | None = None  # further ids at which an imported model's texts end
    turns: list[str] = []  # who may speak in a conversation, a token each; none where the model knows no conversations

    @property
    def specials(self) -> list[str]:
        """The names of the special tokens, in the order of their ids."""
        return [END, PAD, *(f"<|{name}|>" for name in (*self.columns, *self.turns))]

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError where there is none."""
        return self.text + self.specials.index(name)

    @property
    def end(self) -> int:
        """The id that ends what is written."""
        return self.special(END) if self.end_id is None else self.end_id

    @property
    def pad(self) -> int:
        """The id of padding."""
        return self.special(PAD)

    def opener(self, column: str) -> int:
        """The id that opens a span of a column, or a turn of a conversation."""
        return self.special(f"<|{column}|>")

    @property
    def id_ranges(self) -> dict[str, tuple[int, int]]:
        """Space -> (first id, one past the last)."""
        stop = self.text + len(self.specials)
        id_ranges = {"text": (0, stop)}
        for modality, levels in self.levels.items():
            start, stop = stop, stop + int(np.prod(levels)) + (modality in self.closers)
            id_ranges[modality] = (start, stop)
        return id_ranges

    def closer(self, modality: str) -> int:
        """The id that ends a medium of varying length."""
        return self.id_ranges[modality][1] - 1

    @property
    def size(self) -> int:
        """How many ids there are."""
        return max(stop for _, stop in self.id_ranges.values())

    def names(self) -> list[str]:
        """The token names of all ids from `text` on, for export."""
        names = list(self.specials)
        for modality, levels in self.levels.items():
            names += [f"<|{modality}:{code}|>" for code in range(int(np.prod(levels)))]
            names += [f"<|/{modality}|>"] if modality in self.closers else []
        return names


def padded(samples: list[np.ndarray], fill: float, dtype: Any, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Samples (L, C) of unlike lengths as one batch, (N, `length` or the longest, C), filled up; and lengths (N,)."""
    lengths = torch.tensor([len(sample) for sample in samples])
    values = np.full((len(samples), length or int(lengths.max()), samples[0].shape[1]), fill, dtype)
    for row, sample in zip(values, samples, strict=True):
        row[: len(sample)] = sample
    return torch.from_numpy(values), lengths


def same_network(a: BaseModel, b: BaseModel) -> bool:
    """Whether two settings of a modality make the same network for the same inputs: all but what only training uses."""
    training_only: set[str] = set(getattr(a, "TRAINING", ()))
    return a.model_dump(exclude=training_only) == b.model_dump(exclude=training_only)


def bilinear_warp(values: Tensor, matrix: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Resample values (N, C, H, W) through affine maps (N, 2, 3) of output to input places in [-1, 1]."""
    grid = nn.functional.affine_grid(matrix, [len(values), 1, *size], align_corners=False)
    warped = nn.functional.grid_sample(values - fill, grid, mode="bilinear", align_corners=False)
    return warped + fill


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, ...) at each place: no batch statistics, blind to padding elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def overlapping_windows(sample: np.ndarray, longest: int) -> list[np.ndarray]:
    """A sample (T, row) as windows of at most `longest` rows, which overlap by half and cover all of it."""
    if len(sample) <= longest:
        return [sample]
    starts = [*range(0, len(sample) - longest, max(longest // 2, 1)), len(sample) - longest]
    return [sample[start : start + longest] for start in starts]


def within(lengths: Tensor, longest: int) -> Tensor:
    """(N, longest), True at the places that exist."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def cells(shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """(shape) int: the cell of a grid, counted row by row, that each place lies in."""
    rows, columns = (np.arange(size) * count // size for size, count in zip(shape, grid, strict=True))
    return rows[:, None] * grid[1] + columns


def tinted(pixels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Pixels (H, W, 3) uint8 in grey, red where weights (H, W) are positive and blue where they are negative; as they
    are without weights."""
    if weights is None:
        return np.ascontiguousarray(pixels)
    grey = pixels.astype(np.float32).mean(-1, keepdims=True) * 0.75 + 32
    strength = np.abs(weights)[..., None].clip(0, 1) ** 0.7 * 0.8
    colour = np.where(weights[..., None] > 0, [225.0, 30.0, 30.0], [40.0, 90.0, 235.0])
    return (grey * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8)
