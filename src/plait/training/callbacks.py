"""Callbacks of training: your own code, called at the start, after each step, after each validation and at the end.

    class Print(Callback):
        def on_step(self, event: StepEvent) -> None:
            print(event.step, event.loss)

    plait.train("data/photos", "runs/photos", callbacks=[Print()])

TensorBoard, MLflow and Weights & Biases are served by the adapters below. Where several processes train one model, the
first one alone calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.dist import install_command
from plait.core.errors import PlaitError

if TYPE_CHECKING:
    from plait.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class StartEvent:
    """Training is about to begin, or to go on.

    Attributes:
        folder: the run's folder.
        step: steps that are done; 0 for a new run.
        total_steps: steps of the schedule as planned. A time budget may change it on the way.
        recipe: the whole recipe as a nested dictionary.
        parameters: number of parameters by part of the model.
    """

    folder: Path
    step: int
    total_steps: int
    recipe: dict[str, Any]
    parameters: dict[str, int]


@dataclass(frozen=True)
class StepEvent:
    """A step is done.

    Attributes:
        step: steps that are done, from 1.
        total_steps: steps of the schedule as planned now.
        loss: the weighted sum that was minimised.
        losses: each objective's loss, in nats.
        learning_rate: of this step.
    """

    step: int
    total_steps: int
    loss: float
    losses: Mapping[str, float]
    learning_rate: float


@dataclass(frozen=True)
class ValidationEvent:
    """A validation is done.

    Attributes:
        step: steps that are done.
        losses: each objective's loss on val, in nats.
        improved: whether this is the best so far.
        copy: makes a copy of the model as it would be used now, which may be changed; None where its parameters lie
            on several processes.
    """

    step: int
    losses: Mapping[str, float]
    improved: bool
    copy: Callable[[], Checkpoint] | None = None


@dataclass(frozen=True)
class EndEvent:
    """Training has ended, or was stopped.

    Attributes:
        step: steps that are done.
        finished: False where it was stopped by a signal or an error; the run can go on.
        folder: the run's folder.
    """

    step: int
    finished: bool
    folder: Path


class Callback:
    """What is called while a model trains; override what you need.

    An exception that a callback raises ends the run, which then goes on from its last checkpoint.
    """

    def on_start(self, event: StartEvent) -> None:
        """Before the first step of this process."""

    def on_step(self, event: StepEvent) -> None:
        """After each step."""

    def on_validation(self, event: ValidationEvent) -> None:
        """After each validation."""

    def on_end(self, event: EndEvent) -> None:
        """After the last step, also where training was stopped."""


class Callbacks(Callback):
    """Several callbacks as one, called in their order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise PlaitError(
                    f"A callback is an object of a class derived from plait.Callback, not {type(callback).__name__}."
                )

    def on_start(self, event: StartEvent) -> None:
        for callback in self.callbacks:
            callback.on_start(event)

    def on_step(self, event: StepEvent) -> None:
        for callback in self.callbacks:
            callback.on_step(event)

    def on_validation(self, event: ValidationEvent) -> None:
        for callback in self.callbacks:
            callback.on_validation(event)

    def on_end(self, event: EndEvent) -> None:
        for callback in self.callbacks:
            callback.on_end(event)


class _Logger(Callback):
    """An adapter to a service that keeps numbers by step: losses of training every `every` steps, and of each
    validation. Derived classes say how to open it, how to write numbers and how to close it."""

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Keep numbers by name at a step."""
        raise NotImplementedError

    def on_step(self, event: StepEvent) -> None:
        if event.step % self.every == 0 or event.step == event.total_steps:
            numbers = {f"train/loss/{name}": value for name, value in event.losses.items()}
            self.write({**numbers, "train/loss": event.loss, "train/learning_rate": event.learning_rate}, event.step)

    def on_validation(self, event: ValidationEvent) -> None:
        self.write({f"val/loss/{name}": value for name, value in event.losses.items()}, event.step)


class TensorBoard(_Logger):
    """Writes TensorBoard events.

    Args:
        folder: where to; the run's folder `tensorboard` if left out.
        every: steps between two points of the training curves.

    Raises PlaitError when training starts and tensorboard is not installed.
    """

    def __init__(self, folder: str | Path | None = None, every: int = 10) -> None:
        super().__init__(every)
        self.folder = folder
        self.writer: Any = None

    def on_start(self, event: StartEvent) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PlaitError(f"TensorBoard is not installed ({error}). Run: {install_command('tensorboard')}") from None
        # What was written after the checkpoint that training goes on from is taken back.
        self.writer = SummaryWriter(str(self.folder or event.folder / "tensorboard"), purge_step=event.step + 1)

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def on_end(self, event: EndEvent) -> None:
        self.writer.close()


class MLflow(_Logger):
    """Logs a run to MLflow: the recipe as parameters, losses as metrics. An MLflow run that is active is used; else one
    is begun, and ended with training.

    Args:
        experiment: name of the experiment; MLflow's own default if left out.
        every: steps between two points of the training curves.

    Raises PlaitError when training starts and mlflow is not installed.
    """

    def __init__(self, experiment: str | None = None, every: int = 10) -> None:
        super().__init__(every)
        self.experiment = experiment
        self.mlflow: Any = None
        self.began = False

    def on_start(self, event: StartEvent) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise PlaitError(f"MLflow is not installed ({error}). Run: pip install mlflow") from None
        self.mlflow = mlflow
        if self.experiment is not None:
            mlflow.set_experiment(self.experiment)
        if mlflow.active_run() is None:
            mlflow.start_run(run_name=event.folder.name)
            self.began = True
        mlflow.log_params({name: value for name, value in flattened(event.recipe).items() if value is not None})

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(numbers, step=step)

    def on_end(self, event: EndEvent) -> None:
        if self.began:
            self.mlflow.end_run("FINISHED" if event.finished else "KILLED")


class WandB(_Logger):
    """Logs a run to Weights & Biases.

    Args:
        project: name of the project.
        every: steps between two points of the training curves.
        options: further arguments of `wandb.init`, such as `mode="offline"`.

    Raises PlaitError when training starts and wandb is not installed.
    """

    def __init__(self, project: str = "plait", every: int = 10, **options: Any) -> None:
        super().__init__(every)
        self.project, self.options = project, options
        self.run: Any = None

    def on_start(self, event: StartEvent) -> None:
        try:
            import wandb
        except ImportError as error:
            raise PlaitError(f"Weights & Biases is not installed ({error}). Run: pip install wandb") from None
        options = {"project": self.project, "name": event.folder.name, "config": event.recipe, **self.options}
        self.run = wandb.init(**options)

    def write(self, numbers: dict[str, float], step: int) -> None:
        # A validation is told after its step, so that steps never go back.
        self.run.log(numbers, step=step)

    def on_end(self, event: EndEvent) -> None:
        self.run.finish(exit_code=0 if event.finished else 1)


def flattened(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested dictionary as a flat one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
