"""From a dataset to a run: tokenizer, codecs, then the model, with validation, checkpoints and a log.

A run folder holds `run.json` (what was decided, once), `log.jsonl`, `codecs/`, `checkpoints/{best,last}`, `cache/`
and TensorBoard events. The same command on the same folder goes on where the run stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.config import SIZES, Recipe
from plait.data.dataset import Dataset
from plait.modalities.text import Text
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Multimodal
from plait.runtime import (
    Device,
    DivergedError,
    PlaitError,
    choose_device,
    only_writer,
    read_json,
    threads,
    uniform,
    write_json,
)
from plait.training.batches import PASS, Sampler, Split, add_codes, load_split, room_needed
from plait.training.codecs import train_codec
from plait.training.distributed import Group, Network
from plait.training.losses import Passes, step_losses, weighted
from plait.training.optimizer import learning_rate_at, make_optimizer
from plait.training.setup import label_columns, model_config

UNRESTRICTED, DROPOUT = 17, 18  # keys of `uniform`: for steps with the whole softmax, and for what a step hides
CALIBRATION = 8  # steps that a time budget is measured by
MANNER = ("accumulate", "parallel", "recompute")  # settings that change how a step is computed, not what
FEW = 10_000  # samples below which what is written is augmented too


@dataclass
class Progress:
    """What a training run tells while it works."""

    stage: str
    done: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    note: str = ""


Report = Callable[[Progress], None]


class Run:
    """The folder of a run and what training knows."""

    def __init__(
        self, folder: Path, dataset: Dataset, recipe: Recipe, report: Report, device: Device,
        reuse: Path | None = None, group: Group | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.dataset, self.recipe, self.device = folder, dataset, recipe, device
        self.group = group or Group()
        self.report: Report = report if self.group.first else lambda progress: None
        self.source = reuse or folder  # whose tokenizer, codecs and cache
        self.settings = recipe.training
        self.size = SIZES[recipe.model.size]
        self.batch_size = self.settings.batch_size or self.size.batch_size
        self.peak = self.settings.learning_rate or self.size.learning_rate
        self.facts: dict[str, Any] = {}

    @property
    def minutes(self) -> float:
        return self.settings.minutes or self.size.minutes

    def decide(self, **facts: Any) -> None:
        """Write down what was chosen once; on resume it is only read."""
        self.facts.update(facts)
        if self.group.first:
            write_json(self.folder / "run.json", self.facts)

    def open(self) -> bool:
        """Begin or go on; True where the run had been finished. Refuses a folder of another recipe or dataset."""
        shards = "".join(shard.sha256 for shard in self.dataset.manifest.shards)
        fingerprint = hashlib.sha256(shards.encode()).hexdigest()
        wanted = {
            "recipe": self.recipe.model_dump(mode="json"),  # as run.json gives it back
            "dataset": str(self.dataset.path),
            "data": fingerprint,
        }
        path = self.folder / "run.json"
        if not path.exists():
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            self.decide(
                **wanted, seed=self.settings.seed, size=self.recipe.model.size, device=self.device.name,
                threads=torch.get_num_threads(),
                precision=str(self.device.dtype).removeprefix("torch."), torch=torch.__version__, started=time.time(),
            )  # fmt: skip
            return False
        self.facts = read_json(path)
        for name in ("recipe", "data"):
            old, new = self.facts.get(name), wanted[name]
            if name == "recipe":  # what changes no step may change
                old, new = (_without_manner(recipe) for recipe in (old, new))
            if old != new:
                raise PlaitError(
                    f"{self.folder} holds a run of another {'dataset' if name == 'data' else 'recipe'}"
                    f"{_difference(old, new)}. Choose another folder with -o, or delete it."
                )
        return "finished" in self.facts

    def steps_from(self, number: int) -> int:
        """The length of the schedule as it stands at a step."""
        revised = self.facts.get("revised")
        return int(revised["steps"] if revised and number >= revised["at"] else self.facts["steps"])

    def text(self) -> Text:
        """The tokenizer: trained on the train split's texts, or read again on resume."""
        path = self.source / "tokenizer.json"
        if not path.exists():
            train = self.dataset.indices("train")
            texts = [self.dataset.texts(c) for c, kind in self.dataset.columns.items() if kind == "text"]
            vocabulary = self.recipe.model.text.vocabulary or self.size.vocabulary
            Text.train((t[i] for t in texts for i in train if t[i] is not None), vocabulary).save(path)
        return Text.load(path)

    def codecs(self, model: Multimodal, splits: dict[str, Split]) -> None:
        """Train each codec, or read it again; then encode all media."""
        anew = False
        for name, modality in model.media.items():
            path = self.source / "codecs" / f"{name}.safetensors"
            if path.exists():
                modality.codec.load_state_dict(load_file(path))
                modality.codec.eval().requires_grad_(False)
                continue
            stores = [splits["train"].media[c] for c, m in self.dataset.columns.items() if m == name]
            result = train_codec(
                modality,
                stores,
                steps=self.settings.codec_steps,
                seconds=self.minutes * 60 * self.settings.codec_share,
                learning_rate=self.settings.codec_learning_rate,
                seed=self.settings.seed,
                progress=lambda name, done, total, loss: self.report(
                    Progress(f"{name} codec", done, total, {"reconstruction": loss})
                ),
            )
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".tmp")
            save_file({k: v.contiguous() for k, v in modality.codec.state_dict().items()}, aside)
            aside.replace(path)
            self.decide(codecs={**self.facts.get("codecs", {}), name: result})
            anew = True
        for name, split in splits.items():
            add_codes(split, self.dataset.columns, model.media, self.source / "cache", name, anew)


