"""From a dataset to a run: tokenizer, codecs, then the model, with validation, checkpoints and a log.

A run folder holds `run.json` (what was decided, once), `log.jsonl`, `codecs/`, `checkpoints/step-*` with the links
`best` and `last`, and `cache/`. The same command on the same folder goes on where the run stopped.
"""

from __future__ import annotations

import errno
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.core.config import Recipe
from plait.core.device import choose_device, compiler, keep_memory, threads
from plait.core.errors import DivergedError, PlaitError, Terminated
from plait.core.files import only_writer, read_json
from plait.core.rng import uniform
from plait.core.signals import Signals, signals
from plait.data.dataset import Dataset, Joined
from plait.kernels import training as native
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.training.batches import PASS, BatchPrefetcher, Sampler, Split, room_needed
from plait.training.build import label_columns
from plait.training.callbacks import Callback, Callbacks, EndEvent, StartEvent, StepEvent, ValidationEvent
from plait.training.canaries import plant
from plait.training.checkpointing import Position, Saver, restore
from plait.training.distributed import Group, Network
from plait.training.init_from import apply_freezing, build_or_load_model, generation_of, labels_of
from plait.training.log import Log
from plait.training.losses import LossModule, step_losses, weighted
from plait.training.optimizer import Average, learning_rate_at, make_optimizer
from plait.training.run import Progress, Report, Run, difference
from plait.training.source import SOURCES, RecordSource, Source

FULL_SOFTMAX, DROPOUT = 17, 18  # keys of `uniform`: for steps with the whole softmax, and for what a step hides
DECIDING = 0.08  # share of the time that the classifier of labels takes once the model is trained
CALIBRATION = 8  # steps that a time budget is measured by
COMPILED = 600  # seconds of training from which compiling pays
FEW = 10_000  # samples below which what is written is augmented too


