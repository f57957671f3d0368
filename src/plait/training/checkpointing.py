"""Saving a run so that nothing tears, and going on from it bit for bit.

A checkpoint `checkpoints/step-000200` holds the weights that are used and, beside them, what training needs to go
on: `training_state.safetensors` (optimizer, random state, the raw weights where an average of them is used) and
`training_state.json` (the position). It is written aside by a thread of its own from copies of the tensors, fsynced,
renamed; then `last` and `best` are pointed at it, and what need not be kept is removed.

Of many processes the first one writes. Where the model is sharded, each of them writes its shards of the training
state, and the folder `training_state` holds them instead; any number of processes can go on from either.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from plait.core.errors import PlaitError
from plait.core.files import clear_leftovers, fsync_folder, link_target, point, read_json, remove_folder
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.training.distributed import Group, full_tensor, is_shard, read_tensors, stored_tensors, write_shards
from plait.training.optimizer import WeightAverage
from plait.training.run import difference

STATE = "training_state"


@dataclass
class Position:
    """Where a run stands, apart from its tensors."""

    step: int = 0  # steps taken
    validated: int = 0  # the last step that was validated
    best: float | None = None  # the best validation so far, and its step; of none, the newest is the best known
    best_step: int = 0
    stale: int = 0  # validations since the best
    first: float | None = None  # mean loss of the first steps, by which an explosion shows
    tokens: int = 0  # since the last row of the log, as are the losses of
    recent: dict[str, list[float]] = field(default_factory=dict)

    def judge(self, score: float | None) -> bool:
        """Take note of a validation of this step (None: there was nothing to validate); True for the best so far."""
        self.validated = self.step
        if score is None:
            return False
        improved = self.best is None or score < self.best
        if improved:
            self.best, self.best_step = score, self.step
        self.stale = 0 if improved else self.stale + 1
        return improved


@dataclass
class Snapshot:
    """Copies of tensors, on the CPU, that training no longer touches."""

    weights: dict[str, Tensor]  # what is used
    state: dict[str, Tensor]  # what training needs beside them
    shards: Path | None = None  # or the folder where the processes put it


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    group: Group,
    temporary: Path,
    inherited: Set[str] = frozenset(),
) -> Snapshot:
    """Copy what a checkpoint holds; the caller may change everything right after. Only the first process gets it, and
    where the model is sharded the training state is put into the folder `temporary` by all of them. What is `inherited`
    from a base is left out."""
    state = {f"random.{device}": tensor for device, tensor in random_state().items()}
    for name, parameter in _named(model, optimizer):
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in inherited}
    if average is not None:
        for name, tensor in average.weights.items():
            state[f"raw.{name}"], weights[name] = weights[name], tensor
    if any(is_shard(tensor) for tensor in weights.values()):
        gathered = {}
        for name, tensor in weights.items():
            full = full_tensor(tensor)
            if group.is_main:
                gathered[name] = _copy(full)
        write_shards(temporary, state)
        return Snapshot(gathered, {}, temporary)
    if not group.is_main:
        return Snapshot({}, {})
    copies = [{name: _copy(tensor) for name, tensor in tensors.items()} for tensors in (weights, state)]
    return Snapshot(copies[0], copies[1])


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    inherited: Set[str] = frozenset(),
) -> Position:
    """Take up a checkpoint that was verified: weights, optimizer, average and random state, in place. What is
    `inherited` is there already.

    Raises PlaitError where it does not fit the model.
    """
    try:
        position = Position(**read_json(folder / f"{STATE}.json"))
        weights, state = _read(folder, model, optimizer)
        raw = {name.removeprefix("raw."): tensor for name, tensor in state.items() if name.startswith("raw.")}
        missing, unknown = model.load_state_dict({**weights, **raw}, strict=False)
        if odd := [*(set(missing) - inherited), *unknown]:
            raise KeyError(odd[0])
        if average is not None:
            for name, tensor in average.weights.items():
                tensor.copy_(weights[name])
        taken: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(_named(model, optimizer)):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in state]
            if keys:  # a parameter that no step has used yet has none
                taken[index] = {key: state[f"optimizer.{key}.{name}"] for key in keys}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": taken})
    except (KeyError, TypeError, RuntimeError, OSError) as error:
        raise PlaitError(f"{folder} is not a checkpoint that this run can go on from: {error}.") from error
    set_random_state({name.removeprefix("random."): t for name, t in state.items() if name.startswith("random.")})
    return position


def _read(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and the training state of a checkpoint, of which each process reads its shards where it has any."""
    own = model.state_dict()
    shards = folder / STATE
    if not shards.is_dir() and not any(is_shard(tensor) for tensor in own.values()):
        return load_file(folder / "model.safetensors"), load_file(folder / f"{STATE}.safetensors")
    place = shards if shards.is_dir() else folder
    stored = stored_tensors(folder)
    weights = {name: torch.empty_like(tensor) for name, tensor in own.items() if name in stored}
    read_tensors(folder, weights)
    state = {name: t for name, t in stored_tensors(place).items() if name.startswith(("optimizer.", "random.", "raw."))}
    for name, tensor in state.items():
        of = name.split(".", 1 if name.startswith("raw.") else 2)[-1]
        sharded = tensor.ndim > 0 and of in own and is_shard(own[of])
        state[name] = torch.empty_like(own[of]) if sharded else torch.empty_like(tensor, device="cpu")
    read_tensors(place, state)
    return weights, state


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their names in the model, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(names[parameter], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, by device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's random generators of all devices that are there."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


class Saver:
    """The checkpoints of a run: written in the background one at a time, kept by a rule.

    Kept are the newest `keep`, the best that each of them knows, and every `keep_every`-th step. All processes of a
    group call the same methods; the first one writes.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, group: Group) -> None:
        self.folder, self.keep, self.keep_every, self.group = folder, keep, keep_every, group
        self.inherited: Set[str] = frozenset()  # tensors that checkpoints leave out
        self.step = 0  # the last one that was handed over, or gone on from
        self._damaged: list[Path] = []  # newer ones, removed once there is a whole one in their place
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> tuple[Path | None, list[str]]:
        """Clear away what a kill left; the newest whole checkpoint to go on from, if there is any, and what is wrong
        with newer ones. Raises PlaitError where there are checkpoints and all of them are damaged."""
        wrong: list[str] = []
        with self.group.main_first():
            if self.group.is_main:
                for left in self.folder.glob(".*.*.*"):
                    clear_leftovers(self.folder / left.name[1:].split(".")[0])
                self.step, wrong = checkpoints.newest_whole(self.folder)
            if wrong and not self.step:
                raise PlaitError(
                    f"No checkpoint of {self.folder} is whole: {'; '.join(wrong)}. "
                    "Put one back from a copy, or delete the run's folder to train again."
                )
        self.step = int(self.group.broadcast(self.step))
        if not self.step:
            return None, []
        self._damaged = [path for step, path in checkpoints.series(self.folder).items() if step > self.step]
        return self.folder / folder_name(self.step), wrong

    def save(
        self,
        checkpoint: Checkpoint,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        position: Position,
    ) -> None:
        """Hand a checkpoint to the thread that writes; waits only where the one before is not yet written.

        Raises PlaitError where that one failed.
        """
        self.wait()
        process = int(self.group.broadcast(os.getpid()))
        temporary = self.folder / f".{STATE}.{process}.tmp"
        taken = snapshot(checkpoint.model, optimizer, average, self.group, temporary, self.inherited)
        if position.best is None:
            position.best_step = position.step
        self.step = position.step
        if not self.group.is_main:
            return
        text = json.dumps(asdict(position))
        work = (checkpoint, taken, text, position.step, position.best_step)
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until everything handed over lies on the disk. Raises PlaitError where it could not be written."""
        self.join()
        self.check()

    def join(self) -> None:
        """Wait until nothing is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint, taken: Snapshot, position: str, step: int, best: int) -> None:
        def more(folder: Path) -> None:
            if taken.shards is not None:
                taken.shards.rename(folder / STATE)
            else:
                checkpoints.write_tensors(folder / f"{STATE}.safetensors", taken.state)
            (folder / f"{STATE}.json").write_text(position + "\n", encoding="utf-8", newline="\n")

        try:
            checkpoints.save(checkpoint, self.folder / folder_name(step), taken.weights, more)
            self.point(step, best)
            self._retain(step)
        except BaseException as error:
            self._failure = error

    def point(self, step: int, best: int) -> None:
        """`last` to a step, `best` to another; where that one is gone, to this one."""
        if not self.group.is_main:
            return
        point(self.folder / "last", folder_name(step))
        known = (self.folder / folder_name(best)).is_dir()
        point(self.folder / "best", folder_name(best if known else step))

    def _retain(self, step: int) -> None:
        for path in self._damaged:
            if path.name != folder_name(step):
                remove_folder(path)
        self._damaged = []
        saved = checkpoints.series(self.folder)
        newest = list(saved)[: self.keep]
        keep = {*newest, *(step for step in saved if self.keep_every and step % self.keep_every == 0)}
        for step in newest:
            with suppress(PlaitError, KeyError, TypeError):  # one that was damaged meanwhile knows no best
                keep.add(read_json(saved[step] / f"{STATE}.json")["best_step"])
        retain(self.folder, keep)


def retain(folder: Path, steps: Set[int]) -> None:
    """Remove the checkpoints of all other steps from a run's `checkpoints` folder."""
    saved = checkpoints.series(folder)
    for step in saved.keys() - steps:
        remove_folder(saved[step])
    fsync_folder(folder)


def folder_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def describe(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run's folder, the newest first: step, names (of links), bytes, validation, wrong."""
    series = checkpoints.series(folder / "checkpoints")
    if not series:
        raise PlaitError(f"{folder} holds no checkpoint of a run. Name the folder of a run.")
    links = {name: link_target(folder / "checkpoints" / name) for name in ("best", "last")}
    rows = []
    for step, path in series.items():
        wrong = checkpoints.verify(path)
        facts = {} if wrong else read_json(path / "config.json")["training"]
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        names = [name for name, target in links.items() if target == path.name]
        rows.append(
            {"step": step, "names": names, "bytes": size, "validation": facts.get("validation", {}), "wrong": wrong}
        )
    return rows


def check_same_network(folder: Path, model: Multimodal) -> None:
    """Raise PlaitError where a checkpoint is of another network than the run's recipe and data make."""
    config = read_json(folder / "config.json")
    config_now = model.config.model_dump(mode="json")
    settings = config_now.pop("modalities")
    stored = ModelConfig.model_validate({name: config.get(name) for name in config_now}).model_dump(mode="json")
    del stored["modalities"]
    for one in (config_now, stored):
        one["backbone"] = {name: value for name, value in one["backbone"].items() if name != "dropout"}
    different = difference(stored, config_now) + difference(read_json(folder / "preprocessor_config.json"), settings)
    if different:
        raise PlaitError(f"{folder} is of another network{different}. Choose another folder with -o.")
