"""CLIP and SigLIP trained further on pairs of one's own: `plait train DATA --init-from CLIP`, where DATA has images
with captions. A checkpoint is a folder of transformers', so that it loads there as it is.

The order of records is a function of the seed and the step. A run that was stopped goes on from its newest checkpoint.
Shapes: B records a step, E width of the shared space.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.core.config import TrainingRecipe
from plait.core.errors import PlaitError
from plait.core.files import (
    json_text,
    point,
    publish_folder,
    read_json,
    sealed,
    sha256_file,
    write_atomic,
    write_json,
)
from plait.core.rng import uniform
from plait.core.signals import signals
from plait.data.dataset import Dataset
from plait.hf import hub
from plait.hf.export import must_be_free
from plait.hf.pretrained import Pretrained, kind_of, load_pretrained, read_image
from plait.modalities.image_files import IMAGE
from plait.model.checkpoint import MANIFEST
from plait.model.objectives import pair_loss_of
from plait.training.build import label_columns
from plait.training.checkpointing import folder_name, retain
from plait.training.schedule import learning_rate_at
from plait.training.tasks import find_task

BATCH, EPOCHS, LEARNING_RATE, DECAY = 32, 5, 1e-5, 0.1
WARMUP = 0.05  # share of the steps
VALIDATIONS = 4  # of a run, each with a checkpoint
SAVE_SECONDS = 120.0  # between checkpoints at most
SHORTEST = 20  # steps of a schedule at least
PROBED = 3  # steps whose time says how many fit into a budget of minutes
QUERIES = 1000  # records of val at most
HEADS = ("projection", "logit_scale", "logit_bias", "model.head.")  # what is trained where the encoders are frozen
STATE = "optimizer.safetensors"
RNG_STREAM = 351  # of the random numbers of `uniform`, and the next one

Progress = Callable[..., None]


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
    """The records of a split that have an image and a text."""

    dataset: Dataset
    image: str
    texts: list[str]  # columns
    indices: np.ndarray  # (N,)

    @classmethod
    def of(cls, dataset: Dataset, split: str) -> Pairs:
        """Raises PlaitError where a split of train has fewer than two."""
        image = next(column for column, kind in dataset.columns.items() if kind == IMAGE.kind)
        texts = [column for column, kind in dataset.columns.items() if kind == "text"]
        indices = dataset.indices(split)
        present = np.zeros(len(indices), bool)
        for column in texts:
            present |= np.concatenate(
                [np.zeros(0, bool), *(cells.is_valid().to_numpy(False) for cells in dataset.cells(column, indices))]
            )
        return cls(dataset, image, texts, indices[present])

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


@dataclass
class State:
    """Where a run is."""

    step: int = 0
    steps: int = 0  # of the schedule; 0 until it is known
    best: float = -1.0  # recall of the best checkpoint
    best_step: int = 0


def train_pairs(
    dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Train the model `name`, or go on with the run in `folder`; what to tell of it.

    Raises PlaitError for parts that cannot be frozen and too few pairs. KeyboardInterrupt and Terminated are raised
    once the run was saved.
    """
    return Trainer(dataset, folder, name, facts, recipe, device, progress).run()