def train(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    report: Report,
    device_name: str = "auto",
    reuse: Path | None = None,
    allow_changes: bool = False,
    group: Group | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train a model on a dataset into `folder`; returns its best checkpoint. Ctrl-C and SIGTERM leave a usable run.

    `reuse` names a run of the same data that is past its preparation: its tokenizer, codecs and cache serve again,
    and the time that they took counts as this run's. Each process of a `group` calls this; the first one of them
    prepares and writes, and calls the `callbacks`.
    Raises PlaitError for what the user can mend: no records, a folder of another run (unless `allow_changes`), a
    folder that is not writable, a loss that explodes; KeyboardInterrupt or Terminated once the run was saved.
    """
    group = group or Group()
    device = group.device(choose_device(device_name, recipe.training.precision, training=True))
    torch.set_num_threads(threads())
    keep_memory()
    with only_writer(folder) if group.is_main else nullcontext(), signals() as listening, _room(folder):
        datasets = [dataset, *(Dataset.open(path) for path in recipe.training.replay)]
        if len(datasets) > 1:
            if alone := next((one for one in datasets if one.manifest.kind != "records"), None):
                raise PlaitError(
                    f"{alone.path} holds data of a kind of its own ({alone.manifest.kind}), which are learnt alone: "
                    "leave out training.replay."
                )
            dataset = Joined(datasets)
        run = Run(folder, dataset, recipe, report, device, reuse, group)
        report = run.report
        best = folder / "checkpoints" / "best"
        with group.main_first():
            finished = run.open(allow_changes)
            if group.is_main and not finished:
                for one in datasets:
                    Dataset.open(one.path, verify=True)
        run.changed = bool(group.broadcast(run.changed))
        if finished:
            report(Progress("finished", 1, 1, note=f"{folder} is already trained; delete it to train again"))
            return best
        begun = time.perf_counter()
        torch.manual_seed(recipe.training.seed)
        with group.main_first():
            data = _open_source(run)
        model, text, source = build_or_load_model(run, data.settings)
        data.fill(model)
        config = model.config
        splits: dict[str, Split] = {}
        for name in ("train", "val"):
            with group.main_first():
                splits[name] = data.split(name, text, model)
        if len(splits["train"]) < 2:
            raise PlaitError(f"{dataset.path} has {len(splits['train'])} records to train on; at least 2 are needed.")
        canaries = recipe.training.canaries
        if canaries:
            labels = label_columns(dataset, config.backbone.max_length)
            run.record(canaries=plant(splits["train"], canaries, recipe.training.seed, text, labels))
        needed = room_needed(splits["train"], dataset.columns, model.media)
        if needed > config.backbone.max_length:
            raise PlaitError(
                f"The model's context of {config.backbone.max_length} tokens is too short for the media, which need "
                f"{needed}. Raise model.backbone.context in the recipe, or take smaller images or shorter clips."
            )
        notes = list(splits["train"].notes)
        if len(splits["train"]) < run.batch_size:
            notes.append(f"train has {len(splits['train'])} records, fewer than a batch of {run.batch_size} holds")
        if notes:
            run.record(notes=notes)
            report(Progress("note", 1, 1, note="; ".join(notes)))
        parameters = model.parameter_count()
        run.record(decided={"parameters": parameters, "batch_size": run.batch_size, "learning_rate": run.peak})
        note = f"{sum(parameters.values()):,} parameters, batch {run.batch_size}, learning rate {run.peak:g}; "
        note += f"blocks: {native.backend_name(device, config.backbone)}"
        report(Progress("size " + recipe.model.size, 1, 1, note=note))
        with group.main_first():
            run.codecs(model, splits)
            run.recognisers(model, splits)
        apply_freezing(run, model)
        model.to(device.torch)
        if "prepared" not in run.metadata:
            before = read_json(reuse / "run.json")["prepared"] if reuse else 0.0
            run.record(prepared=group.broadcast(max(time.perf_counter() - begun, before)))
        share = 1 - DECIDING if recipe.training.task == "recognise" else 1.0
        seconds = max(run.minutes * 60 * share - run.metadata["prepared"], 1.0)
        calls = Callbacks(callbacks if group.is_main else ())
        _optimise(run, model, text, source, splits, seconds, listening, data, calls)
        run.record(finished=time.time())
        return best


def _open_source(run: Run) -> Source:
    """The data of a run, of whatever kind."""
    cache = run.source / "cache"
    if run.dataset.manifest.kind != "records":
        return SOURCES.by_feature()[run.dataset.manifest.kind](run.dataset, run.recipe, cache, run.device)

    def progress(stage: str, done: int, total: int) -> None:
        run.report(Progress(stage, done, total))

    return RecordSource(run.dataset, cache, progress)


def _optimise(
    run: Run, model: Multimodal, text: Text, source: Checkpoint | None, splits: dict[str, Split], seconds: float,
    listening: Signals, data: Source, callbacks: Callback,
) -> None:  # fmt: skip
    """The steps of the model itself."""
    settings, group, folder = run.settings, run.group, run.folder
    model.backbone.set_activation_checkpointing(settings.activation_checkpointing)
    network = Network(LossModule(model, run.device), model.backbone, group, settings.parallel, run.device)
    context = model.config.backbone.max_length

    few = max((len(samples) for samples in splits["train"].media.values()), default=0) < FEW
    augment_targets = few if settings.augment_targets is None else settings.augment_targets

    def sampler(name: str, batch_size: int, augment: bool, drop: float) -> Sampler:
        return data.sampler(
            splits[name], model.vocabulary, model.media, batch_size, context, settings.seed, drop, augment,
            augment_targets, frozenset(model.config.read_only),
            math.inf if network.sharded else PASS, list(settings.replay.values()),
        )  # fmt: skip

    training = sampler("train", run.batch_size, settings.augment, settings.cond_dropout)
    # The same records and as many negatives whatever the batch size, so that runs can be compared.
    compared = data.validation_batch_size or run.size.batch_size
    validating: Sampler | None = sampler("val", compared, False, 0.0) if len(splits["val"]) else None
    if validating is not None and len(validating.items) < 2:
        validating = None
    cut = group.size * settings.grad_accum_steps
    if training.batch_size < cut:
        raise PlaitError(
            f"A batch of {training.batch_size} records cannot be cut into {cut} parts ({group.size} processes, "
            f"training.grad_accum_steps {settings.grad_accum_steps}). Take fewer, or a larger training.batch_size."
        )
    optimizer = make_optimizer([model], run.peak, settings.weight_decay, settings.betas, settings.encoder_lr_scale)

    mine = range(group.rank * settings.grad_accum_steps, (group.rank + 1) * settings.grad_accum_steps)
    ahead = BatchPrefetcher(lambda number: [training.step(number, part, cut) for part in mine])

    def one(number: int) -> tuple[dict[str, float], int]:
        restricted = bool(uniform(settings.seed, number, FULL_SOFTMAX) >= settings.full_softmax_prob)
        key = int(uniform(settings.seed, number, group.rank, DROPOUT) * 2**62)
        try:
            parts = ahead(number)
        except DivergedError as error:
            raise DivergedError(f"At step {number + 1}, {error} The last checkpoint is kept.") from None
        optimizer.zero_grad(set_to_none=True)
        losses, tokens = step_losses(
            network, parts, splits["train"], group, restricted, settings.weights, key, settings.label_smoothing
        )
        if not (
            math.isfinite(network.clip_grad_norm(settings.grad_clip))
            and math.isfinite(weighted(losses, settings.weights))
        ):
            raise DivergedError(_not_finite(network, training, number))
        optimizer.step()
        return losses, tokens

    together = group.size == 1  # whether all processes are at the end of the same step

    def check() -> None:
        """Obey a signal that any of the processes has received."""
        nonlocal together
        if group.any(listening.received is not None):
            listening.received, together = listening.received or signal.SIGTERM, True
            listening.check()

    model.train()
    saver = Saver(folder / "checkpoints", settings.keep, settings.keep_every, group)
    newest, wrong = saver.start()
    if newest is None:
        torch.manual_seed(settings.seed)  # the same whether codecs were trained just now or read
    else:
        for line in wrong:
            run.report(Progress("note", 1, 1, note=f"{line}; going on from {newest}"))
        _same_network(newest, model)
    if "compiled" not in run.metadata:
        run.record(compiled="steps" not in run.metadata and _compiles(run, model, seconds))
    if run.metadata["compiled"] and group.size == 1:
        model.backbone.compile_blocks()
    if "steps" not in run.metadata:
        run.record(
            steps=settings.steps or saver.step + int(group.broadcast(_calibrate(model, optimizer, one, seconds)))
        )
        optimizer = make_optimizer([model], run.peak, settings.weight_decay, settings.betas, settings.encoder_lr_scale)
    begun = time.perf_counter()
    average = Average(model, settings.ema) if settings.ema else None
    position = Position()
    if newest is not None:
        position = restore(newest, model, optimizer, average)
        saver.point(position.step, position.best_step)
        run.report(Progress("note", 1, 1, note=f"going on from step {position.step}"))
        if run.changed:
            position.first = None  # losses may be weighted differently now
    start = position.step
    labels = labels_of(source, run.dataset, label_columns(run.dataset, context))
    generation = generation_of(source, run.recipe.generation)
    origin = {"init_from": run.recipe.model.init_from} if source else {}
    callbacks.on_start(
        StartEvent(
            folder=folder,
            step=start,
            total_steps=run.steps_from(start),
            recipe=run.recipe.model_dump(mode="json"),
            parameters=run.metadata["decided"]["parameters"],
        )
    )
    log = Log(folder, start, position.validated, settings.log_records, writes=group.is_main)

    def save(scores: dict[str, float]) -> None:
        facts = {"step": position.step, "seed": settings.seed, "validation": scores, "size": run.recipe.model.size}
        if "canaries" in run.metadata:
            facts["canaries"] = run.metadata["canaries"]
        log.sync()
        whole = Checkpoint(model, text, labels, generation, {**facts, **origin}, dict(data.parts))
        saver.save(whole, optimizer, average, position)

    def measure() -> tuple[dict[str, float], float | None]:
        """Validate what is used, and beside an average the raw weights, for the report; the losses, and the number
        that is least for the best: the objective, or minus the score that the data are judged by."""
        if validating is None:
            return {}, None
        if average is not None:
            log.write(position.step, "val_raw", validate(network, validating, splits["val"], group, check))
        with average.used() if average else nullcontext():
            scores = validate(network, validating, splits["val"], group, check)
            judged = weighted(scores, settings.weights)
            shown = scores
            if (score := data.score(model, run.device, validating)) is not None:
                judged = -score.value
                shown = {**scores, score.name: score.value}
                log.write(position.step, "val_score", {score.name: score.value})
        log.write(position.step, "val", scores)
        run.report(Progress("validation", position.step, run.steps_from(position.step), shown))
        return scores, judged

    whole, done = True, False  # no step is half done
    clock, ahead.waited = time.perf_counter(), 0.0
    try:
        with listening.held():
            while True:
                number = position.step
                steps = run.steps_from(number)
                scores: dict[str, float] = {}
                every, paused = max(steps // settings.validations, 1), time.perf_counter()
                if number and position.validated < number and (number % every == 0 or number >= steps):
                    scores, judged = measure()
                    improved = position.judge(None if judged is None else group.broadcast(judged))
                    callbacks.on_validation(ValidationEvent(number, scores, improved))
                    due = improved or settings.save_every is None
                else:
                    due = False
                ends = number >= steps or position.stale >= settings.patience
                if number > saver.step and (due or ends or (settings.save_every and number % settings.save_every == 0)):
                    save(scores)
                if ends:
                    break
                saver.check()
                check()
                clock += time.perf_counter() - paused  # what was measured and saved is no part of a step
                if settings.steps is None and start == 0 and number in (steps // 8, steps // 4, steps // 2) and number:
                    _revise(run, number, steps, seconds, group.broadcast(time.perf_counter() - begun))
                    steps = run.steps_from(number)
                for options in optimizer.param_groups:
                    options["lr"] = learning_rate_at(number, steps, run.peak, settings.warmup) * options["share"]
                whole = False
                losses, seen = one(number)
                if average is not None:
                    average.update(number)
                position.step += 1
                position.tokens += seen
                for name, value in losses.items():
                    position.recent.setdefault(name, []).append(value)
                records = training.members(number)[1][:, 0].tolist()
                loss = weighted(losses, settings.weights)
                log.write_records(position.step, loss, [splits["train"].ids[r] for r in records])
                whole = True
                learning_rate = optimizer.param_groups[0]["lr"]
                callbacks.on_step(StepEvent(position.step, steps, loss, losses, learning_rate))
                if position.step % 10 == 0 or position.step == steps:
                    now = time.perf_counter()
                    rate = position.tokens / (now - clock)
                    means = {name: float(np.mean(values)) for name, values in position.recent.items()}
                    log.write(position.step, "train", means, rate, learning_rate, ahead.waited / (now - clock))
                    _stable(position, weighted(means, settings.weights), records, splits["train"])
                    position.recent, position.tokens, clock, ahead.waited = {}, 0, now, 0.0
                    run.report(Progress("model", position.step, steps, means, rate))
        saver.wait()
        done = True
    except (KeyboardInterrupt, Terminated):
        if together:
            with listening.held():
                if whole and position.step > saver.step:
                    save({})
                saver.wait()
                group.barrier()  # a process that ends makes torchrun end the others
        raise
    except BaseException:
        saver.join()
        raise
    finally:
        ahead.close()
        log.close()
        callbacks.on_end(EndEvent(position.step, done, folder))
    if position.step < steps:
        run.record(stopped_early=position.step)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """A full disk is the user's to mend, wherever it shows."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PlaitError(
            f"Cannot write {error.filename or folder}: {error.strerror}. Free space; the same command goes on."
        ) from error


