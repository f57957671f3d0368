"""Training: from a dataset to a run, and the loop itself.

`train` prepares a run and hands it to a `Trainer`, whose `fit` is the whole loop: validate, save, step, log. A run
folder holds `run.json` (what was decided, once), `log.jsonl`, `codecs/`, `checkpoints/step-*` with the links `best` and
`last`, and `cache/`. The same command on the same folder goes on where the run stopped, bit for bit.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.core.config import GenerationConfig, Recipe
from plait.core.device import choose_device, keep_memory, matmul_precision, release_memory, threads
from plait.core.errors import DivergedError, PlaitError, Terminated
from plait.core.files import explained_when_full, only_writer
from plait.core.objective import weighted_sum
from plait.core.rng import uniform
from plait.core.signals import Signals, signals
from plait.data.blocks import POLL
from plait.data.dataset import Dataset
from plait.model.checkpoint import Checkpoint
from plait.training.batches import PASS, BatchPrefetcher, Sampler
from plait.training.budget import (
    VALIDATION_SHARE,
    calibrate,
    compiles,
    is_timed,
    revise,
    tell_cap,
    tokens_at_a_time,
    within,
)
from plait.training.build import label_columns
from plait.training.callbacks import Callback, Callbacks, EndEvent, StartEvent, StepEvent, ValidationEvent
from plait.training.checkpointing import Position, Saver, check_same_network, restore
from plait.training.distributed import Group, Network
from plait.training.divergence import check_stable, not_finite
from plait.training.init_from import generation_of, labels_of
from plait.training.kept_replies import KeptReplies
from plait.training.log import Log
from plait.training.losses import LossModule, step_losses
from plait.training.optimizer import AdamW, WeightAverage, make_optimizer
from plait.training.parts import Budget
from plait.training.preparation import Prepared, join_replayed, prepare_run
from plait.training.run import Progress, Report, Run
from plait.training.schedule import learning_rate_at, restart_scale
from plait.training.streams import Streams, can_be_cut, media_work

FULL_SOFTMAX, DROPOUT = 17, 18  # keys of `uniform`: for steps with the whole softmax, and for what a step hides
LOG_EVERY = 10  # steps
VALIDATION_STEPS = 8
FORWARD_SHARE = 0.4  # of a step, that its forward pass takes
SAVE_SECONDS = 120  # between two saves of a run in a time budget where nothing better was found
FEW_SAMPLES = 10_000  # of a medium, below which what is written is augmented too


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
    more: Budget | None = None,
) -> Path:
    """Train a model on a dataset. Ctrl-C and SIGTERM leave a usable run.

    Args:
        dataset: A prepared dataset.
        folder: The run's folder; a run that it holds goes on.
        recipe: Data, model and training settings.
        report: Called with what happens.
        device_name: auto, cpu, cuda or mps.
        reuse: A run of the same data that is past its preparation: its tokenizer, codecs and cache serve again, and the
            time that they took counts as this run's.
        allow_changes: Whether to go on with a run whose recipe or data are others now.
        group: The processes that train together, each of which calls this; the first one prepares and writes.
        callbacks: Called by the first process at the start, after steps and validations, and at the end.
        more: What a run that is finished is trained for beside what it had, by a schedule of its own.

    Returns:
        The folder of the best checkpoint.

    Raises:
        PlaitError: For what the user can mend: no records, a folder of another run, one that is not writable.
        DivergedError: A loss that explodes or is not finite.
        KeyboardInterrupt, Terminated: After a signal, once the run was saved.
    """
    group = group or Group()
    device = group.device(choose_device(device_name, recipe.training.precision, training=True))
    torch.set_num_threads(threads())
    keep_memory()
    with (
        only_writer(folder) if group.is_main else nullcontext(),
        signals() as received,
        explained_when_full(folder),
        matmul_precision(device),
    ):
        joined, datasets = join_replayed(dataset, list(recipe.training.replay))
        run = Run(folder, joined, recipe, report, device, reuse, group)
        with group.main_first():
            finished = run.open(allow_changes, more)
            if group.is_main and not finished:
                for one in datasets:
                    Dataset.open(one.path, verify=True)
        run.changed = bool(group.broadcast(run.changed))
        if finished:
            run.report(
                Progress(
                    "finished",
                    1,
                    1,
                    note=f"{folder} is already trained. To train it for longer: plait train {folder} --more MINUTES",
                )
            )
        else:
            prepared = prepare_run(run, reuse)
            release_memory()  # what counting words and tokenising took
            try:
                Trainer(run, prepared, received, Callbacks(callbacks if group.is_main else ())).fit()
            finally:
                prepared.close()
            run.record(finished=time.time())
        return folder / "checkpoints" / "best"


@dataclass
class Validation:
    """What a validation found."""

    losses: dict[str, float]  # objective -> mean loss; empty where there is nothing to validate on
    improved: bool


class Trainer:
    """Trains the model of a run, from its newest checkpoint if it has one.

    `setup` makes everything that a step needs; `fit` is the loop. A step is a function of its number: which records it
    takes, how they are augmented and what is dropped. All that changes from step to step is in the weights, the
    optimizer and `position`, which checkpoints hold.
    """

    def __init__(self, run: Run, prepared: Prepared, received: Signals, callbacks: Callback) -> None:
        self.run, self.settings, self.group = run, run.settings, run.group
        self.model, self.data, self.splits = prepared.model, prepared.source, prepared.splits
        self.prepared, self.received, self.callbacks = prepared, received, callbacks
        self.setup()

    # --- setup ------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Make network, samplers, optimizer and checkpoints, and go on from the newest checkpoint."""
        self._setup_network()
        self._setup_batches()
        self.kept_replies, self.divergence = KeptReplies.of_run(self.run, self.model), 0.0
        self.optimizer = self._make_optimizer()
        self.saver = Saver(self.run.folder / "checkpoints", self.settings.keep, self.settings.keep_every, self.group)
        self.saver.inherited = self.prepared.inherited
        newest = self._newest_checkpoint()
        self._setup_schedule()
        self.average = WeightAverage(self.model, self.settings.ema) if self.settings.ema else None
        self.position = Position()
        self.started = self.saved = time.perf_counter()
        if newest is not None:
            self._resume(newest)
        self.first_step = self.position.step
        columns = label_columns(self.run.dataset, self.model.config.backbone.max_length)
        self.labels = labels_of(self.prepared.init_from, self.run.dataset, columns)
        self.signal_together = self.group.size == 1  # whether all processes are at the end of the same step
        self.mid_step = False  # whether a step has begun and not ended: its weights are no checkpoint
        self.done = False

    def _setup_network(self) -> None:
        """Share the network between the processes; decide once whether its blocks are compiled."""
        self.model.backbone.set_activation_checkpointing(self.settings.activation_checkpointing)
        self.network = Network(
            LossModule(self.model, self.run.device),
            self.model.backbone,
            self.group,
            self.settings.parallel,
            self.run.device,
        )
        self.model.train()
        if "compiled" not in self.run.metadata:
            undecided = "steps" not in self.run.metadata
            self.run.record(compiled=undecided and compiles(self.run, self.model, self.prepared.seconds))
        if self.run.metadata["compiled"] and self.group.size == 1:
            self.model.backbone.compile_blocks()

    def _setup_batches(self) -> None:
        """Samplers of both splits, and the thread that makes batches ahead. Raises PlaitError where a batch has fewer
        records than parts."""
        self.train_sampler = self._make_sampler("train", self.run.batch_size, training=True)
        # The same records and as many negatives whatever the batch size, so that runs can be compared.
        batch_size = self.data.validation_batch_size or self.run.size.batch_size
        self.val_sampler: Sampler | None = None
        if len(self.splits["val"]):
            sampler = self._make_sampler("val", batch_size, training=False)
            self.val_sampler = sampler if len(sampler.items) > 1 else None
        micro_batches = self.settings.grad_accum_steps
        parts = self.group.size * micro_batches
        if self.train_sampler.batch_size < parts:
            raise PlaitError(
                f"A batch of {self.train_sampler.batch_size} records cannot be cut into {parts} parts "
                f"({self.group.size} processes, training.grad_accum_steps {micro_batches}). Take fewer, or a larger "
                "training.batch_size."
            )
        own = range(self.group.rank * micro_batches, (self.group.rank + 1) * micro_batches)
        self.streams = self._make_streams()
        self.max_tokens = None if self.network.sharded else tokens_at_a_time(self.run, self.model)
        for one in filter(None, (self.train_sampler, self.val_sampler)):
            one.max_tokens = self.max_tokens
        self.batches = BatchPrefetcher(
            lambda step: [
                one for part in own for one in self.train_sampler.step(step, part, parts).passes(self.max_tokens)
            ]
        )

    def _make_streams(self) -> Streams:
        """Two threads where a processor has as many for this run and halves of a step give what the whole gives; then
        samplers cut steps in two. A run that goes on does as it began."""
        run, settings = self.run, self.settings
        if "streams" not in run.metadata:
            one_pass = self.group.size > 1 or settings.activation_checkpointing or run.metadata["compiled"]
            possible = torch.get_num_threads() > 1 and not one_pass and can_be_cut(self.model, run.device)
            run.record(streams=2 if possible else 1)
        streams = run.metadata["streams"] if self.group.size == 1 else 1
        if streams > 1:
            for sampler in filter(None, (self.train_sampler, self.val_sampler)):
                sampler.media_work = media_work(self.model)
        return Streams(streams)

    def _make_sampler(self, split: str, batch_size: int, training: bool) -> Sampler:
        settings = self.settings
        samples = max((len(media) for media in self.splits["train"].media.values()), default=0)
        augment_targets = samples < FEW_SAMPLES if settings.augment_targets is None else settings.augment_targets
        return self.data.sampler(
            self.splits[split],
            self.model.vocabulary,
            self.model.media,
            batch_size,
            self.model.config.backbone.max_length,
            settings.seed,
            cond_dropout=settings.cond_dropout if training else 0.0,
            augment=settings.augment and training,
            augment_targets=augment_targets,
            unwritten=frozenset(self.model.config.read_only),
            worth=math.inf if self.network.sharded else PASS,
            shares=list(settings.replay.values()),
            contrast=bool(self.model.config.embed_dim) and settings.weights.get("contrastive") != 0,
        )

    def _make_optimizer(self) -> AdamW:
        settings = self.settings
        return make_optimizer(
            [self.model], self.run.peak, settings.weight_decay, settings.betas, settings.encoder_lr_scale
        )

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; random numbers begin at the seed where there is none. Raises PlaitError where
        it is of another network."""
        newest, damaged = self.saver.start()
        if newest is None:
            torch.manual_seed(self.settings.seed)  # the same whether codecs were trained just now or read
            return None
        for line in damaged:
            self.run.report(Progress("note", 1, 1, note=f"{line}; going on from {newest}"))
        check_same_network(newest, self.model)
        return newest

    def _setup_schedule(self) -> None:
        """Decide once how many steps the run has: as many as were asked for, and as its time holds."""
        run, seconds = self.run, self.prepared.seconds
        if "steps" in run.metadata:
            return
        requested = run.budget.steps
        steps = None if requested is None else run.first_step + requested
        if is_timed(self.run.budget):
            begun = time.perf_counter()
            possible = calibrate(self.model, self.optimizer, self._optimize, seconds)
            possible = self.saver.step + int(self.group.broadcast(possible))
            self.optimizer = self._make_optimizer()  # without what the throw-away steps left in it
            steps = within(run, possible)
            tell_cap(run, steps, possible, seconds - (time.perf_counter() - begun))
            run.record(validations=self._affordable_validations(steps - run.first_step))
        run.record(steps=steps)

    def _affordable_validations(self, steps: int) -> int:
        """As many validations as the recipe asks for, but no more than their share of a time budget holds."""
        if self.val_sampler is None:
            return self.settings.validations
        batches = min(VALIDATION_STEPS, self.val_sampler.steps_per_epoch)
        each = batches * FORWARD_SHARE * self.val_sampler.batch_size / self.train_sampler.batch_size  # in steps
        return max(min(int(steps * VALIDATION_SHARE / each), self.settings.validations), 1)

    def _resume(self, checkpoint: Path) -> None:
        self.position = restore(checkpoint, self.model, self.optimizer, self.average, self.prepared.inherited)
        self.run.restore_recognisers(self.model)
        if self.run.part and self.position.step == self.run.first_step:
            self._begin_part()
        self.saver.point(self.position.step, self.position.best_step)
        self.run.report(Progress("note", 1, 1, note=f"going on from step {self.position.step}"))
        if self.run.changed:
            self.position.first = None  # losses may be weighted differently now

    def _begin_part(self) -> None:
        """A part has its own patience; and where an encoder is another one now, what was best was so with the old."""
        self.position.stale = 0
        encoders = self.run.metadata.get("recognisers", {}).values()
        if any(facts.get("part") == self.run.part and facts["kept"] for facts in encoders):
            self.position.best = None

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """All steps that are left. A signal ends it between two steps, once they were saved."""
        self._start_log()
        try:
            with self.received.held():
                while True:
                    paused = time.perf_counter()
                    validation = self.validate() if self._validation_is_due() else None
                    stops = self.should_stop()
                    if self._save_is_due(validation, stops):
                        self.save(validation.losses if validation else {})
                    if stops:
                        break
                    self.saver.check()
                    self._obey_signals()
                    self._await_texts()
                    self.clock += time.perf_counter() - paused  # validating and saving are no part of a step
                    self.train_step()
            self.saver.wait()
            self.done = True
        except (KeyboardInterrupt, Terminated):
            self._save_at_signal()
            raise
        except BaseException:
            self.saver.join()
            raise
        finally:
            self.prepared.close()  # batches may wait for texts
            self.batches.close()
            self.streams.close()
            self.log.close()
            self.callbacks.on_end(EndEvent(self.position.step, self.done, self.run.folder))
        if self.position.step < self.total_steps:
            self.run.record(stopped_early=self.position.step)

    @property
    def total_steps(self) -> int:
        """The length of the schedule as it stands now."""
        return self.run.steps_from(self.position.step)

    def should_stop(self) -> bool:
        """Whether all steps are done, or validations have not improved for too long."""
        return self.position.step >= self.total_steps or self.position.stale >= self.settings.patience

    def _await_texts(self) -> None:
        """Wait until the texts of the next step are tokenised. A signal ends it."""
        if self.splits["train"].blocks is None:
            return
        step, told = self.position.step, False
        while self.group.any(not self.train_sampler.is_ready(step)):
            if not told:
                self.run.report(Progress("note", 1, 1, note=f"step {step + 1} waits for its texts to be tokenised"))
                told = True
            self._obey_signals()
            time.sleep(POLL)

    def train_step(self) -> None:
        """One step: schedule, batch, losses, gradients, weights, average; then its log."""
        step = self.position.step
        if is_timed(self.run.budget) and self.first_step == self.run.first_step:
            revise(self.run, step, self.prepared.seconds, time.perf_counter() - self.started)
        first, last = self.run.first_step, self.total_steps
        peak = self.run.peak * restart_scale(first, last)
        learning_rate = learning_rate_at(step - first, last - first, peak, self.settings.warmup)
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate * options["lr_scale"]
        self.mid_step = True
        losses, tokens = self._optimize(step)
        if self.average is not None:
            self.average.update(step)
        self._log_step(losses, tokens, learning_rate)

    def _optimize(self, step: int) -> tuple[dict[str, float], int]:
        """Losses and gradients of a step's batch, and new weights. Returns objective -> loss, and the tokens of the
        batch. Raises DivergedError where one of them is not finite."""
        settings = self.settings
        restricted = bool(uniform(settings.seed, step, FULL_SOFTMAX) >= settings.full_softmax_prob)
        dropout_key = int(uniform(settings.seed, step, self.group.rank, DROPOUT) * 2**62)
        try:
            parts = self.batches(step)
        except DivergedError as error:
            raise DivergedError(f"At step {step + 1}, {error} The last checkpoint is kept.") from None
        self.optimizer.zero_grad(set_to_none=True)
        losses, tokens = step_losses(
            self.network,
            parts,
            self.splits["train"],
            self.group,
            restricted,
            settings.weights,
            dropout_key,
            settings.label_smoothing,
            self.streams,
        )
        if self.kept_replies is not None:
            self.divergence = self.kept_replies.backward(step)
        grad_norm = self.network.grad_norm()
        if not (math.isfinite(float(grad_norm)) and math.isfinite(weighted_sum(losses, settings.weights))):
            raise not_finite(self.network, self.train_sampler, step)
        self.optimizer.clip(grad_norm, settings.grad_clip)
        self.optimizer.step()
        return losses, tokens

    # --- validation -------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        first = self.run.first_step
        done, planned = self.position.step - first, self.total_steps - first
        every = max(planned // self.run.metadata.get("validations", self.settings.validations), 1)
        return done > 0 and self.position.step != self.position.validated and (done % every == 0 or done >= planned)

    def validate(self) -> Validation:
        """Losses on val of the weights that are used, and beside an average those of the raw ones, for the report. The
        best checkpoint is that of the least objective, or of the best score where the data have one."""
        if self.val_sampler is None:
            losses, objective = dict[str, float](), None
        else:
            losses, objective = self._measure(self.val_sampler)
            objective = self.group.broadcast(objective)
        improved = self.position.judge(objective)
        copied = None if self.network.sharded else self._copy
        self.callbacks.on_validation(ValidationEvent(self.position.step, losses, improved, copied))
        return Validation(losses, improved)

    def _generation(self) -> GenerationConfig:
        """Defaults of generation that are kept with the weights."""
        return generation_of(self.prepared.init_from, self.run.recipe.generation, self.splits["train"])

    def _copy(self) -> Checkpoint:
        """A copy of the model as it would be used now; training goes on beside it."""
        with self.average.used() if self.average else nullcontext():
            model = deepcopy(self.model)
        return Checkpoint(
            model=model.requires_grad_(False),
            text=self.prepared.text,
            labels=self.labels,
            generation=self._generation(),
            parts=dict(self.data.parts),
        )

    def _measure(self, sampler: Sampler) -> tuple[dict[str, float], float]:
        step = self.position.step
        if self.average is not None:
            self.log.write(step, "val_raw", self._validation_losses(sampler))
        with self.average.used() if self.average else nullcontext():
            losses = self._validation_losses(sampler)
            objective, shown = weighted_sum(losses, self.settings.weights), losses
            if (score := self.data.score(self.model, self.run.device, sampler)) is not None:
                objective, shown = -score.value, {**losses, score.name: score.value}
                self.log.write(step, "val_score", {score.name: score.value})
        self.log.write(step, "val", losses)
        self.run.report(Progress("validation", step, self.total_steps, shown, work="validation"))
        return losses, objective

    def _validation_losses(self, sampler: Sampler) -> dict[str, float]:
        """Mean losses over the first records of val, the same at each call and on every process. A signal ends it."""
        self.network.loss_module.eval()
        sums: dict[str, list[float]] = {}
        try:
            for number in range(min(VALIDATION_STEPS, sampler.steps_per_epoch)):
                self._obey_signals()
                parts = [sampler.step(number, self.group.rank, self.group.size)]
                losses, _ = step_losses(self.network, parts, self.splits["val"], self.group, streams=self.streams)
                for name, value in losses.items():
                    sums.setdefault(name, []).append(value)
        finally:
            self.network.loss_module.train()
        return {name: float(np.mean(values)) for name, values in sums.items()}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save_is_due(self, validation: Validation | None, stops: bool) -> bool:
        step, every = self.position.step, self.settings.save_every
        if step <= self.saver.step:
            return False
        # In a time budget a validation that found nothing better is saved after a while alone.
        saves = every is None and (self.run.budget.steps is not None or time.perf_counter() - self.saved > SAVE_SECONDS)
        validated = validation is not None and (validation.improved or saves)
        return validated or stops or bool(every and step % every == 0)

    def save(self, losses: dict[str, float]) -> None:
        """Hand a checkpoint of now, with the validation's losses, to the thread that writes."""
        run = self.run
        facts: dict[str, Any] = {
            "step": self.position.step,
            "seed": self.settings.seed,
            "validation": losses,
            "size": run.recipe.model.size,
        }
        if "canaries" in run.metadata:
            facts["canaries"] = run.metadata["canaries"]
        init_from = self.prepared.init_from
        if init_from is not None:
            facts["init_from"] = run.recipe.model.init_from
        checkpoint = Checkpoint(
            model=self.model,
            text=self.prepared.text,
            labels=self.labels,
            generation=self._generation(),
            training=facts,
            parts=dict(self.data.parts),
            base=init_from.base if init_from is not None else None,
        )
        self.log.sync()
        self.saved = time.perf_counter()
        self.saver.save(checkpoint, self.optimizer, self.average, self.position)

    # --- signals ----------------------------------------------------------------------------------------------------

    def _obey_signals(self) -> None:
        """Raise KeyboardInterrupt or Terminated where any of the processes has received a signal."""
        if self.group.any(self.received.received is not None):
            self.received.received = self.received.received or signal.SIGTERM
            self.signal_together = True
            self.received.check()

    def _save_at_signal(self) -> None:
        if not self.signal_together:
            return
        with self.received.held():
            if not self.mid_step and self.position.step > self.saver.step:
                self.save({})
            self.saver.wait()
            self.group.barrier()  # a process that ends makes torchrun end the others

    # --- log --------------------------------------------------------------------------------------------------------

    def _start_log(self) -> None:
        run, position = self.run, self.position
        self.callbacks.on_start(
            StartEvent(
                folder=run.folder,
                step=position.step,
                total_steps=self.total_steps,
                recipe=run.recipe.model_dump(mode="json"),
                parameters=run.metadata["decided"]["parameters"],
            )
        )
        records = self.settings.log_records
        self.log = Log(run.folder, position.step, position.validated, records, writes=self.group.is_main)
        self.clock, self.batches.waited = time.perf_counter(), 0.0

    def _log_step(self, losses: dict[str, float], tokens: int, learning_rate: float) -> None:
        """Move the position on, and write what the step did; means of `LOG_EVERY` steps. Raises DivergedError where the
        loss exploded."""
        position, split = self.position, self.splits["train"]
        records = self.train_sampler.members(position.step)[1][:, 0].tolist()
        steps = self.total_steps  # as they were for this step
        position.step += 1
        position.tokens += tokens
        for name, value in losses.items():
            position.recent.setdefault(name, []).append(value)
        loss = weighted_sum(losses, self.settings.weights)
        self.log.write_records(position.step, loss, [split.ids[record] for record in records])
        self.mid_step = False
        self.callbacks.on_step(StepEvent(position.step, steps, loss, losses, learning_rate))
        if position.step % LOG_EVERY and position.step != steps:
            return
        now = time.perf_counter()
        seconds, waited = now - self.clock, self.batches.waited
        means = {name: float(np.mean(values)) for name, values in position.recent.items()}
        self.log.write(position.step, "train", means, position.tokens / seconds, learning_rate, waited / seconds)
        if self.kept_replies is not None:
            self.log.write(position.step, "kept", {"divergence": self.divergence})
        check_stable(position, weighted_sum(means, self.settings.weights), records, split)
        self.run.report(Progress("model", position.step, steps, means, position.tokens / seconds, work="model"))
        position.recent, position.tokens, self.clock, self.batches.waited = {}, 0, now, 0.0
