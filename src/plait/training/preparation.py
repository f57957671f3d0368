"""What stands before the first step of a run: its data, its model, its codecs, and what it decided about them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from plait.core.device import threads
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.system import available_memory
from plait.core.system import processors as available_processors
from plait.data.dataset import ConcatDataset, Dataset
from plait.kernels import training as training_kernels
from plait.modalities.hf_encoder import HFEncoder
from plait.modalities.text import Text
from plait.model import extend
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Multimodal
from plait.training.build import label_columns
from plait.training.canaries import plant
from plait.training.init_from import apply_freezing, build_or_load_model
from plait.training.kept_replies import BaseReplies
from plait.training.projection import begin_projections
from plait.training.run import Progress, Run
from plait.training.source import SOURCES, RecordSource, Source
from plait.training.split import BlockSettings, Split, room_needed

KEPT_SHARE = 1 / 5  # of the free memory, for what frozen encoders keep of what they have read
CAPPED_SHARE = 2 / 3  # of a cap, which steps that were asked for have at least
CLASSIFIER_SHARE = 0.08  # of the time of a run that recognises: what fitting its classifiers takes after training


@dataclass
class Prepared:
    """A run ready for its first step."""

    model: Multimodal  # on the run's device
    text: Text  # the tokenizer
    source: Source  # of the data
    splits: dict[str, Split]  # "train" and "val"
    init_from: Checkpoint | None  # the model that this one was extended from
    seconds: float  # that are left of the time budget, or of the cap
    inherited: set[str]  # tensors of a base that stay as they are, and no checkpoint holds

    def close(self) -> None:
        """Tokenise no more."""
        if (blocks := self.splits["train"].blocks) is not None:
            blocks.close()


def join_replayed(dataset: Dataset, paths: list[str]) -> tuple[Dataset, list[Dataset]]:
    """A dataset with those that are replayed beside it, as one, and all of them apart.

    Raises PlaitError where one of them holds data of a kind of its own.
    """
    datasets = [dataset, *(Dataset.open(path) for path in paths)]
    if len(datasets) == 1:
        return dataset, datasets
    if alone := next((one for one in datasets if one.manifest.kind != "records"), None):
        raise PlaitError(
            f"{alone.path} holds data of a kind of its own ({alone.manifest.kind}), which are learnt alone: "
            "leave out training.replay."
        )
    return ConcatDataset(datasets), datasets


def prepare_run(run: Run, reuse: Path | None) -> Prepared:
    """Make the model and its data, train its codecs, and record what was decided.

    Raises PlaitError for too few records, a context that is too short, or parts that cannot be frozen.
    """
    group, dataset = run.group, run.dataset
    begun = time.perf_counter()
    torch.manual_seed(run.settings.seed)
    with group.main_first():
        source = _open_source(run)
    model, text, init_from = build_or_load_model(run, source.settings)
    source.fill(model)
    splits: dict[str, Split] = {}
    for name in ("train", "val"):
        with group.main_first():
            splits[name] = source.split(name, text, model)
    if len(splits["train"]) < 2:
        count = len(splits["train"])
        raise PlaitError(
            f"{dataset.path} has {count} record{'s' * (count != 1)} to train on; at least 2 are needed. Add more: a "
            "line of a text file, a row of a table or a media file is a record."
        )
    if run.settings.canaries:
        labels = label_columns(dataset, model.config.backbone.max_length)
        run.record(canaries=plant(splits["train"], run.settings.canaries, run.settings.seed, text, labels))
    _check_context(run, model, splits["train"])
    _report_sizes(run, model, splits["train"])
    with group.main_first(), _all_threads(group.size):
        run.codecs(model, splits)
        run.recognisers(model, splits)
    apply_freezing(run, model)
    model.to(run.device.torch)
    _keep_states(model, run.device.kind)
    _begin_projections(run, model, splits["train"], init_from)
    inherited = extend.inherited(model, init_from.model) if init_from is not None and init_from.base else set()
    if "prepared" not in run.metadata:
        earlier = read_json(reuse / "run.json")["prepared"] if reuse and not run.part else 0.0
        keeps = run.settings.lora is not None and run.settings.lora.keep > 0 and not run.part
        asked = BaseReplies.read(run.folder) if keeps else None
        spent = time.perf_counter() - begun + (asked.seconds if asked is not None else 0.0)
        run.record(prepared=group.broadcast(max(spent, earlier)))
    share = 1 - CLASSIFIER_SHARE if run.settings.task == "recognise" else 1.0
    minutes = run.budget.max_minutes or run.minutes
    budget_seconds = minutes * 60 * share
    # Steps that are capped have most of the cap, however long a busy machine took to get here: a few of them are none.
    least = 1.0 if run.budget.steps is None else budget_seconds * CAPPED_SHARE
    seconds = max(budget_seconds - run.metadata["prepared"], least)
    return Prepared(model, text, source, splits, init_from, seconds, inherited)


def _keep_states(model: Multimodal, kind: str) -> None:
    """Have frozen pretrained encoders keep what they give for samples that come again as they were."""
    limit = int(KEPT_SHARE * available_memory())
    for modality in model.media.values():
        for part in modality.encoder.modules():
            if isinstance(part, HFEncoder) and part.frozen and kind == "cpu" and not modality.augments:
                part.keep_states(limit)


def _begin_projections(run: Run, model: Multimodal, split: Split, init_from: Checkpoint | None) -> None:
    """Let a language model that is given its first encoder of images see from the start; a run that goes on has it."""
    if init_from is None or init_from.model.media or (run.folder / "checkpoints" / "last").exists():
        return

    def progress(done: int, total: int) -> None:
        run.report(Progress("images as words", done, total))

    for line in begin_projections(model, split, progress):
        run.report(Progress("note", 1, 1, note=line))


@contextmanager
def _all_threads(processes: int) -> Iterator[None]:
    """What the first process does while the others wait, it does with the threads of all: so what is trained then does
    not depend on how many processes there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before * processes, available_processors()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open_source(run: Run) -> Source:
    """The data of a run, of whatever kind."""
    cache = run.source / "cache"
    if run.dataset.manifest.kind != "records":
        return SOURCES.by_feature()[run.dataset.manifest.kind](run.dataset, run.recipe, cache, run.device)

    def progress(stage: str, done: int, total: int) -> None:
        run.report(Progress(stage, done, total))

    def note(text: str) -> None:
        run.report(Progress("note", 1, 1, note=text))

    blocks = BlockSettings(run.settings.block_megabytes << 20, run.group.is_main, threads(), note)
    return RecordSource(run.dataset, cache, progress, None if run.settings.canaries else blocks)