def _same_network(folder: Path, model: Multimodal) -> None:
    """Raise PlaitError where a checkpoint is of another network than the run's recipe and data make."""
    config = read_json(folder / "config.json")
    mine = model.config.model_dump(mode="json")
    settings = mine.pop("modalities")
    theirs = ModelConfig.model_validate({name: config.get(name) for name in mine}).model_dump(mode="json")
    del theirs["modalities"]
    for one in (mine, theirs):
        one["backbone"] = {name: value for name, value in one["backbone"].items() if name != "dropout"}
    different = difference(theirs, mine) + difference(read_json(folder / "preprocessor_config.json"), settings)
    if different:
        raise PlaitError(f"{folder} is of another network{different}. Choose another folder with -o.")


def _not_finite(network: Network, sampler: Sampler, number: int) -> str:
    """What to tell of a step whose loss or gradient is not finite: which of its records are to blame. Every process
    looks at all of them."""
    epochs, items = sampler.members(number)
    network.loss_module.eval()
    bad = []
    for epoch, item in zip(epochs, items, strict=True):
        losses, _ = step_losses(network, [sampler.build(epoch[None], item[None])], sampler.split, Group())
        if not all(math.isfinite(loss) for loss in losses.values()):
            bad.append(int(item[0]))
    alone = 0 < len(bad) < len(items)
    names = _names(sampler.split, bad if alone else [int(record) for record in items[:, 0]])
    blame = f"because of record {names}" if alone else f"with records {names}"
    remedy = "look at what it holds" if alone else "lower training.learning_rate, or look at these records"
    return f"The loss is not finite at step {number + 1} {blame}. The last checkpoint is kept; {remedy}."


