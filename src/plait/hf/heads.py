"""A calibrated head over a pretrained encoder: `plait train DATA --init-from ENCODER`, where ENCODER reads texts,
images or audio and is no language model. The encoder is frozen; of images its last blocks are trained where that is
better on records that neither has seen.

Features are made once and kept in the run's folder, by the content of encoder and data; what is fitted on them is a
multinomial logistic regression, whose strength and temperature are chosen on records that it has not seen.
Shapes: N records, F features, C labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from plait.classifiers.mixture import cross_entropy, log_softmax, softened, temperature
from plait.core.config import SIZES, Recipe, Size
from plait.core.device import Device, choose_device
from plait.core.errors import PlaitError
from plait.core.files import json_text, point, publish_folder, read_json, sealed, sha256_file, write_atomic
from plait.core.interruption import pause_point
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.data.record import LABEL_NAMES
from plait.hf import hub, huggingface
from plait.hf.encoders import describe
from plait.hf.last_blocks import LastBlocks, States, features_of, train_last
from plait.hf.pretrained import Pretrained, load_pretrained
from plait.inference.base import Model, Verb
from plait.inference.results import Prediction, Predictions
from plait.modalities.audio_files import decode_audio
from plait.modalities.base import ENCODER_SOURCES, MediaModality
from plait.modalities.hf_encoder import HFEncoder
from plait.modalities.inputs import as_audio, medium_of
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.adapted import weight_sums
from plait.model.checkpoint import MANIFEST, verify
from plait.training.build import fit_settings, label_columns
from plait.training.tasks import mirrors

TYPE = "plait-head"  # model_type in config.json
VERSION = 3
CONFIG, ARRAYS, BLOCKS = "config.json", "head.safetensors", "encoder.safetensors"
STRENGTHS = {"text": (1.0, 3.0, 10.0, 30.0, 100.0), "image": (1e-3, 1e-2, 1e-1), "audio": (1e-3, 1e-2, 1e-1)}
# How fast a clip is heard, each a view of it that the head learns and whose scores are averaged: slower and lower, it
# sounds like another speaker (docs/benchmarks/quality.md).
SPEEDS = {"audio": (1.0, 0.85)}
FEW = 20  # records of val below which folds of train say which strength is best
FOLDS = 5
BATCH = 32  # media at a time
UNLIKE = 0.995  # share of validation records that must look more familiar than an input that is none of the labels
UPSCALED = 4  # times the side of the data's images that a convolutional encoder reads at most: more tells it nothing
STATES_BYTES = 1 << 30  # of what an encoder's first blocks give, which are kept while its last ones are trained
RNG_STREAM = 341  # of the random numbers of `uniform`

Progress = Callable[[str, int, int], None]


# --- encoders ---------------------------------------------------------------------------------------------------


class Encoder(Protocol):
    """A frozen network that turns inputs of a kind into features."""

    kind: str
    settings: dict[str, Any]  # what is needed to build it again, beside the encoder's own files
    views: int  # of each input, V

    def features(self, values: Sequence[Any]) -> np.ndarray:
        """(N, V F) float32, the features of each view one after the other."""
        ...


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
        return self.model.embed_inputs([str(value) for value in values])


class MediaEncoder:
    """The hidden states of a vision or audio encoder over places: of images their mean and their greatest or first, of
    audio their mean, spread, and the means of a clip's beginning, middle and end."""

    def __init__(self, kind: str, folder: Path, settings: dict[str, Any], device: Device) -> None:
        self.kind, self.settings, self.device = kind, settings, device
        self.variants = _variants(kind, settings)
        self.views = len(self.variants)
        self.means_only = False  # of images, as where the last blocks are trained
        modality: Any = MODALITIES[kind](SETTINGS[kind].model_validate({**settings, "encoder": f"hf:{folder}"}), 8)
        ENCODER_SOURCES.one().fill(modality)
        self.modality: MediaModality = modality.eval().to(device.torch)
        self.network: nn.Module = self.modality.encoder.hf_encoder.network
        self.network.to(memory_format=torch.channels_last)

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
            if variant.speed != 1.0:
                wave, rate = as_audio(value) or decode_audio(value)
                value = wave, round(rate * variant.speed)
            value = self.modality.windows(value)[0]
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


