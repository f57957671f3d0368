"""A dual encoder out of two pretrained ones: `plait train DATA --init-from VISION,TEXT`, where DATA has images with
captions. Both encoders are frozen, and what they say is made once; trained is a projection of each into one space, by a
contrastive loss.

Shapes: M distinct images, K distinct texts, P pairs, B pairs a step, F features, E width of the space.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.core.config import Recipe
from plait.core.device import Device, choose_device
from plait.core.errors import PlaitError
from plait.core.files import json_text, point, publish_folder, read_json, write_atomic
from plait.core.interruption import pause_point
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.hf import hub
from plait.hf.contrastive import Pairs
from plait.hf.encoder_features import Encoder, FeatureCache, MediaEncoder, TextEncoder
from plait.hf.heads import SCALE_IMAGES, build_encoder, rescale_pixels
from plait.hf.last_blocks import Progress
from plait.hf.pretrained import TEMPLATE, kind_of, ranked, sentence
from plait.inference.base import Model, Verb
from plait.inference.results import Predictions
from plait.modalities.image_files import IMAGE
from plait.modalities.inputs import plain_input
from plait.model.adapted import weight_sums
from plait.model.checkpoint import verify, write_manifest
from plait.model.objectives import MAX_LOG_SCALE, PAIR_LOSSES
from plait.training.checkpointing import folder_name
from plait.training.optimizer import decay_groups
from plait.training.schedule import learning_rate_at

TYPE = "plait-dual-encoder"  # model_type in config.json
VERSION = 1
CONFIG, WEIGHTS = "config.json", "projections.safetensors"
WIDTH = 512  # of the space, where model.embed_dim says nothing
DROPOUT = 0.5  # of features
BATCH = 512
EPOCHS = 60  # of images
LEAST_STEPS = 300
PEAK, DECAY, WARMUP = 1e-3, 0.1, 0.1
VALIDATIONS = 8
RECALL = 10  # nearest among which a caption's image is looked for
RNG_STREAM = 381  # of the random numbers of `uniform`, and the next two


# --- data -------------------------------------------------------------------------------------------------------


@dataclass
class PairFeatures:
    """What the encoders say of a split's pairs.

    Attributes:
        images: Features of each distinct image, (M, V F) float32, one view after the other.
        texts: Features of each distinct text, (K, F') float32.
        image_of, text_of: The number of each pair's image and text, (P,).
    """

    images: np.ndarray
    texts: np.ndarray
    image_of: np.ndarray
    text_of: np.ndarray


def pair_features(
    pairs: Pairs, split: str, vision: MediaEncoder, text: TextEncoder, caches: tuple[FeatureCache, FeatureCache],
    progress: Progress,
) -> PairFeatures:  # fmt: skip
    """Features of all images and texts of a split, each distinct one once, from the caches where they are there."""
    kept_as = f"pairs-{split}"  # of distinct images and texts, where a head's are of records
    stored = caches[0].get(kept_as)
    numbers: dict[bytes, int] = {}
    words: dict[str, int] = {}
    waiting: list[bytes] = []
    rows: list[np.ndarray] = []
    image_of, text_of = list[int](), list[int]()
    records = pairs.dataset.iterate(pairs.indices, [pairs.image, *pairs.texts])
    for done, record in enumerate(records):
        value = record.parts.get(pairs.image)
        if not isinstance(value, bytes):
            continue
        key = hashlib.sha256(value).digest()
        if key not in numbers:
            numbers[key] = len(numbers)
            if stored is None:
                waiting.append(value)
        for column in pairs.texts:
            if column in record.parts:
                image_of.append(numbers[key])
                text_of.append(words.setdefault(str(record.parts[column]), len(words)))
        if len(waiting) >= 256:
            rows.append(vision.features(waiting))
            waiting = []
            progress(f"images of {split}", done, len(pairs))
    if waiting:
        rows.append(vision.features(waiting))
    images = np.concatenate(rows) if stored is None and rows else stored
    if images is None:
        images = np.zeros((0, vision.views), np.float32)
    if stored is None:
        caches[0].put(kept_as, images)
    texts = _features_of_texts(list(words), split, text, caches[1], progress)
    return PairFeatures(images, texts, np.array(image_of, np.int64), np.array(text_of, np.int64))


def _features_of_texts(
    texts: list[str], split: str, encoder: Encoder, cache: FeatureCache, progress: Progress
) -> np.ndarray:
    stored = cache.get(f"pairs-{split}")
    if stored is not None:
        return stored
    rows = [np.zeros((0, 1), np.float32)]
    for start in range(0, len(texts), 1024):
        rows.append(encoder.features(texts[start : start + 1024]))
        progress(f"texts of {split}", start, len(texts))
    stored = np.concatenate(rows[1:] or rows)
    cache.put(f"pairs-{split}", stored)
    return stored


# --- the projections --------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """Features (N, F) to vectors (N, E) of unit length, by one linear layer (decision 92)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.layers = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(features, width))

    def standardise(self, rows: np.ndarray) -> None:
        """Take each feature's mean and spread from rows (N, F)."""
        self.mean.copy_(torch.from_numpy(rows.mean(0)))
        self.scale.copy_(torch.from_numpy(rows.std(0) + 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers((x - self.mean) / self.scale), dim=-1)

    def of_views(self, features: np.ndarray) -> Tensor:
        """The mean direction (N, E) over the views that features (N, V F) are of."""
        views = self(torch.from_numpy(features).view(len(features), -1, len(self.mean)))
        return nn.functional.normalize(views.mean(1), dim=-1)


class Projections(nn.Module):
    """One of images and one of texts, and the scalars that their loss learns, as `logit_scale`."""

    def __init__(self, image_features: int, text_features: int, width: int, scalars: Mapping[str, float]) -> None:
        super().__init__()
        self.image, self.text = Projection(image_features, width), Projection(text_features, width)
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.tensor(first)) for name, first in scalars.items()})


