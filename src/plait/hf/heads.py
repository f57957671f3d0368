"""A calibrated head over a pretrained encoder: `plait train DATA --init-from ENCODER`, where ENCODER reads texts,
images or audio and is no language model. The encoder is frozen; of images its last blocks are trained where that is
better on records that neither has seen. Beside an encoder of texts stand their n-grams, where both together are
better.

Features are made once; those of a frozen encoder are kept in the run's folder, by the content of encoder and data.
Where blocks may be trained, what goes into them is kept in memory while the run lasts. What is fitted on features is
a multinomial logistic regression, whose strength and temperature are chosen on records that it has not seen.
Shapes: N records, F features, C labels.
"""

from __future__ import annotations

import math
import time
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from plait.classifiers.mixture import log_softmax
from plait.core.config import SIZES, Recipe, Size
from plait.core.device import Device, choose_device
from plait.core.errors import PlaitError
from plait.core.files import json_text, point, publish_folder, read_json, sealed, sha256_file, write_atomic
from plait.data.dataset import Dataset
from plait.data.record import LABEL_NAMES
from plait.hf import hub, huggingface
from plait.hf.encoder_features import (
    Encoder,
    FeatureCache,
    LabelledRecords,
    MediaEncoder,
    TextEncoder,
    records_with,
)
from plait.hf.encoders import describe
from plait.hf.last_blocks import Progress
from plait.hf.linear_head import Examples, Head, fit_head
from plait.hf.ngrams_beside import LabelledTexts, NgramsBeside, fit_ngrams_beside
from plait.hf.pixel_scale import PixelScale, better_scale
from plait.hf.trained_blocks import TrainedBlocks
from plait.inference.base import Model, Verb
from plait.inference.results import Prediction, Predictions
from plait.modalities.hf_encoder import HFEncoder
from plait.modalities.inputs import medium_of
from plait.model.adapted import weight_sums
from plait.model.checkpoint import MANIFEST, verify
from plait.training.build import fit_settings, label_columns
from plait.training.tasks import mirrors

TYPE = "plait-head"  # model_type in config.json
VERSION = 4
CONFIG, ARRAYS, BLOCKS = "config.json", "head.safetensors", "encoder.safetensors"
UNLIKE = 0.995  # share of validation records that must look more familiar than an input that is none of the labels
SCALE_IMAGES = 64  # by which it is seen how an encoder's pixels are scaled
UPSCALED = 5  # times the side of the data's images that a convolutional encoder reads at most: more tells it nothing


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
    readable = records_with(dataset, "train", source)
    labels = [text for text in dict.fromkeys(texts[i] for i in readable) if text is not None]
    if len(labels) < 2:
        raise PlaitError(
            f"{dataset.path}: the records of train that have {source} have {len(labels)} of the labels in {target}; "
            "two are needed."
        )
    train_records, val_records = (
        LabelledRecords.of(dataset, split, source, target, labels) for split in ("train", "val")
    )
    encoder = build_encoder(kind, place, dataset, recipe, {target: labels}, device)
    lines = []
    if isinstance(encoder, MediaEncoder) and encoder.reads_pixels:
        lines += rescale_pixels(encoder, next(train_records.batches(SCALE_IMAGES)))
    cache = FeatureCache(folder / "cache", encoder, place, dataset)
    seconds = math.inf if training.minutes is None else training.minutes * 60
    last = None
    if isinstance(encoder, MediaEncoder) and encoder.reads_pixels and "encoder" not in training.freeze:
        last = TrainedBlocks.of(encoder, train_records, val_records, progress)
    if last is not None:
        train, val = last.examples
    else:
        train = _examples(train_records, "train", encoder, cache, progress)
        val = _examples(val_records, "val", encoder, cache, progress)
    names = None
    if kind == "text" and sum(label.replace("_", "").isdigit() for label in labels) < len(labels) / 2:
        names = encoder.features([label.replace("_", " ") for label in labels])
    progress("head", 0, 1)
    head, measured, unseen = fit_head(labels, train, val, kind, names, training.seed, encoder.views)
    beside, together = _beside(train_records, val_records, unseen, labels) if kind == "text" else (None, {})
    measured |= {f"together_{key}": value for key, value in together.items()}
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
        "measured": measured, "beside": beside.facts() if beside is not None else None,
        "blocks": last.count if last is not None and blocks else 0,
        "training": {"step": 1, "seed": training.seed, "validation": {}, "init_from": name},
    }  # fmt: skip
    arrays = beside.arrays() if beside is not None else {}
    _save(head, arrays, config, blocks, folder / "checkpoints" / "step-000001")
    for link in ("best", "last"):
        point(folder / "checkpoints" / link, "step-000001")
    write_atomic(folder / "run.json", json_text(facts | {"finished": time.time()}))
    return [*lines, describe_head(config)]


def _beside(
    train: LabelledRecords, val: LabelledRecords, of_encoder: np.ndarray, labels: list[str]
) -> tuple[NgramsBeside | None, dict[str, float]]:
    """N-grams beside an encoder of texts, where both are better together, and what that is worth on val."""
    train_texts, val_texts = (
        LabelledTexts([str(text) for batch in part.batches(256) for text in batch], part.classes)
        for part in (train, val)
    )
    return fit_ngrams_beside(train_texts, val_texts, of_encoder, len(labels)) or (None, {})