def is_encoder(name_or_folder: str | Path) -> bool:
    """Whether a name stands for a model of transformers that is no language model of our engine, nor one of ours."""
    try:
        folder = hub.find(name_or_folder)
    except PlaitError:
        return False
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and config.get("model_type") not in ("plait", TYPE) and not huggingface.runs(folder)


# --- the head ---------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """Log-probabilities of labels from features: softmax((x - mean) / scale @ weights + bias), times `heat`, of scores
    averaged over the views of an input. Features are (N, V F)."""

    labels: list[str]
    weights: np.ndarray  # (F, C)
    bias: np.ndarray  # (C,)
    mean: np.ndarray  # (F,)
    scale: np.ndarray  # (F,)
    heat: float
    centres: np.ndarray  # (C, F) mean of each label's records
    familiar: np.ndarray  # of validation records, ascending: how near the nearest centre is

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, C), in nats."""
        return log_softmax(self.heat * self.scores(self.standard(features)))

    def standard(self, features: np.ndarray) -> np.ndarray:
        """(N, V, F), each feature of mean 0 and spread 1 over train."""
        return np.asarray((features.reshape(len(features), -1, len(self.mean)) - self.mean) / self.scale)

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """(N, C) of standardised views (N, V, F)."""
        return np.asarray((rows @ self.weights + self.bias).mean(1), np.float64)

    def unlike(self, features: np.ndarray) -> np.ndarray:
        """(N,), the share of validation records that look more familiar."""
        near = nearness(self.standard(features)[:, 0], self.centres)
        return 1 - np.searchsorted(self.familiar, near) / max(len(self.familiar), 1)


