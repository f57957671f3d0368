"""CLIP and SigLIP trained further on pairs of one's own: `plait train DATA --init-from CLIP`, where DATA has images
with captions.

Shapes: B records a step, E width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.config import TrainingRecipe
from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.hf import hub
from plait.hf.encoder_features import records_with
from plait.hf.further import RNG_STREAM, FurtherTraining, Progress
from plait.hf.pretrained import Pretrained, kind_of, read_image
from plait.modalities.image_files import IMAGE
from plait.model.objectives import pair_loss_of
from plait.training.build import label_columns
from plait.training.tasks import find_task

QUERIES = 1000  # records of val at most
EMBEDDED = 32  # pairs at once
HEADS = ("projection", "logit_scale", "logit_bias", "model.head.")  # what is trained where the encoders are frozen


def trains_pairs(dataset: Dataset, name: str) -> bool:
    """Whether a dataset's images with captions are pairs for the model `name`, which reads both."""
    try:
        if kind_of(hub.find(name)) != "contrastive" or dataset.manifest.kind != "records":
            return False
    except PlaitError:
        return False
    return IMAGE.kind in dataset.columns.values() and find_task(dataset, label_columns(dataset, 2**31)) == "describe"


@dataclass
class Pairs:
    """The records of a split that have both an image and a text."""

    dataset: Dataset
    image: str
    texts: list[str]  # columns
    indices: np.ndarray  # (N,)

    @classmethod
    def of(cls, dataset: Dataset, split: str) -> Pairs:
        """Raises PlaitError where the dataset has no column of images."""
        image = next((column for column, kind in dataset.columns.items() if kind == IMAGE.kind), None)
        if image is None:
            raise PlaitError(f"{dataset.path} has no images. Name a dataset that has images with texts.")
        texts = [column for column, kind in dataset.columns.items() if kind == "text"]
        with_text = [records_with(dataset, split, column) for column in texts]
        indices = np.intersect1d(
            records_with(dataset, split, image), np.concatenate([np.zeros(0, np.int64), *with_text])
        )
        return cls(dataset, image, texts, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, places: np.ndarray, draws: np.ndarray) -> tuple[list[Any], list[str]]:
        """Images and a text of each record at these places; `draws` in [0, 1) choose among several texts."""
        order = np.argsort(places, kind="stable")
        images: list[Any] = [None] * len(places)
        texts = [""] * len(places)
        records = self.dataset.iterate(self.indices[places[order]], [self.image, *self.texts])
        for place, record in zip(order.tolist(), records, strict=True):
            candidates = [str(record.parts[column]) for column in self.texts if column in record.parts]
            images[place] = record.parts.get(self.image)
            texts[place] = candidates[int(draws[place] * len(candidates))]
        readable = [i for i, value in enumerate(images) if value is not None]
        return [read_image(images[i]) for i in readable], [texts[i] for i in readable]