def _names(split: Split, records: list[int]) -> str:
    ids = [split.ids[record] for record in dict.fromkeys(records)]
    return ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")


def _stable(position: Position, loss: float, records: list[int], split: Split) -> None:
    """Raise DivergedError where the mean loss of ten steps is far above that of the first ten."""
    if position.first is None:
        position.first = loss
    if loss > 2 * position.first + 2:
        raise DivergedError(
            f"The loss exploded: {loss:.3g} at step {position.step}, {position.first:.3g} at the start (records "
            f"{_names(split, records)}). The checkpoints are kept; lower training.learning_rate."
        )


def _revise(run: Run, number: int, planned: int, seconds: float, used: float) -> None:
    """Plan anew where the steps so far show that the machine is slower or faster than it was measured: what else ran
    beside may have begun or ended."""
    possible = max(number + int(max(seconds - used, 0) / (used / number)), number + 1)
    if not 0.9 * planned < possible < 1.1 * planned:
        run.record(revisions=[*run.metadata.get("revisions", []), {"at": number, "steps": possible}])


def _compiles(run: Run, model: Multimodal, seconds: float) -> bool:
    """Whether to compile the backbone. Media vary in length, which costs compiled code its exact resuming."""
    wish, possible = run.settings.compile, run.device.name.startswith("cuda") or compiler() is not None
    fast = native.beats_compile(run.device, model.config.backbone)
    if wish == "on" and not (possible and run.group.size == 1):
        raise PlaitError("training.compile: on needs a C++ compiler (g++ or clang++), and works in a single process.")
    worth = not model.media and run.settings.steps is None and seconds >= COMPILED and not fast
    return wish == "on" or (wish == "auto" and possible and run.group.size == 1 and worth)


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
    begun = time.perf_counter()
    one(0)
    clock = [time.perf_counter()]
    for number in range(CALIBRATION):
        one(number)
        clock.append(time.perf_counter())
    model.load_state_dict(weights)
    torch.set_rng_state(state)
    left = seconds - (clock[-1] - begun)  # compiling may have taken long
    return max(int(left * 0.93 / np.median(np.diff(clock))), 20)  # validation takes the rest


def validate(
    network: Network, sampler: Sampler, split: Split, group: Group, check: Callable[[], None], steps: int = 8
) -> dict[str, float]:
    """Mean losses over the first records of the validation split, the same at each call and on every process; `check`
    may end it."""
    network.loss_module.eval()
    sums: dict[str, list[float]] = {}
    try:
        for number in range(min(steps, sampler.steps_per_epoch)):
            check()
            losses, _ = step_losses(network, [sampler.step(number, group.rank, group.size)], split, group)
            for name, value in losses.items():
                sums.setdefault(name, []).append(value)
    finally:
        network.loss_module.train()
    return {name: float(np.mean(values)) for name, values in sums.items()}