def train_projections(
    train: PairFeatures,
    val: PairFeatures,
    views: int,
    recipe: Recipe,
    seconds_left: Callable[[], float],
    progress: Progress,
) -> tuple[Projections, float | None, int]:
    """Projections trained on `train`, as they were when captions of `val` found their images most often.

    Args:
        train: What is learnt.
        val: What says when they are best; where it is empty they are taken at the end.
        views: Of each image.
        recipe: Seed, steps, batch size, learning rate, the space's width and the loss.
        seconds_left: How long training may go on; it ends with what it has.
        progress: Told of each step.

    Returns:
        The projections, their recall on val (None without), and the step at which they were taken.
    """
    settings, objective = recipe.training, PAIR_LOSSES[recipe.model.contrastive]
    width = train.images.shape[1] // views
    torch.manual_seed(settings.seed)
    space = recipe.model.embed_dim or WIDTH
    network = Projections(width, train.texts.shape[1], space, objective.scalars)
    network.image.standardise(train.images.reshape(-1, width))
    network.text.standardise(train.texts)
    images = torch.from_numpy(train.images).view(len(train.images), views, width)
    texts = torch.from_numpy(train.texts)
    groups = decay_groups(network.parameters(), DECAY)
    optimizer = torch.optim.AdamW(groups, lr=1e-9, betas=(0.9, 0.98), fused=True)
    sampler = _Sampler(train, settings.seed, min(settings.batch_size or BATCH, len(train.images)), views)
    steps = settings.steps or max(EPOCHS * len(train.images) // sampler.batch, LEAST_STEPS)
    best, best_recall, best_step = copy.deepcopy(network.state_dict()), None, 0
    step = 0
    while step < steps:
        pause_point()
        rate = learning_rate_at(step, steps, settings.learning_rate or PEAK, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        image, view, text = sampler.draw(step)
        a, b = network.image(images[image, view]), network.text(texts[text])
        positives = (image[:, None] == image[None]) | (text[:, None] == text[None])
        loss = objective(a, b, positives, dict(network.scalars.items()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        progress("projections", step, steps)
        out_of_time = seconds_left() <= 0
        if step * VALIDATIONS % steps < VALIDATIONS or step == steps or out_of_time:
            recall = recall_of(network, val)
            if best_recall is None or recall is None or recall > best_recall:
                best, best_recall, best_step = copy.deepcopy(network.state_dict()), recall, step
        if out_of_time:
            break
    network.load_state_dict(best)
    return network.eval(), best_recall, best_step


class _Sampler:
    """Which images a step has, and which view and text of each: functions of the seed and the step."""

    def __init__(self, pairs: PairFeatures, seed: int, batch: int, views: int) -> None:
        self.pairs, self.seed, self.batch, self.views = pairs, seed, batch, views
        self.order = np.argsort(pairs.image_of, kind="stable")  # the pairs of an image lie side by side
        self.counts = np.bincount(pairs.image_of, minlength=len(pairs.images))
        self.starts = np.cumsum(self.counts) - self.counts

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of images, views and texts, (B,) each."""
        count = len(self.pairs.images)
        epoch, at = divmod(step, count // self.batch)
        order = np.argsort(uniform(self.seed, RNG_STREAM, epoch, np.arange(count)), kind="stable")
        images = order[at * self.batch : (at + 1) * self.batch]
        views = (uniform(self.seed, RNG_STREAM + 1, step, np.arange(len(images))) * self.views).astype(np.int64)
        drawn = uniform(self.seed, RNG_STREAM + 2, step, np.arange(len(images)))
        pair = self.order[self.starts[images] + (drawn * self.counts[images]).astype(np.int64)]
        return torch.from_numpy(images), torch.from_numpy(views), torch.from_numpy(self.pairs.text_of[pair])


def recall_of(network: Projections, pairs: PairFeatures) -> float | None:
    """The share of pairs whose image is among the ten nearest to their text; None where there are none."""
    if not len(pairs.text_of):
        return None
    network.eval()
    with torch.inference_mode():
        images, texts = network.image.of_views(pairs.images), network.text.of_views(pairs.texts)
    network.train()
    found = 0
    for start in range(0, len(pairs.text_of), 4096):
        text, own = pairs.text_of[start : start + 4096], pairs.image_of[start : start + 4096]
        near = texts[torch.from_numpy(text)] @ images.t()
        mine = near[torch.arange(len(own)), torch.from_numpy(own)]
        found += int(((near > mine[:, None]).sum(1) < RECALL).sum())
    return found / len(pairs.text_of)


# --- a run ------------------------------------------------------------------------------------------------------


def train_dual_encoder(
    dataset: Dataset, folder: Path, names: tuple[str, str], facts: dict[str, Any], recipe: Recipe, device_name: str,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Train projections over the encoders `names`, of images and of texts, as a finished run in `folder`; what to tell
    of it.

    Raises PlaitError where an encoder does not read images or texts, where there are no images with texts, and for a
    task or a width of the space that cannot be.
    """
    begun, training = time.monotonic(), recipe.training
    if unknown := [part for part in training.freeze if part != "encoder"]:
        raise PlaitError(f"Both encoders of {','.join(names)} are frozen; {unknown[0]} is no part of them.")
    if training.task not in ("auto", "describe"):
        raise PlaitError(
            f"Two encoders in one space search and name images; they do not {training.task}. Leave out --task "
            f"{training.task}, or do not start from {','.join(names)}."
        )
    if recipe.model.embed_dim == 0:
        raise PlaitError("embed_dim: 0 leaves two encoders no space to meet in. Leave it out, or give a width.")
    if dataset.manifest.kind != "records" or IMAGE.kind not in dataset.columns.values():
        raise PlaitError(f"{dataset.path} has no images, which {names[0]} would read. Leave it out of --init-from.")
    pairs = {split: Pairs.of(dataset, split) for split in ("train", "val")}
    if len(pairs["train"]) < 2:
        raise PlaitError(
            f"{dataset.path} has {len(pairs['train'])} records of train with an image and a text; two are needed."
        )
    device = choose_device(device_name, "auto")
    places = hub.find(names[0]), hub.find(names[1])
    text = _text_encoder(names[1], places[1], device)
    vision = build_encoder("image", places[0], dataset, recipe, None, device)
    assert isinstance(vision, MediaEncoder)
    lines = rescale_pixels(vision, _first_images(pairs["train"]))
    caches = (
        FeatureCache(folder / "cache", vision, places[0], dataset),
        FeatureCache(folder / "cache", text, places[1], dataset),
    )
    features = {split: pair_features(part, split, vision, text, caches, progress) for split, part in pairs.items()}
    seconds = math.inf if training.minutes is None else training.minutes * 60
    network, recall, step = train_projections(
        features["train"], features["val"], vision.views, recipe, lambda: seconds - (time.monotonic() - begun), progress
    )
    config = {
        "model_type": TYPE, "version": VERSION, "embed_dim": recipe.model.embed_dim or WIDTH,
        "loss": recipe.model.contrastive,
        "image": _known(names[0], places[0]) | {"settings": vision.settings}, "text": _known(names[1], places[1]),
        "training": {
            "step": step, "seed": training.seed, "init_from": ",".join(names), "records": len(features["val"].text_of),
            "validation": {} if recall is None else {f"recall@{RECALL}": recall},
        },
    }  # fmt: skip
    _save(network, config, folder / "checkpoints" / folder_name(step))
    for link in ("best", "last"):
        point(folder / "checkpoints" / link, folder_name(step))
    write_atomic(folder / "run.json", json_text(facts | {"finished": time.time()}))
    return [*lines, describe_dual_encoder(config)]


def _text_encoder(name: str, place: Path, device: Device) -> TextEncoder:
    try:
        if (kind := kind_of(place)) != "encoder":
            raise PlaitError(f"it is a model of kind {kind}.")
    except PlaitError as error:
        raise PlaitError(f"{name}, the second of VISION,TEXT, is no encoder of texts: {error}") from error
    return TextEncoder(place, device)


def _first_images(pairs: Pairs) -> list[Any]:
    """Some images of a split, as they lie in the data."""
    records = pairs.dataset.iterate(pairs.indices[:SCALE_IMAGES], [pairs.image])
    return [record.parts[pairs.image] for record in records if pairs.image in record.parts]


def _known(name: str, place: Path) -> dict[str, Any]:
    """By what an encoder is found again."""
    where = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    return {"encoder": where, "sha256": weight_sums(place)}


def _save(network: Projections, config: dict[str, Any], folder: Path) -> None:
    with publish_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json_text(config), encoding="utf-8")
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, temporary / WEIGHTS)
        write_manifest(temporary)


def describe_dual_encoder(config: dict[str, Any]) -> str:
    """What a checkpoint goes by, and what it recalls, for people."""
    training = config["training"]
    recall = "nothing was held out"
    if training["records"]:
        share = training["validation"][f"recall@{RECALL}"]
        recall = f"of {training['records']} texts of val {share:.1%} have their image among the ten nearest"
    return (
        f"Images by {config['image']['encoder']} and texts by {config['text']['encoder']}, both frozen, projected into "
        f"one space; {recall}."
    )


# --- at work ----------------------------------------------------------------------------------------------------


class DualEncoder(Model):
    """Two frozen encoders and their projections into one space."""

    embed_batch = 64

    def __init__(self, folder: Path, device: str = "auto", precision: str = "auto") -> None:
        """Raises PlaitError where the checkpoint is damaged or of another version, or one of its encoders is gone or
        another one."""
        if wrong := verify(folder):
            raise PlaitError("; ".join(wrong) + ". Train again.")
        self.folder, self.name, self.config = folder, str(folder), read_json(folder / CONFIG)
        if self.config.get("version") != VERSION:
            raise PlaitError(
                f"{folder / CONFIG} has version {self.config.get('version')}; this Plait reads {VERSION}. Train again."
            )
        self.device = choose_device(device, precision if precision in ("auto", "fp32", "bf16") else "auto")
        self.places = {kind: self._found(kind) for kind in ("image", "text")}
        weights = load_file(folder / WEIGHTS)
        scalars = {name.removeprefix("scalars."): 0.0 for name in weights if name.startswith("scalars.")}
        self.width = self.config["embed_dim"]
        self.network = Projections(len(weights["image.mean"]), len(weights["text.mean"]), self.width, scalars)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False)
        self._labels: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))  # the last ones, embedded

    def _found(self, kind: str) -> Path:
        known = self.config[kind]
        place = hub.find(known["encoder"])
        if weight_sums(place) != known["sha256"]:
            raise PlaitError(f"{self.folder} stands on {place}, whose weights are others now. Put them back.")
        return place

    @cached_property
    def vision(self) -> MediaEncoder:
        """The encoder of images, loaded when the first one is read."""
        return MediaEncoder("image", self.places["image"], self.config["image"]["settings"], self.device)

    @cached_property
    def text(self) -> TextEncoder:
        """The encoder of texts, loaded when the first one is read."""
        return TextEncoder(self.places["text"], self.device)

    @property
    def verbs(self) -> list[str]:
        return [Verb.CLASSIFY, Verb.EMBED]

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The embedding of each image or text, (N, E) float32, of unit length."""
        if prompt is not None:
            raise PlaitError(f"{self.name} has no prompts. Leave --prompt out.")
        rows = np.zeros((len(inputs), self.width), np.float32)
        texts = [place for place, value in enumerate(inputs) if isinstance(value, str)]
        images = [place for place, value in enumerate(inputs) if not isinstance(value, str)]
        if texts:
            rows[texts] = self.network.text.of_views(self.text.features([inputs[place] for place in texts])).numpy()
        if images:
            features = self.vision.features([plain_input(inputs[place]) for place in images])
            rows[images] = self.network.image.of_views(features).numpy()
        return rows

    def classify_inputs(
        self,
        inputs: list[Any],
        labels: list[str] | None = None,
        column: str | None = None,
        top: int | None = 5,
        template: str | None = None,
    ) -> list[Predictions]:
        """The likeliest of `labels` for each image or text, by how near a sentence with the label is; zero-shot.
        `template` is that sentence, with {} for the label."""
        if column is not None:
            raise PlaitError(f"{self.name} has no columns. Leave out --column.")
        if not labels:
            raise PlaitError("This model knows no labels of its own. Name them: labels=[...] or --labels a,b,c.")
        if not inputs:
            return []
        key = (template or TEMPLATE, *labels)
        if self._labels[0] != key:  # the same for many images
            self._labels = key, self.embed_inputs([sentence(label, key[0]) for label in labels])
        scale = float(self.network.scalars["logit_scale"].clamp(max=MAX_LOG_SCALE).exp())
        logits = torch.from_numpy(self.embed_inputs(inputs) @ self._labels[1].T) * scale
        return [ranked(row, labels, top) for row in logits.softmax(-1)]