def nearness(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The cosine of each row (N, F) with the nearest centre (C, F)."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (rows, centres)]
    nearest: np.ndarray = (unit[0] @ unit[1].T).max(1)
    return nearest


@dataclass
class Examples:
    """Features of records and the number of each one's label."""

    features: np.ndarray
    classes: np.ndarray


def fit_head(
    labels: list[str], train: Examples, val: Examples, kind: str, names: np.ndarray | None, seed: int, views: int = 1
) -> tuple[Head, dict[str, float]]:
    """A head, and how right it is on records that it has not seen: those of val, or where these are few, folds.

    `names` (C, F) are embeddings of the labels' own texts, which count as one more record of each.
    """
    width = train.features.shape[1] // views
    mean, scale = np.zeros(width), np.ones(width)
    if kind != "text":
        flat = train.features.reshape(-1, width)
        mean, scale = flat.mean(0), flat.std(0) + 1e-3
    rows, val_rows = ((part.features.reshape(-1, views, width) - mean) / scale for part in (train, val))

    def fitted(x: np.ndarray, y: np.ndarray, strength: float) -> Head:
        """Of views (N, V, F) and classes (N,)."""
        x, y = x.reshape(-1, width), y.repeat(views)
        if names is not None:
            x, y = np.concatenate((x, names)), np.concatenate((y, np.arange(len(labels))))
        weights, bias = _regression(x, y, len(labels), strength)
        return Head(labels, weights, bias, mean, scale, 1.0, np.zeros((0, 0)), np.zeros(0))

    unseen: dict[float, tuple[np.ndarray, np.ndarray]] = {}  # strength -> scores and truth
    for strength in STRENGTHS[kind]:
        if len(val.classes) >= FEW:
            unseen[strength] = fitted(rows, train.classes, strength).scores(val_rows), val.classes
        else:
            unseen[strength] = _by_folds(fitted, rows, train.classes, strength, len(labels), seed)
    best, heat, measured = _best(unseen, len(labels))
    all_rows, all_classes = rows, train.classes
    if len(val.classes):
        all_rows, all_classes = np.concatenate((rows, val_rows)), np.concatenate((train.classes, val.classes))
    head = fitted(all_rows, all_classes, best)
    head.heat = heat
    one_hot = np.eye(len(labels), dtype=np.float32)[all_classes]
    head.centres = (one_hot.T @ all_rows[:, 0]) / np.maximum(one_hot.sum(0), 1)[:, None]
    head.familiar = np.sort(nearness((val_rows if len(val.classes) >= FEW else rows)[:, 0], head.centres))
    return head, measured | {"strength": best}


def _best(unseen: dict[float, tuple[np.ndarray, np.ndarray]], count: int) -> tuple[float, float, dict[str, float]]:
    """The strength under which unseen labels are likeliest once calibrated, that factor, and what it is worth."""
    trials = []
    for strength, (scores, truth) in unseen.items():
        if not len(truth):
            return 10.0 if 10.0 in unseen else strength, 1.0, {}
        targets = softened(truth, count)
        heat = temperature(scores, targets)
        right = float((scores.argmax(1) == truth).mean())
        trials.append((right, -cross_entropy(scores * heat, targets), strength, heat, len(truth)))
    right, likelihood, strength, heat, records = max(trials)
    return strength, heat, {"accuracy": right, "records": records, "nats": -likelihood}


def _by_folds(
    fitted: Callable[[np.ndarray, np.ndarray, float], Head],
    rows: np.ndarray,
    classes: np.ndarray,
    strength: float,
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of train's records by heads that have not seen them; none where labels have a single record."""
    if np.bincount(classes, minlength=count).max() < 2:
        return np.zeros((0, count)), np.zeros(0, np.int64)
    fold = (uniform(seed, RNG_STREAM, np.arange(len(rows))) * FOLDS).astype(int)
    scores = np.zeros((len(rows), count))
    for number in range(FOLDS):
        other = fold != number
        if other.all() or len(np.unique(classes[other])) < 2:
            continue
        scores[~other] = fitted(rows[other], classes[other], strength).scores(rows[~other])
    return scores, classes


def _regression(rows: np.ndarray, classes: np.ndarray, count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C) and bias (C,) of a multinomial logistic regression; labels without a record stay far below."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(rows.astype(np.float32), classes)
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:  # two labels
        weights, bias = np.concatenate((-weights / 2, weights / 2), 1), np.concatenate((-bias / 2, bias / 2))
    all_weights, offset = np.zeros((rows.shape[1], count), np.float32), np.full(count, -20.0)
    all_weights[:, model.classes_], offset[model.classes_] = weights, bias
    return all_weights, offset


# --- a run ------------------------------------------------------------------------------------------------------


def columns_of(dataset: Dataset) -> tuple[str, str]:
    """(what is read, the column of labels). Raises PlaitError where there are no labels."""
    media = [column for column, kind in dataset.columns.items() if kind != "text"]
    texts = [column for column, kind in dataset.columns.items() if kind == "text"]
    labels = list(label_columns(dataset, 2**31)) or [column for column in texts if column.lower() in LABEL_NAMES]
    sources = media or [column for column in texts if column not in labels]
    if not labels or not sources:
        raise PlaitError(
            f"{dataset.path} has no column of labels that a head could learn. Put files into a folder for each label, "
            "or name a column label."
        )
    return sources[0], labels[0]


def train_head(
    dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: Recipe, device_name: str,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Fit a head for a dataset's labels over the encoder `name`, as a finished run in `folder`; what to tell of it.

    Raises PlaitError where the encoder does not read what the dataset has, and for parts that cannot be frozen.
    """
    begun, training = time.monotonic(), recipe.training
    if unknown := [part for part in training.freeze if part != "encoder"]:
        raise PlaitError(f"Below a head the encoder alone can be frozen (--freeze encoder), not {unknown[0]}.")
    source, target = columns_of(dataset)
    kind, device = dataset.columns[source], choose_device(device_name, "auto")
    place = hub.find(name)
    texts = dataset.texts(target)
    labels = [text for text in dict.fromkeys(texts[i] for i in dataset.indices("train")) if text is not None]
    if len(labels) < 2:
        raise PlaitError(f"{dataset.path}: column {target} has {len(labels)} label in train; two are needed.")
    encoder = _encoder(kind, place, dataset, recipe, {target: labels}, device)
    cache = FeatureCache(folder / "cache", encoder, place, dataset)
    read = partial(_read, dataset, source, texts, labels)
    seconds = math.inf if training.minutes is None else training.minutes * 60
    last = None
    if isinstance(encoder, MediaEncoder) and kind == "image" and "encoder" not in training.freeze:
        last = TrainedBlocks.of(encoder, read, progress)
    if last is not None:
        train, val = last.examples
    else:
        train, val = (_examples(read(split), split, encoder, cache, progress) for split in ("train", "val"))
    names = None
    if kind == "text" and sum(label.replace("_", "").isdigit() for label in labels) < len(labels) / 2:
        names = encoder.features([label.replace("_", " ") for label in labels])
    progress("head", 0, 1)
    head, measured = fit_head(labels, train, val, kind, names, training.seed, encoder.views)
    progress("head", 1, 1)
    blocks: dict[str, Tensor] = {}
    if last is not None:
        trained, figures = last.train(labels, training.seed, lambda: seconds - (time.monotonic() - begun), progress)
        measured |= {f"blocks_{key}": value for key, value in figures.items()}
        if figures["nats"] < measured["nats"]:
            head, blocks = trained, last.weights()
    where = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    config = {
        "model_type": TYPE, "version": VERSION, "encoder": where, "sha256": weight_sums(place), "kind": kind,
        "settings": encoder.settings, "source": source, "target": target, "labels": labels, "heat": head.heat,
        "measured": measured, "blocks": last.count if last is not None and blocks else 0,
        "training": {"step": 1, "seed": training.seed, "validation": {}, "init_from": name},
    }  # fmt: skip
    _save(head, config, blocks, folder / "checkpoints" / "step-000001")
    for link in ("best", "last"):
        point(folder / "checkpoints" / link, "step-000001")
    write_atomic(folder / "run.json", json_text(facts | {"finished": time.time()}))
    return [describe_head(config)]


def _encoder(
    kind: str, place: Path, dataset: Dataset, recipe: Recipe, labels: dict[str, list[str]], device: Device
) -> Encoder:
    if kind == "text":
        return TextEncoder(place, device)
    describe(f"hf:{place}", kind)  # which says what is wrong with it
    own = getattr(recipe.model, kind)
    settings = fit_settings(dataset, kind, _whole(SIZES["base"]), {**own, "encoder": f"hf:{place}"})
    chosen = {**settings.model_dump(), "encoder": None}
    if kind == "image":
        if "flip" not in own:
            chosen["flip"] = mirrors(dataset, recipe, labels, kind)
        chosen["hf_encoder"] = _smaller(chosen["hf_encoder"], chosen["size"])
    return MediaEncoder(kind, place, chosen, device)


def _smaller(known: dict[str, Any], side: int) -> dict[str, Any]:
    """A vision encoder's settings for images of a side: one of convolutions alone reads them not much larger."""
    if known["size"] <= UPSCALED * side:
        return known
    pixels = torch.zeros(1, int(known["config"].get("num_channels", 3)), UPSCALED * side, UPSCALED * side)
    try:
        with torch.inference_mode():
            states = HFEncoder(known["config"], frozen=True).network(pixel_values=pixels).last_hidden_state
    except (ValueError, RuntimeError):  # it has positions for images of its own size alone
        return known
    return {**known, "size": UPSCALED * side} if states.ndim == 4 else known


def _whole(size: Size) -> Size:
    """A size that cuts nothing off."""
    return size.model_copy(update={"seconds": 30.0})


def _read(
    dataset: Dataset, source: str, texts: Sequence[str | None], labels: list[str], split: str
) -> Iterator[tuple[Any, int]]:
    """What is read of each labelled record of a split, and the number of its label."""
    number = {label: i for i, label in enumerate(labels)}
    indices = np.array([i for i in dataset.indices(split) if texts[i] in number], np.int64)
    for index, record in zip(indices, dataset.iterate(indices, [source]), strict=True):
        if (value := record.parts.get(source)) is not None:
            yield value, number[str(texts[index])]


def _examples(
    records: Iterator[tuple[Any, int]], split: str, encoder: Encoder, cache: FeatureCache, progress: Progress
) -> Examples:
    """Features of a split's records, from the cache where they are there."""
    classes: list[int] = []
    rows: list[np.ndarray] = []
    stored = cache.get(split)
    while part := list(islice(records, 256)):
        classes += [label for _, label in part]
        if stored is None:
            rows.append(encoder.features([value for value, _ in part]))
        progress(f"features of {split}", len(classes), len(classes) + (256 if len(part) == 256 else 0))
    if stored is None:
        stored = np.concatenate(rows) if rows else np.zeros((0, encoder.views), np.float32)
        cache.put(split, stored)
    return Examples(stored, np.array(classes, np.int64))


class TrainedBlocks:
    """The last blocks of a vision encoder, trained for labels beside the head over the frozen one."""

    def __init__(self, encoder: MediaEncoder, last: LastBlocks, states: dict[str, States]) -> None:
        self.encoder, self.last, self.states = encoder, last, states
        self.count = len(last.blocks) - last.first

    @classmethod
    def of(
        cls,
        encoder: MediaEncoder,
        read: Callable[[str], Iterator[tuple[Any, int]]],
        progress: Progress,
    ) -> TrainedBlocks | None:
        """What the first blocks give of all records. None where the encoder cannot be cut in two, its states would
        take too much memory, or val has too few records to say what is better."""
        try:
            last = LastBlocks(encoder.network, encoder.pixels([next(read("train"))[0]], Variant()))
        except ValueError:
            return None
        states: dict[str, States] = {}
        left = STATES_BYTES
        for split in ("val", "train"):
            made, classes = list[list[Tensor]](), list[int]()
            records = read(split)
            while part := list(islice(records, BATCH)):
                pause_point()
                values = [value for value, _ in part]
                made.append([last.before(encoder.pixels(values, one)).half() for one in encoder.variants])
                classes += [label for _, label in part]
                left -= sum(view.nbytes for view in made[-1])
                progress(f"first blocks of {split}", len(classes), len(classes) + (BATCH if len(part) == BATCH else 0))
                if left < 0:
                    return None
            if len(classes) < FEW:
                return None
            views = torch.stack([torch.cat(view) for view in zip(*made, strict=True)])
            states[split] = States(views, np.array(classes, np.int64))
        return cls(encoder, last, states)

    @property
    def examples(self) -> tuple[Examples, Examples]:
        """Features of train and val as the blocks are now."""
        train, val = (
            Examples(features_of(self.last, self.encoder.pool_image, list(one.views)), one.classes)
            for one in (self.states["train"], self.states["val"])
        )
        return train, val

    def train(
        self, labels: list[str], seed: int, seconds_left: Callable[[], float], progress: Progress
    ) -> tuple[Head, dict[str, float]]:
        """A head over the trained blocks, and how right it is on val."""
        self.encoder.means_only = True
        weights, bias = train_last(
            self.last, self.encoder.pool_image, self.states["train"], len(labels), seed, seconds_left, progress
        )
        train, val = self.examples
        width = len(weights)
        flat = train.features.reshape(-1, width)
        mean, scale = flat.mean(0), flat.std(0) + 1e-3
        matrix = weights.cpu().numpy()
        head = Head(
            labels, matrix * scale[:, None], bias.cpu().numpy() + mean @ matrix, mean, scale, 1.0, np.zeros((0, 0)),
            np.zeros(0),
        )  # fmt: skip
        rows, val_rows = (head.standard(part.features) for part in (train, val))
        scores, targets = head.scores(val_rows), softened(val.classes, len(labels))
        head.heat = temperature(scores, targets)
        one_hot = np.eye(len(labels), dtype=np.float32)[train.classes]
        head.centres = (one_hot.T @ rows[:, 0]) / np.maximum(one_hot.sum(0), 1)[:, None]
        head.familiar = np.sort(nearness(val_rows[:, 0], head.centres))
        figures = {
            "accuracy": float((scores.argmax(1) == val.classes).mean()),
            "nats": cross_entropy(scores * head.heat, targets),
        }
        return head, figures

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, by their names in the network."""
        return {name: value.detach().cpu().contiguous() for name, value in self.last.trained.items()}


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


def _save(head: Head, config: dict[str, Any], blocks: dict[str, Tensor], folder: Path) -> None:
    with publish_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json_text(config), encoding="utf-8")
        arrays = {
            "weights": head.weights, "bias": head.bias, "mean": head.mean, "scale": head.scale,
            "centres": head.centres, "familiar": head.familiar,
        }  # fmt: skip
        save_file({name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}, temporary / ARRAYS)
        if blocks:
            save_tensors(blocks, temporary / BLOCKS)
        sums = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(
            json_text(sealed({"version": MANIFEST, "sha256": sums})), encoding="utf-8"
        )


def describe_head(config: dict[str, Any]) -> str:
    """What a head goes by, and how right it is, for people."""
    measured = config["measured"]
    right = "nothing was held out"
    if "records" in measured:
        right = f"{measured['accuracy']:.1%} of {measured['records']} unseen records right"
    encoder = f"the frozen encoder {config['encoder']}"
    if config["blocks"]:
        encoder = f"the encoder {config['encoder']}, whose last {config['blocks']} blocks were trained"
        right = f"{measured['blocks_accuracy']:.1%} of {measured['records']} unseen records right"
        right += f" (frozen {measured['accuracy']:.1%})"
    return f"{config['target']} from {config['source']}: {len(config['labels'])} labels over {encoder}; {right}."


# --- at work ----------------------------------------------------------------------------------------------------


class HeadModel(Model):
    """A head with its encoder."""

    def __init__(self, folder: Path, device: str = "auto", precision: str = "auto") -> None:
        """Raises PlaitError where the checkpoint is damaged, or its encoder is gone or another one."""
        if wrong := verify(folder):
            raise PlaitError("; ".join(wrong) + ". Train again.")
        self.folder, self.config = folder, read_json(folder / CONFIG)
        self.device = choose_device(device, precision if precision in ("auto", "fp32", "bf16") else "auto")
        self.name = str(folder)
        arrays = load_file(folder / ARRAYS)
        self.head = Head(labels=self.config["labels"], heat=self.config["heat"], **arrays)
        self.place = hub.find(self.config["encoder"])
        if weight_sums(self.place) != self.config["sha256"]:
            raise PlaitError(f"{folder} stands on {self.place}, whose weights are others now. Put them back.")

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder below the head, loaded when it is first asked for."""
        if self.config["kind"] == "text":
            return TextEncoder(self.place, self.device)
        encoder = MediaEncoder(self.config["kind"], self.place, self.config["settings"], self.device)
        if self.config["blocks"]:
            assert self.folder is not None
            encoder.load_blocks(self.folder / BLOCKS)
        return encoder

    @property
    def verbs(self) -> list[str]:
        return [Verb.CLASSIFY, Verb.EMBED]

    @property
    def columns(self) -> dict[str, str]:
        return {self.config["source"]: self.config["kind"], self.config["target"]: "text"}

    @property
    def labels(self) -> dict[str, list[str]]:
        return {self.config["target"]: self.head.labels}

    @property
    def modalities(self) -> set[str]:
        return {self.config["kind"]}

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The encoder's features of each input, (N, F) float32, of unit length."""
        if prompt is not None:
            raise PlaitError(f"{self.name} has no prompts. Leave --prompt out.")
        rows = self.encoder.features([medium_of(value) for value in inputs])
        rows = rows[:, : rows.shape[1] // self.encoder.views]
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9), np.float32)

    def classify_inputs(
        self,
        inputs: list[Any],
        labels: list[str] | None = None,
        column: str | None = None,
        top: int | None = 5,
        template: str | None = None,
    ) -> list[Predictions]:
        """The likeliest labels of each input, calibrated; `labels` are some of those that were learnt."""
        if column not in (None, self.config["target"]):
            raise PlaitError(f"There is no column '{column}'. This model knows {self.config['target']}.")
        chosen = labels if labels is not None else self.head.labels
        if unknown := [label for label in chosen if label not in self.head.labels]:
            raise PlaitError(f"'{unknown[0]}' was not learnt. Known are {', '.join(self.head.labels[:8])}.")
        places = [self.head.labels.index(label) for label in chosen]
        features = self.encoder.features([medium_of(value) for value in inputs])
        if not len(features):
            return []
        scores = log_softmax(self.head.log_probabilities(features)[:, places])
        unlike = self.head.unlike(features)
        predictions = []
        for row, score in zip(np.exp(scores), unlike, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            ranked = [Prediction(chosen[i], float(row[i])) for i in order]
            predictions.append(Predictions(ranked, float(score), bool(score > UNLIKE)))
        return predictions
