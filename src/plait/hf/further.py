"""Models of transformers trained further on data of one's own. A checkpoint is a folder of transformers', so that it
loads there as it is.

The order of records is a function of the seed and the step. A run that was stopped goes on from its newest checkpoint.
Shapes: B records a step.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.core.config import TrainingRecipe
from plait.core.files import (
    json_text,
    point,
    publish_folder,
    read_json,
    write_atomic,
    write_json,
)
from plait.core.rng import uniform
from plait.core.signals import signals
from plait.hf import hub
from plait.hf.export import must_be_free
from plait.hf.pretrained import Pretrained, load_pretrained
from plait.model.checkpoint import write_manifest
from plait.training.checkpointing import folder_name, retain
from plait.training.optimizer import decay_groups
from plait.training.schedule import learning_rate_at

DECAY = 0.1
WARMUP = 0.05  # share of the steps
VALIDATIONS = 4  # of a run, each with a checkpoint
SAVE_SECONDS = 120.0  # between checkpoints at most
SHORTEST = 20  # steps of a schedule at least
PROBED = 3  # steps whose time says how many fit into a budget of minutes
STATE = "optimizer.safetensors"
RNG_STREAM = 351  # of the random numbers of `uniform`, and the next one

Progress = Callable[..., None]


@dataclass
class State:
    """Where a run is."""

    step: int = 0
    steps: int = 0  # of the schedule; 0 until it is known
    best: float | None = None  # score of the best checkpoint
    best_step: int = 0


class FurtherTraining(ABC):
    """A run that trains a model of transformers. A subclass says what is trained, what a step learns, and how a
    checkpoint is judged.

    Attributes:
        score_name: What `score` gives, under which checkpoints keep it.
        peak: Learning rate where the recipe says nothing.
        batch: Records a step, at most.
        epochs: Of a run that is given neither steps nor minutes.
    """

    score_name: ClassVar[str]
    peak: ClassVar[float]
    batch_size: ClassVar[int]
    epochs: ClassVar[int]

    def __init__(
        self, folder: Path, name: str, facts: dict[str, Any], recipe: TrainingRecipe, device: str, progress: Progress
    ) -> None:
        """Loads the model: the newest checkpoint of `folder`, or `name` where there is none."""
        self.folder, self.name, self.facts, self.recipe, self.progress = folder, name, facts, recipe, progress
        last = folder / "checkpoints" / "last"
        self.newest = last if (last / STATE).is_file() else None
        self.model: Pretrained = load_pretrained(self.newest or hub.find(name), device, "fp32")
        self.network: Any = self.model.model

    def begin(self, records: int) -> None:
        """Make the optimizer for `records` of train, once it is decided which parameters are trained."""
        self.records, self.batch = records, min(self.recipe.batch_size or self.batch_size, records)
        self.optimizer = self._optimizer()
        self.state = State(steps=self.recipe.steps or 0)
        if self.newest is not None:
            self._restore(self.newest)

    @abstractmethod
    def loss(self, places: np.ndarray, step: int) -> Tensor:
        """The loss, in nats, of the records of train at `places` (B,)."""

    @abstractmethod
    def score(self) -> float:
        """How good the model is on val; more is better, and 0 where val is empty."""

    @property
    @abstractmethod
    def validated(self) -> int:
        """Records of val that `score` looks at."""

    @abstractmethod
    def describe(self, config: dict[str, Any]) -> str:
        """What a checkpoint of this configuration goes by, for people."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def _optimizer(self) -> torch.optim.AdamW:
        fused = self.model.device.kind == "cpu"
        return torch.optim.AdamW(decay_groups(self.trained, DECAY), lr=1e-9, betas=(0.9, 0.98), fused=fused)

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Train to the end of the schedule; what to tell of it. KeyboardInterrupt and Terminated are raised once the
        run was saved."""
        write_atomic(self.folder / "run.json", json_text({k: v for k, v in self.facts.items() if k != "finished"}))
        begun = saved = time.monotonic()
        if not self.state.steps and self.recipe.minutes is None:
            self.state.steps = max(self.epochs * self.records // self.batch, 1)
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
        return [self.describe(read_json(self.folder / "checkpoints" / "best" / "config.json"))]

    def _budget(self, started: float) -> None:
        """Say how many steps there are, once the first ones tell how long one takes."""
        if not self.state.steps and self.state.step >= PROBED:
            assert self.recipe.minutes is not None
            step_seconds = (time.monotonic() - started) / self.state.step
            self.state.steps = max(int(self.recipe.minutes * 60 / step_seconds), self.state.step)

    def _step(self) -> float:
        """One batch; its loss in nats."""
        step = self.state.step
        peak = self.recipe.learning_rate or self.peak
        learning_rate = learning_rate_at(step, max(self.state.steps, SHORTEST), peak, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self._places(step), step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.state.step += 1
        return float(loss.detach())

    def _places(self, step: int) -> np.ndarray:
        """Which records a step has, (B,): each epoch has an order of its own, and what does not fill a batch is
        left."""
        steps_per_epoch = self.records // self.batch
        epoch, at = divmod(step, steps_per_epoch)
        order = np.argsort(uniform(self.recipe.seed, RNG_STREAM, epoch, np.arange(self.records)), kind="stable")
        return np.asarray(order[at * self.batch : (at + 1) * self.batch])

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint, which becomes the last, and the best where its score is not below those before."""
        score = self.score()
        name = folder_name(self.state.step)
        folder = self.folder / "checkpoints" / name
        best = self.state.best is None or score >= self.state.best
        if best:
            self.state.best, self.state.best_step = score, self.state.step
        training = {
            "step": self.state.step, "steps": self.state.steps, "best": self.state.best,
            "best_step": self.state.best_step, "seed": self.recipe.seed, "init_from": self.name,
            "validation": {self.score_name: score}, "records": self.validated,
        }  # fmt: skip
        with publish_folder(folder) as temporary, hub.quiet():
            self.network.save_pretrained(temporary)
            self.model.processor.save_pretrained(temporary)
            self.model.tokenizer.save_pretrained(temporary)
            write_json(temporary / "config.json", read_json(temporary / "config.json") | {"training": training})
            save_file(self._moments(), temporary / STATE)
            write_manifest(temporary)
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


def is_further(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint of a model that was trained further."""
    return (checkpoint / STATE).is_file()


def export_further(checkpoint: Path, folder: Path) -> None:
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