def _without_manner(recipe: Any) -> Any:
    training = {name: value for name, value in recipe["training"].items() if name not in MANNER}
    return {**recipe, "training": training}


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first keys in which two nested dictionaries differ, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_difference(old.get(k), new.get(k), f"{where}.{k}".strip(".")) for k in {**old, **new}]
        return "".join(part for part in parts if part)
    return "" if old == new else f" ({where or 'sha256'}: was {old}, now {new})"


def train(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    report: Report,
    device_name: str = "auto",
    reuse: Path | None = None,
    group: Group | None = None,
) -> Path:
    """Train a model on a dataset into `folder`; returns its best checkpoint. Ctrl-C leaves a usable run.

    `reuse` names a run of the same data that is past its preparation: its tokenizer, codecs and cache serve again,
    and the time that they took counts as this run's. Each process of a `group` calls this; the first of them prepares
    and writes. Raises PlaitError for what the user can mend: no records, a folder of another run, a folder that is
    not writable.
    """
    group = group or Group()
    device = group.device(choose_device(device_name, recipe.training.precision, training=True))
    torch.set_num_threads(threads())
    with only_writer(folder) if group.first else nullcontext():
        run = Run(folder, dataset, recipe, report, device, reuse, group)
        report = run.report
        best = folder / "checkpoints" / "best"
        with group.in_turn():
            finished = run.open()
        if finished:
            report(Progress("finished", 1, 1, note=f"{folder} is already trained; delete it to train again"))
            return best
        begun = time.perf_counter()
        torch.manual_seed(recipe.training.seed)
        imported = None
        if recipe.model.init_from:
            from plait.model import huggingface

            imported = huggingface.load(recipe.model.init_from)
        with group.in_turn():
            text = imported.text if imported else run.text()
        config = model_config(recipe, dataset, text.size, imported.model.config if imported else None)
        if imported:
            model = huggingface.extend(imported, config)
        else:
            model = Multimodal(config)
        splits = {}
        for name in ("train", "val"):
            with group.in_turn():
                splits[name] = load_split(
                    dataset, name, text, model.media, run.source / "cache", config.backbone.max_length,
                    lambda stage, done, total: report(Progress(stage, done, total)),
                    limit=None if name == "train" else 2000,
                )  # fmt: skip
        if len(splits["train"]) < 2:
            raise PlaitError(f"{dataset.path} has {len(splits['train'])} records to train on; at least 2 are needed.")
        needed = room_needed(splits["train"], dataset.columns, model.media)
        if needed > config.backbone.max_length:
            raise PlaitError(
                f"The model's context of {config.backbone.max_length} tokens is too short for the media, which need "
                f"{needed}. Raise model.backbone.context in the recipe, or take smaller pictures or shorter clips."
            )
        if notes := splits["train"].notes:
            run.decide(notes=notes)
            report(Progress("note", 1, 1, note="; ".join(notes)))
        parameters = model.parameter_count()
        run.decide(decided={"parameters": parameters, "batch_size": run.batch_size, "learning_rate": run.peak})
        note = f"{sum(parameters.values()):,} parameters, batch {run.batch_size}, learning rate {run.peak:g}"
        report(Progress("size " + recipe.model.size, 1, 1, note=note))
        with group.in_turn():
            run.codecs(model, splits)
        model.to(device.torch)
        if "prepared" not in run.facts:
            before = read_json(reuse / "run.json")["prepared"] if reuse else 0.0
            run.decide(prepared=group.told(max(time.perf_counter() - begun, before)))
        _optimise(run, model, text, splits, max(run.minutes * 60 - run.facts["prepared"], 1.0))
        run.decide(finished=time.time())
        return best