def _check_context(run: Run, model: Multimodal, train: Split) -> None:
    """Raise PlaitError where media do not fit the model's context."""
    context, needed = model.config.backbone.max_length, room_needed(train, run.dataset.columns, model.media)
    if needed > context:
        raise PlaitError(
            f"The model's context of {context} tokens is too short for the media, which need "
            f"{needed}. Raise model.backbone.context in the recipe, or take smaller images or shorter clips."
        )


def _report_sizes(run: Run, model: Multimodal, train: Split) -> None:
    """Record and tell what was cut of the data, and how large model and batch are."""
    notes = list(train.notes)
    if len(train) < run.batch_size:
        notes.append(f"train has {len(train)} records, fewer than a batch of {run.batch_size} holds")
    if notes:
        run.record(notes=notes)
        run.report(Progress("note", 1, 1, note="; ".join(notes)))
    parameters = model.parameter_count()
    run.record(decided={"parameters": parameters, "batch_size": run.batch_size, "learning_rate": run.peak})
    note = f"{sum(parameters.values()):,} parameters, batch {run.batch_size}, learning rate {run.peak:g}; "
    note += f"blocks: {training_kernels.backend_name(run.device, model.config.backbone)}"
    run.report(Progress("size " + run.recipe.model.size, 1, 1, note=note))