def rescale_pixels(encoder: MediaEncoder, images: list[Any]) -> list[str]:
    """Scale pixels as the encoder's first batch norm remembers them, where its files say otherwise; what to tell."""
    known = encoder.settings["hf_encoder"]
    if len(known["mean"]) != 3:
        return []
    said = PixelScale(tuple(known["mean"]), tuple(known["std"]))
    scale = better_scale(encoder.network, encoder.raw_pixels(images), said)
    if scale is None:
        return []
    encoder.scale_pixels(scale.mean, scale.std)
    return [
        f"The encoder's files give {said} of pixels, but its weights were made with {scale}, as its first batch norm "
        "shows on these images: they are read so."
    ]


def build_encoder(
    kind: str, place: Path, dataset: Dataset, recipe: Recipe, labels: dict[str, list[str]] | None, device: Device
) -> Encoder:
    """A frozen encoder as it reads a dataset's texts, images or audio. Where there are labels of images, these say
    whether an image means the same when it is mirrored."""
    if kind == "text":
        return TextEncoder(place, device)
    describe(f"hf:{place}", kind)  # which says what is wrong with it
    own = getattr(recipe.model, kind)
    settings = fit_settings(dataset, kind, _whole(SIZES["base"]), {**own, "encoder": f"hf:{place}"})
    chosen = {**settings.model_dump(), "encoder": None}
    if chosen["hf_encoder"]["reads"] == "pixels":
        if "flip" not in own and labels is not None:
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


def _examples(
    records: LabelledRecords, split: str, encoder: Encoder, cache: FeatureCache, progress: Progress
) -> Examples:
    """Features of a split's records, from the cache where they are there."""
    stored = cache.get(split)
    if stored is None:
        rows = [np.zeros((0, encoder.views), np.float32)]
        for values in records.batches(256):
            rows.append(encoder.features(values))
            progress(f"features of {split}", sum(map(len, rows)), len(records))
        stored = np.concatenate(rows[1:] or rows)
        cache.put(split, stored)
    return Examples(stored, records.classes)


def _save(
    head: Head, beside: dict[str, np.ndarray], config: dict[str, Any], blocks: dict[str, Tensor], folder: Path
) -> None:
    with publish_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json_text(config), encoding="utf-8")
        arrays = {
            "weights": head.weights, "bias": head.bias, "mean": head.mean, "scale": head.scale,
            "centres": head.centres, "familiar": head.familiar,
        }  # fmt: skip
        arrays = {name: value.astype(np.float32) for name, value in arrays.items()} | beside
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, temporary / ARRAYS)
        if blocks:
            save_tensors(blocks, temporary / BLOCKS)
        sums = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(
            json_text(sealed({"version": MANIFEST, "sha256": sums})), encoding="utf-8"
        )


def head_config(folder: Path) -> dict[str, Any]:
    """The configuration of a head's checkpoint. Raises PlaitError where another version of Plait wrote it."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    if config.get("version") != VERSION:
        raise PlaitError(
            f"{folder / CONFIG} has version {config.get('version')}; this Plait reads heads of version {VERSION}. "
            "Train again."
        )
    return config


def describe_head(config: dict[str, Any]) -> str:
    """What a head goes by, and how right it is, for people."""
    measured = config["measured"]
    right = "nothing was held out"
    if "records" in measured:
        right = f"{measured['accuracy']:.1%} of {measured['records']} unseen records right"
    encoder = f"the frozen encoder {config['encoder']}"
    if config["beside"] is not None:
        encoder += " and the n-grams of the texts"
        right = f"{measured['together_accuracy']:.1%} of {measured['records']} unseen records right"
        right += f" (the encoder alone {measured['accuracy']:.1%})"
    if config["blocks"]:
        encoder = f"the encoder {config['encoder']}, whose last {config['blocks']} blocks were trained"
        right = f"{measured['blocks_accuracy']:.1%} of {measured['records']} unseen records right"
        right += f" (frozen {measured['accuracy']:.1%})"
    return f"{config['target']} from {config['source']}: {len(config['labels'])} labels over {encoder}; {right}."


# --- at work ----------------------------------------------------------------------------------------------------


class HeadModel(Model):
    """A head with its encoder."""

    def __init__(self, folder: Path, device: str = "auto", precision: str = "auto") -> None:
        """Raises PlaitError where the checkpoint is damaged or of another version, or its encoder is gone or another
        one."""
        if wrong := verify(folder):
            raise PlaitError("; ".join(wrong) + ". Train again.")
        self.folder, self.config = folder, head_config(folder)
        self.device = choose_device(device, precision if precision in ("auto", "fp32", "bf16") else "auto")
        self.name = str(folder)
        arrays = load_file(folder / ARRAYS)
        known = {field.name for field in fields(Head)}
        own = {name: value for name, value in arrays.items() if name in known}
        self.head = Head(labels=self.config["labels"], heat=self.config["heat"], **own)
        beside = self.config["beside"]
        self.beside = NgramsBeside.restore(beside, arrays) if beside is not None else None
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
        media = [medium_of(value) for value in inputs]
        features = self.encoder.features(media)
        if not len(features):
            return []
        logs = self.head.log_probabilities(features)
        if self.beside is not None:
            logs = self.beside.log_probabilities(logs, [str(value) for value in media])
        scores = log_softmax(logs[:, places])
        unlike = self.head.unlike(features)
        predictions = []
        for row, score in zip(np.exp(scores), unlike, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            ranked = [Prediction(chosen[i], float(row[i])) for i in order]
            predictions.append(Predictions(ranked, float(score), bool(score > UNLIKE)))
        return predictions