def _optimise(run: Run, model: Multimodal, text: Text, splits: dict[str, Split], seconds: float) -> None:
    """The steps of the model itself."""
    settings, group, folder = run.settings, run.group, run.folder
    context = model.config.backbone.max_length

    few = max((len(samples) for samples in splits["train"].media.values()), default=0) < FEW
    augment_targets = few if settings.augment_targets is None else settings.augment_targets

    model.backbone.recompute(settings.recompute)
    network = Network(Passes(model, run.device), model.backbone, group, settings.parallel, run.device)

    def sampler(name: str, batch_size: int, augment: bool, drop: float) -> Sampler:
        return Sampler(
            splits[name], model.vocabulary, model.media, batch_size, context, settings.seed, drop, augment,
            augment_targets, frozenset(name for name, weight in settings.weights.items() if weight == 0),
            math.inf if network.sharded else PASS,
        )  # fmt: skip

    training = sampler("train", run.batch_size, settings.augment, settings.drop_condition)
    # The same records and as many negatives whatever the batch size, so that runs can be compared.
    validating: Sampler | None = sampler("val", run.size.batch_size, False, 0.0) if len(splits["val"]) else None
    if validating is not None and len(validating.items) < 2:
        validating = None
    cut = group.size * settings.accumulate
    if training.batch_size < cut:
        raise PlaitError(
            f"A batch of {training.batch_size} records cannot be cut into {cut} parts ({group.size} processes, "
            f"training.accumulate {settings.accumulate}). Take fewer, or a larger training.batch_size."
        )
    optimizer = make_optimizer([model], run.peak, settings.weight_decay, settings.betas)

    def one(number: int) -> tuple[dict[str, float], int]:
        restricted = bool(uniform(settings.seed, number, UNRESTRICTED) >= settings.unrestricted)
        key = int(uniform(settings.seed, number, group.rank, DROPOUT) * 2**62)
        mine = range(group.rank * settings.accumulate, (group.rank + 1) * settings.accumulate)
        parts = [training.step(number, part, cut) for part in mine]
        optimizer.zero_grad(set_to_none=True)
        losses, tokens = step_losses(network, parts, splits["train"], group, restricted, settings.weights, key)
        norm = network.clip(settings.clip)
        if not math.isfinite(norm):
            names = ", ".join(splits["train"].ids[r] for r in training.members(number)[1][:8, 0])
            raise DivergedError(
                f"The loss is not finite at step {number} (records {names} ...). The last checkpoint is kept; "
                "lower training.learning_rate, or look at these records."
            )
        optimizer.step()
        return losses, tokens

    model.train()
    if "steps" not in run.facts:
        run.decide(steps=settings.steps or int(group.told(_calibrate(model, optimizer, one, seconds))))
        optimizer = make_optimizer([model], run.peak, settings.weight_decay, settings.betas)
    planned: int = run.facts["steps"]
    begun = time.perf_counter()
    saver = _Saver(run, model, text, optimizer)
    start = saver.resume()
    steps = run.steps_from(start)
    every = max(planned // settings.validations, 1)
    log = _Log(folder)
    recent: dict[str, list[float]] = {}
    tokens, clock = 0, time.perf_counter()
    number = start
    try:
        while number < steps and saver.stale < settings.patience:
            if number == planned // 4 and start == 0 and settings.steps is None and "revised" not in run.facts:
                _revise(run, number, planned, seconds, group.told(time.perf_counter() - begun))
            steps = run.steps_from(number)
            for options in optimizer.param_groups:
                options["lr"] = learning_rate_at(number, steps, run.peak, settings.warmup)
            losses, seen = one(number)
            number += 1
            tokens += seen
            for name, value in losses.items():
                recent.setdefault(name, []).append(value)
            if number % 10 == 0 or number == steps:
                now = time.perf_counter()
                means = {name: float(np.mean(values)) for name, values in recent.items()}
                log.write(number, "train", means, tokens / (now - clock), optimizer.param_groups[0]["lr"])
                run.report(Progress("model", number, steps, means, tokens / (now - clock)))
                recent, tokens, clock = {}, 0, now
            if number % every == 0 or number == steps:
                scores = validate(network, validating, splits["val"], group) if validating else {}
                if scores:
                    log.write(number, "val", scores)
                    run.report(Progress("validation", number, steps, scores))
                saver.save(number, scores, weighted(scores, settings.weights))
                clock = time.perf_counter()
    except KeyboardInterrupt:
        saver.save(number, {}, math.inf)
        raise
    finally:
        log.close()
    if number < steps:
        run.decide(stopped_early=number)


def _revise(run: Run, number: int, planned: int, seconds: float, used: float) -> None:
    """Plan fewer steps, once, where a quarter of them shows that the machine is slower than it was measured."""
    possible = number + int(max(seconds - used, 0) / (used / number))
    if possible < 0.9 * planned:
        run.decide(revised={"at": number, "steps": max(possible, number + 1)})


def _calibrate(
    model: Multimodal,
    optimizer: torch.optim.Optimizer,
    one: Callable[[int], Any],
    seconds: float,
) -> int:
    """How many steps fit in the time left, by throw-away steps; leaves the weights as they were."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for options in optimizer.param_groups:
        options["lr"] = 0.0
    one(0)
    clock = [time.perf_counter()]
    for number in range(CALIBRATION):
        one(number)
        clock.append(time.perf_counter())
    model.load_state_dict(weights)
    torch.set_rng_state(state)
    return max(int(seconds * 0.93 / np.median(np.diff(clock))), 20)  # validation takes the rest


def validate(network: Network, sampler: Sampler, split: Split, group: Group, steps: int = 8) -> dict[str, float]:
    """Mean losses over the first records of the validation split, the same at each call and on every process."""
    network.passes.eval()
    sums: dict[str, list[float]] = {}
    for number in range(min(steps, sampler.steps_per_epoch)):
        losses, _ = step_losses(network, [sampler.step(number, group.rank, group.size)], split, group)
        for name, value in losses.items():
            sums.setdefault(name, []).append(value)
    network.passes.train()
    return {name: float(np.mean(values)) for name, values in sums.items()}


class _Saver:
    """Keeps `last`, with what resuming needs, and `best` by validation."""

    def __init__(self, run: Run, model: Multimodal, text: Text, optimizer: torch.optim.Optimizer) -> None:
        self.run, self.model, self.text, self.optimizer = run, model, text, optimizer
        self.folder = run.folder / "checkpoints"
        self.labels = label_columns(run.dataset, model.config.backbone.max_length)
        self.best, self.stale = math.inf, 0

    def save(self, step: int, scores: dict[str, float], score: float) -> None:
        improved = score < self.best
        if scores:
            self.best, self.stale = min(score, self.best), 0 if improved else self.stale + 1
        facts = {"step": step, "seed": self.run.settings.seed, "validation": scores, "size": self.run.recipe.model.size}
        whole = Checkpoint(self.model, self.text, self.labels, self.run.recipe.generation, facts)
        # Until something was validated, the newest is the best that is known.
        if improved or not math.isfinite(self.best):
            checkpoints.save(whole, self.folder / "best")
        checkpoints.save(whole, self.folder / "last")
        state: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"{index}.{name}": torch.as_tensor(value).cpu().contiguous() for name, value in values.items()}
        resume = {"step": step, "best": self.best if math.isfinite(self.best) else None, "stale": self.stale}
        aside = self.run.folder / ".training_state.tmp"
        save_file(state, aside, metadata={"resume": json.dumps(resume)})
        aside.replace(self.run.folder / "training_state.safetensors")

    def resume(self) -> int:
        """Take up weights, optimizer and random state; returns the step to go on from."""
        from safetensors import safe_open

        path = self.run.folder / "training_state.safetensors"
        if not path.exists():
            return 0
        with safe_open(path, "pt") as file:
            resume = json.loads(file.metadata()["resume"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        loaded = checkpoints.load(self.folder / "last")
        if loaded.training["step"] != resume["step"]:
            raise PlaitError(f"{self.folder / 'last'} and {path} are of different steps. Delete {self.run.folder}.")
        self.model.load_state_dict(loaded.model.state_dict())
        torch.set_rng_state(tensors.pop("rng"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.best, self.stale = math.inf if resume["best"] is None else resume["best"], resume["stale"]
        return int(resume["step"])


class _Log:
    """`log.jsonl`, one object a line, and TensorBoard events where tensorboard is installed."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, split: str, losses: dict[str, float], rate: float = 0.0, lr: float = 0.0) -> None:
        row: dict[str, Any] = {"step": step, "split": split, "time": time.time()}
        row |= {f"loss/{name}": round(value, 5) for name, value in losses.items()}
        if rate:
            row |= {"tokens_per_second": round(rate), "learning_rate": lr}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "split", "time"):
                    self.board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def describe(folder: Path) -> str:
    """What a run decided and how large its model is, for people."""
    facts = read_json(folder / "run.json")
    config = read_json(folder / "checkpoints" / "best" / "config.json")
    backbone, shown = config["backbone"], facts["decided"]
    parts = ", ".join(f"{name} {count:,}" for name, count in shown["parameters"].items())
    notes = "".join(f"\nNote: {note}." for note in facts.get("notes", []))
    stopped = f", stopped early at {facts['stopped_early']}" if "stopped_early" in facts else ""
    return (
        f"Size {facts['size']}: width {backbone['width']}, {backbone['layers']} layers; {parts} parameters.\n"
        f"{facts.get('revised', facts)['steps']} steps of {shown['batch_size']} records{stopped}; "
        f"learning rate {shown['learning_rate']:g}; "
        f"seed {facts['seed']}; on {facts['device']} with {facts['threads']} threads. "
        f"Best checkpoint: step {config['training']['step']} in {folder / 'checkpoints' / 'best'}{notes}"
    )