class Trainer:
    """A run that trains a model of images and texts."""

    def __init__(
        self, dataset: Dataset, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.facts, self.recipe, self.progress = folder, name, facts, recipe, progress
        self.train, self.val = Pairs.of(dataset, "train"), Pairs.of(dataset, "val")
        if len(self.train) < 2:
            raise PlaitError(f"{dataset.path} has {len(self.train)} images with texts in train; two are needed.")
        last = folder / "checkpoints" / "last"
        begun = (last / STATE).is_file()
        self.model: Pretrained = load_pretrained(last if begun else hub.find(name), device, "fp32")
        self.network: Any = self.model.model
        self.loss = pair_loss_of([name for name, _ in self.network.named_parameters()])
        self._freeze()
        self.batch = min(recipe.batch_size or BATCH, len(self.train))
        self.optimizer = self._optimizer()
        self.state = State(steps=recipe.steps or 0)
        if begun:
            self._restore(last)

    def _freeze(self) -> None:
        if unknown := [part for part in self.recipe.freeze if part != "encoder"]:
            raise PlaitError(f"Of {self.name} the encoders can be frozen (--freeze encoder), not {unknown[0]}.")
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not self.recipe.freeze or any(head in name for head in HEADS))

    def _optimizer(self) -> torch.optim.AdamW:
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-9, betas=(0.9, 0.98), fused=self.model.device.kind == "cpu")

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Train to the end of the schedule."""
        write_atomic(self.folder / "run.json", json_text({k: v for k, v in self.facts.items() if k != "finished"}))
        begun = saved = time.monotonic()
        if not self.state.steps and self.recipe.minutes is None:
            self.state.steps = max(EPOCHS * len(self.train) // self.batch, 1)
        with signals() as received:
            try:
                while not self.state.steps or self.state.step < self.state.steps:
                    with received.held():
                        loss = self._step()
                        self._budget(begun)
                        now, step, steps = time.monotonic(), self.state.step, self.state.steps
                        self.progress("train", step, steps or None, f"loss {loss:.3f}")
                        due = bool(steps) and (step * VALIDATIONS % steps < VALIDATIONS or now - saved > SAVE_SECONDS)
                        if due and step < steps:
                            self._save()
                            saved = time.monotonic()
                    received.check()
            except BaseException:
                self._save()
                raise
            with received.held():
                self._save()
        write_atomic(self.folder / "run.json", json_text(self.facts | {"finished": time.time()}))
        return [describe_pairs(read_json(self.folder / "checkpoints" / "best" / "config.json"))]

    def _budget(self, started: float) -> None:
        """Say how many steps there are, once the first ones tell how long one takes."""
        if not self.state.steps and self.state.step >= PROBED:
            assert self.recipe.minutes is not None
            step_seconds = (time.monotonic() - started) / self.state.step
            self.state.steps = max(int(self.recipe.minutes * 60 / step_seconds), self.state.step)

    def _step(self) -> float:
        """One batch; its loss in nats."""
        step = self.state.step
        draws = uniform(self.recipe.seed, RNG_STREAM + 1, step, np.arange(self.batch))
        images, texts = self.train.read(self._places(step), draws)
        peak = self.recipe.learning_rate or LEARNING_RATE
        learning_rate = learning_rate_at(step, max(self.state.steps, SHORTEST), peak, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.model.device.autocast():
            a, b = self._embed_images(images), self._embed_texts(texts)
        _, number = np.unique(np.array(texts), return_inverse=True)
        positives = torch.from_numpy(number[:, None] == number[None]).to(a.device)
        scalars = {name: getattr(self.network, name) for name in self.loss.scalars}
        loss = self.loss(a.float(), b.float(), positives, scalars)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.state.step += 1
        return float(loss.detach())

    def _places(self, step: int) -> np.ndarray:
        """Which pairs a step has, (B,): each epoch has an order of its own, and what does not fill a batch is left."""
        steps_per_epoch = len(self.train) // self.batch
        epoch, at = divmod(step, steps_per_epoch)
        order = np.argsort(uniform(self.recipe.seed, RNG_STREAM, epoch, np.arange(len(self.train))), kind="stable")
        return np.asarray(order[at * self.batch : (at + 1) * self.batch])

    def _embed_images(self, images: list[Any]) -> Tensor:
        pixels = self.model.processor(images=images, return_tensors="pt")["pixel_values"]
        return _unit(self.network.get_image_features(pixel_values=pixels.to(self.model.device.torch)))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        inputs = {key: value.to(self.model.device.torch) for key, value in self.model.text_inputs(texts).items()}
        return _unit(self.network.get_text_features(**inputs))

    # --- validation and checkpoints ---------------------------------------------------------------------------------

    def _recall(self) -> float:
        """Of val, the share of texts whose own image is among the ten nearest; 0 where val is empty."""
        places = np.arange(min(len(self.val), QUERIES))
        a, b = [], []
        self.network.eval()
        with torch.inference_mode(), self.model.device.autocast():
            for part in np.split(places, range(BATCH, len(places), BATCH)):
                if len(part):
                    images, texts = self.val.read(part, np.zeros(len(part)))
                    a.append(self._embed_images(images).float())
                    b.append(self._embed_texts(texts).float())
        if not a:
            return 0.0
        scores = torch.cat(b) @ torch.cat(a).T
        rank = (scores > scores.diagonal()[:, None]).sum(1)
        return float((rank < 10).float().mean())

    def _save(self) -> None:
        """A checkpoint, which becomes the last, and the best where it recalls more than those before."""
        recall = self._recall()
        name = folder_name(self.state.step)
        folder = self.folder / "checkpoints" / name
        best = recall >= self.state.best
        if best:
            self.state.best, self.state.best_step = recall, self.state.step
        training = {
            "step": self.state.step, "steps": self.state.steps, "best": self.state.best,
            "best_step": self.state.best_step, "seed": self.recipe.seed,
            "init_from": self.name, "validation": {"recall@10": recall}, "records": min(len(self.val), QUERIES),
        }  # fmt: skip
        with publish_folder(folder) as temporary, hub.quiet():
            self.network.save_pretrained(temporary)
            self.model.processor.save_pretrained(temporary)
            self.model.tokenizer.save_pretrained(temporary)
            write_json(temporary / "config.json", read_json(temporary / "config.json") | {"training": training})
            save_file(self._moments(), temporary / STATE)
            sums = {file.name: sha256_file(file) for file in sorted(temporary.iterdir()) if file.is_file()}
            write_atomic(temporary / "manifest.json", json_text(sealed({"version": MANIFEST, "sha256": sums})))
        point(self.folder / "checkpoints" / "last", name)
        if best:
            point(self.folder / "checkpoints" / "best", name)
        retain(self.folder / "checkpoints", {self.state.step, self.state.best_step})

    def _moments(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
        return tensors

    def _restore(self, folder: Path) -> None:
        training = read_json(folder / "config.json")["training"]
        self.state = State(training["step"], training["steps"], training["best"], training["best_step"])
        values = load_file(folder / STATE)
        for name, parameter in self.network.named_parameters():
            state = {key.partition("/")[0]: value for key, value in values.items() if key.partition("/")[2] == name}
            if state:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }


def export_pairs(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint as transformers has such models, without the state of training. Raises PlaitError where the
    folder is not free."""
    must_be_free(folder)
    with publish_folder(folder) as temporary:
        for file in sorted(checkpoint.iterdir()):
            if file.name not in (STATE, "manifest.json"):
                shutil.copyfile(file, temporary / file.name)
        config = read_json(temporary / "config.json")
        del config["training"]
        write_json(temporary / "config.json", config)


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