def train_pairs(
    dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Train the model `name`, or go on with the run in `folder`; what to tell of it.

    Raises PlaitError for parts that cannot be frozen and too few pairs. KeyboardInterrupt and Terminated are raised
    once the run was saved.
    """
    return PairTraining(dataset, folder, name, facts, recipe, device, progress).run()


class PairTraining(FurtherTraining):
    """A run that trains a model of images and texts."""

    score_name, peak, batch_size, epochs = "recall@10", 1e-5, 32, 5

    def __init__(
        self, dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.train, self.val = Pairs.of(dataset, "train"), Pairs.of(dataset, "val")
        if len(self.train) < 2:
            raise PlaitError(
                f"{dataset.path} has {len(self.train)} records of train with an image and a text; two are needed."
            )
        super().__init__(folder, name, facts, recipe, device, progress)
        self.objective = pair_loss_of([name for name, _ in self.network.named_parameters()])
        self._freeze()
        self.begin(len(self.train))

    def _freeze(self) -> None:
        if unknown := [part for part in self.recipe.freeze if part != "encoder"]:
            raise PlaitError(f"Of {self.name} the encoders can be frozen (--freeze encoder), not {unknown[0]}.")
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not self.recipe.freeze or any(head in name for head in HEADS))

    def loss(self, places: np.ndarray, step: int) -> Tensor:
        """The contrastive loss of a batch of pairs."""
        draws = uniform(self.recipe.seed, RNG_STREAM + 1, step, np.arange(self.batch))
        images, texts = self.train.read(places, draws)
        with self.model.device.autocast():
            a, b = _embed_images(self.model, images), _embed_texts(self.model, texts)
        number = text_numbers(texts)
        positives = torch.from_numpy(number[:, None] == number[None]).to(a.device)
        scalars = {name: getattr(self.network, name) for name in self.objective.scalars}
        return self.objective(a.float(), b.float(), positives, scalars)

    @property
    def validated(self) -> int:
        """Pairs of val that are searched."""
        return min(len(self.val), QUERIES)

    def score(self) -> float:
        """Of val, the share of texts that have an image of their own among the ten nearest; 0 where val is empty."""
        self.network.eval()
        pairs = embed_pairs(self.model, self.val, np.arange(self.validated))
        if not len(pairs.images):
            return 0.0
        scores = pairs.texts @ pairs.images.T
        best = np.where(pairs.same(0, len(scores)), scores, -np.inf).max(1, keepdims=True)
        return float(((scores > best).sum(1) < 10).mean())

    def describe(self, config: dict[str, Any]) -> str:
        """What a checkpoint goes by, and what it recalls, for people."""
        return describe_pairs(config)


@dataclass
class EmbeddedPairs:
    """Embeddings of pairs.

    Attributes:
        images: (N, E) float32.
        texts: (N, E) float32.
        numbers: Which of the different texts each pair has, (N,). An image belongs to every pair with its text.
    """

    images: np.ndarray
    texts: np.ndarray
    numbers: np.ndarray

    def same(self, start: int, stop: int) -> np.ndarray:
        """Whether the pairs from `start` to `stop` have the text of each pair, (stop - start, N)."""
        return np.asarray(self.numbers[start:stop, None] == self.numbers[None])


def text_numbers(texts: list[str]) -> np.ndarray:
    """Which of the different texts each one is, (N,)."""
    return np.unique(np.array(texts), return_inverse=True)[1]


def embed_pairs(model: Pretrained, pairs: Pairs, places: np.ndarray) -> EmbeddedPairs:
    """The images and the first text of each of the pairs at `places`; those whose image cannot be read are left out."""
    a, b, words = [torch.zeros(0, 0)], [torch.zeros(0, 0)], list[str]()
    with torch.inference_mode(), model.device.autocast():
        for part in np.split(places, range(EMBEDDED, len(places), EMBEDDED)) if len(places) else ():
            images, texts = pairs.read(part, np.zeros(len(part)))
            a.append(_embed_images(model, images).float().cpu())
            b.append(_embed_texts(model, texts).float().cpu())
            words += texts
    return EmbeddedPairs(torch.cat(a[1:] or a).numpy(), torch.cat(b[1:] or b).numpy(), text_numbers(words))


def _embed_images(model: Pretrained, images: list[Any]) -> Tensor:
    pixels = model.processor(images=images, return_tensors="pt")["pixel_values"]
    return _unit(model.model.get_image_features(pixel_values=pixels.to(model.device.torch)))


def _embed_texts(model: Pretrained, texts: list[str]) -> Tensor:
    inputs = {key: value.to(model.device.torch) for key, value in model.text_inputs(texts).items()}
    return _unit(model.model.get_text_features(**inputs))


def _unit(output: Any) -> Tensor:
    vector: Tensor = getattr(output, "pooler_output", output)
    return nn.functional.normalize(vector, dim=-1)


def describe_pairs(config: dict[str, Any]) -> str:
    """What a checkpoint goes by, and what it recalls, for people."""
    training = config["training"]
    recall = "nothing was held out"
    if training["records"]:
        share = training["validation"]["recall@10"]
        recall = f"of {training['records']} texts of val {share:.1%} have their own image among the ten nearest"
    return (
        f"{config['model_type']} from {training['init_from']}, {training['step']} steps on images with texts; {recall}."
    )
