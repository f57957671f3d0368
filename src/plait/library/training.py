"""`plait.train`: from data and settings to a trained run, by whichever way the start calls for."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.chat.general import ask_the_base
from plait.core.config import LoraRecipe, Recipe, as_recipe
from plait.core.errors import PlaitError
from plait.core.features import ExtensionPoint
from plait.core.files import read_json
from plait.core.objective import Objective
from plait.core.progress import ProgressBar
from plait.data.dataset import Dataset
from plait.library.datasets import is_prepared, open_or_prepare
from plait.library.model_cards import write_card
from plait.library.runs import Run
from plait.training.callbacks import Callback, TensorBoard
from plait.training.parts import Budget, ask_for_more, check_more
from plait.training.run import Progress

if TYPE_CHECKING:
    from plait.training.distributed import Group

# Lines about a run that has just ended its training; None where it is none of the feature's.
TRAINED: ExtensionPoint[Callable[[Path, Dataset, Recipe], list[str] | None]] = ExtensionPoint("trained")
STARTS = ("best", "scratch")


def train(
    dataset: Any,
    out: str | Path,
    *,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    task: str | None = None,
    group_by: str | None = None,
    size: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    init_from: str | None = None,
    start: str | None = None,
    models: Sequence[str | Path] = (),
    freeze: Sequence[str] | None = None,
    lora: bool = False,
    replay: Mapping[str, float] | None = None,
    seed: int | None = None,
    save_every: int | None = None,
    canaries: int | None = None,
    parallel: str | None = None,
    grad_accum_steps: int | None = None,
    allow_changes: bool = False,
    device: str = "auto",
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> Run:
    """Train a model, or go on with it where the folder holds a run that was stopped.

    Args:
        dataset: a Dataset, the folder or URL of one, or data as `plait.prepare` takes them, which are prepared into
            the run's folder first.
        out: the run's folder.
        recipe: a YAML file, a name of `plait recipes`, a dictionary or a Recipe; the arguments below are laid over it.
        task: one of `plait.core.config.known_tasks`; seen in the data where neither it nor a
            recipe is given. What a recipe leaves open follows from the task.
        group_by: of data that are prepared first, as in `plait.prepare`.
        size: tiny, small, base or large.
        minutes: a time budget that the schedule is fitted to.
        steps: steps to train for, instead of minutes.
        batch_size: records a step.
        learning_rate: peak of the schedule.
        init_from: a run, a checkpoint, or a Hugging Face name or folder to begin from; for images with captions also
            an encoder of images and one of texts, as "VISION,TEXT".
        start: "best" takes the best pretrained model on this machine that fits the data and the memory, "scratch" none;
            left out, `tell` says which there is. Nothing is downloaded.
        models: folders of models to look in, beside the Hugging Face cache.
        freeze: parts of it that stay as they are: encoder, backbone, token_embedding.
        lora: train low-rank updates of its backbone, and what is new.
        replay: further prepared datasets, and the share of each batch that comes from each.
        seed: of weights, order and augmentation.
        save_every: steps between checkpoints; at validations if left out.
        canaries: random texts to plant, so that it shows later which were learnt by heart.
        parallel: ddp or fsdp, where several processes train.
        grad_accum_steps: parts of a batch that are computed one after the other.
        allow_changes: go on with a run though its recipe or data changed.
        device: auto, cpu, cuda or mps.
        callbacks: what is called at the start, after steps and validations, and at the end; see
            `plait.training.callbacks`.
        progress: True for bars, or lines where there is no terminal; None for bars in terminals and notebooks alone;
            False for none.
        tell: called with what is to be known before and after: the task, the time each part gets, how well labels
            are recognised on val.

    A finished run that gets more minutes (or steps) than it had is trained for the difference, with a schedule of its
    own; see `Run.more`.

    Returns:
        The run; `.history`, `.best`, `.model()`, `.report`.

    Raises PlaitError for what the user can mend. KeyboardInterrupt is raised once the run was saved; the same call, or
    `Run.resume()`, goes on. Processes that torchrun started train one model together.
    """
    if minutes is not None and steps is not None:
        raise PlaitError("minutes and steps exclude each other: give one of them.")
    training = {
        "task": task, "minutes": minutes, "steps": steps, "seed": seed, "batch_size": batch_size,
        "learning_rate": learning_rate,
        "save_every": save_every, "parallel": parallel, "grad_accum_steps": grad_accum_steps, "canaries": canaries,
        "freeze": [freeze] if isinstance(freeze, str) else list(freeze) if freeze else None,
        "replay": dict(replay) if replay else None,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {
        "data": {"group_by": group_by}, "model": {"size": size, "init_from": init_from}, "training": training,
    }  # fmt: skip
    settings = as_recipe(recipe, sections)
    if minutes is not None:
        settings.training.steps = settings.training.max_minutes = None  # what is asked for here wins over a recipe
    if lora and settings.training.lora is None:
        settings.training.lora = LoraRecipe()
    _check_start(start, settings.model.init_from)
    folder = Path(out).expanduser()
    with distributed_processes(progress) as (group, bar):
        more = ask_for_more(folder, settings, minutes, steps)
        with group.main_first():
            if not is_prepared(dataset):
                from plait.training.tasks import source_settings

                settings = source_settings(settings)
            data = open_or_prepare(dataset, folder / "data", settings, bar, allow_changes)
        say = tell if tell is not None and group.is_main else lambda line: None
        if start != "scratch" and settings.model.init_from is None:
            _choose_start(data, folder, settings, start, models, say)
        if settings.model.init_from is not None and _is_encoder(settings.model.init_from):
            _train_on_encoder(data, folder, settings, bar, device, allow_changes, say)
            write_card(folder)
            return Run(folder)
        if more is not None:
            _tell_more(Run(folder).metadata, more, say)
        kept = ask_the_base(data, folder, settings, device, group.size, bar, say)
        if recipe is None or settings.training.task != "auto":  # a recipe without a task is taken as it is
            settings = _derived(data, settings, kept, say if more is None else lambda line: None)
        _fit(data, folder, settings, bar, device, allow_changes, group, callbacks, say, more)
    return Run(folder)


def train_more(
    run: Run,
    minutes: float,
    *,
    device: str = "auto",
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Train a finished run for longer, or go on with such a part where it was stopped; see `Run.more`."""
    check_more(run.folder)
    with distributed_processes(progress) as (group, bar):
        say = tell if tell is not None and group.is_main else lambda line: None
        budget = Budget(minutes=minutes) if run.finished else None
        _tell_more(run.metadata, budget, say)
        _fit(run.dataset, run.folder, run.recipe, bar, device, False, group, callbacks, say, budget)


@contextmanager
def distributed_processes(progress: bool | None) -> Iterator[tuple[Group, ProgressBar]]:
    """The processes that train together, and the progress bar, which the first one shows."""
    from plait.training import distributed

    with distributed.processes() as group, ProgressBar(progress if group.is_main else False) as bar:
        yield group, bar


def _tell_more(metadata: Mapping[str, Any], budget: Budget | None, tell: Callable[[str], None]) -> None:
    """Say what a run is trained for beside what it had."""
    if budget is None:
        tell(f"Going on with the {Budget(**metadata['more'])} more that this run was asked for and stopped in.")
    else:
        tell(f"Training for {budget} more, with a schedule of its own.")


def _check_start(start: str | None, init_from: str | None) -> None:
    """Raises PlaitError for a start that is not known, or one beside `init_from`."""
    if start is None:
        return
    if start not in STARTS:
        raise PlaitError(f"There is no start '{start}'. Known are {' and '.join(STARTS)}.")
    if init_from is not None:
        raise PlaitError(f"start: {start} and init_from exclude each other: the second names the start itself.")


def _choose_start(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    start: str | None,
    models: Sequence[str | Path],
    tell: Callable[[str], None],
) -> None:
    """Enter the best start into the recipe, or mention it where none was asked for. A run that goes on keeps its own.

    Raises PlaitError where the best is asked for and there is none.
    """
    if (folder / "run.json").is_file():
        earlier = Run(folder).recipe
        if start == "best":
            recipe.model.init_from, recipe.training.lora = earlier.model.init_from, earlier.training.lora
        return
    if importlib.util.find_spec("transformers") is None:
        if start == "best":
            raise PlaitError("Pretrained models need transformers: pip install 'plait-ml[huggingface]'.")
        return
    from plait.hf.best_start import best_start

    best = best_start(dataset, models)
    if best is None:
        if start == "best":
            raise PlaitError(
                "No pretrained model on this machine fits these data and its memory. See what there is with "
                "plait models, name a folder with --models DIR, or leave --start out."
            )
        return
    for line in best.left_out:
        tell(line)
    if start is None:
        tell(f"On this machine: {best}. To take it: --start best")
        return
    tell(f"Start: {best}.")
    recipe.model.init_from = best.init_from
    if best.lora and recipe.training.lora is None:
        recipe.training.lora = LoraRecipe()


def _is_encoder(name: str) -> bool:
    """Whether a model to start from is an encoder, on which a head is fitted, or two with a comma."""
    if (Path(name).expanduser() / "run.json").is_file() or name.endswith(".gguf"):
        return False
    from plait.hf.heads import is_encoder
    from plait.hf.hub import encoder_names

    return encoder_names(name) is not None or is_encoder(name)


def _train_on_encoder(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    bar: ProgressBar,
    device: str,
    allow_changes: bool,
    tell: Callable[[str], None],
) -> None:
    """A run whose model is a head over a frozen encoder, two frozen encoders joined in one space, an encoder of images
    and texts trained on pairs, or a Whisper trained on clips with what is said.

    Raises PlaitError where the folder holds another run.
    """
    from plait.core.device import keep_memory, threads
    from plait.data.stores import written_place
    from plait.hf.contrastive import train_pairs, trains_pairs
    from plait.hf.dual_encoder import train_dual_encoder
    from plait.hf.heads import train_head
    from plait.hf.hub import encoder_names
    from plait.hf.speech_training import train_speech, trains_speech

    started = time.time()
    keep_memory()
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "dataset": written_place(dataset.path, folder),
        "data": hashlib.sha256("".join(shard.sha256 for shard in dataset.manifest.shards).encode()).hexdigest(),
    }
    path = folder / "run.json"
    if path.is_file():
        run_record = read_json(path)
        unchanged = all(run_record.get(name) == value for name, value in facts.items())
        if unchanged and "finished" in run_record:
            tell(f"{folder} is already trained; delete it to train again.")
            return
        if not unchanged and not allow_changes:
            raise PlaitError(f"{folder} holds another run: its data or settings differ. Choose another folder with -o.")
    if recipe.training.lora is not None:
        raise PlaitError("--lora is of language models. Over an encoder a head is fitted: leave it out.")
    assert recipe.model.init_from is not None
    more = {"seed": recipe.training.seed, "size": "head", "device": device, "threads": threads(), "started": started}
    facts |= more
    if (names := encoder_names(recipe.model.init_from)) is not None:
        facts["size"] = "pairs"
        lines = train_dual_encoder(dataset, folder, names, facts, recipe, device, bar)
    elif trains_pairs(dataset, recipe.model.init_from):
        facts["size"] = "pairs"
        lines = train_pairs(dataset, folder, recipe.model.init_from, facts, recipe.training, device, bar)
    elif trains_speech(dataset, recipe.model.init_from, recipe.training.task):
        facts["size"] = "speech"
        lines = train_speech(dataset, folder, recipe.model.init_from, facts, recipe.training, device, bar)
    else:
        lines = train_head(dataset, folder, recipe.model.init_from, facts, recipe, device, bar)
    for line in lines:
        tell(line)


def _derived(dataset: Dataset, recipe: Recipe, kept: bool, tell: Callable[[str], None]) -> Recipe:
    """The recipe with what follows from the task, and from whether what the base replies is `kept`."""
    from plait.training.tasks import derive

    derived = derive(dataset, recipe, kept)
    for line in derived.lines:
        tell(line)
    return derived.recipe


def _fit(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    bar: ProgressBar,
    device: str,
    allow_changes: bool,
    group: Any,
    callbacks: Sequence[Callback],
    tell: Callable[[str], None],
    more: Budget | None = None,
) -> None:
    """Train, fit the classifiers of labels, and write the report."""
    from plait.evaluation.decide import finish
    from plait.evaluation.findings import Findings
    from plait.evaluation.keys import Metrics
    from plait.evaluation.learnt import describe_texts
    from plait.library.longer import forget, set_aside, settle
    from plait.library.samples import ModelSamples, recorded
    from plait.reports.report import read_run, write_report
    from plait.training.trainer import train as fit

    if importlib.util.find_spec("tensorboard") is not None and not any(isinstance(c, TensorBoard) for c in callbacks):
        callbacks = [TensorBoard(), *callbacks]
    report = shown_by(bar)
    if group.is_main:
        report = recorded(folder, report)
        callbacks = [*callbacks, ModelSamples(folder, dataset, device)]
    going_on = group.is_main and more is not None and not allow_changes  # with changes nothing is to compare with
    if going_on:
        set_aside(folder)
    try:
        fit(dataset, folder, recipe, report, device, None, allow_changes, group, callbacks, more)
    except PlaitError:
        if going_on:
            forget(folder)
        raise
    if group.is_main and recipe.training.task in ("recognise", "draw", "describe"):
        for line in finish(folder, dataset, device, bar):
            tell(line)
    if group.is_main:
        for describe in TRAINED.all():
            for line in describe(folder, dataset, recipe) or []:
                tell(line)
    if group.is_main and recipe.training.task == "language" and recipe.model.init_from is None:
        nothing = describe_texts(folder, dataset)
        if nothing is not None:
            tell(nothing)
    if group.is_main:
        for line in settle(folder):
            tell(line)
    if group.is_main and not _is_evaluated(folder):
        write_report(folder / "report.html", Metrics(), Findings(), read_run(folder, dataset.path))
        write_card(folder)


def _is_evaluated(folder: Path) -> bool:
    """Whether the figures that lie in a run's folder are of the model that lies there."""
    metrics, model = folder / "metrics.json", folder / "checkpoints" / "best" / "config.json"
    return metrics.is_file() and model.is_file() and metrics.stat().st_mtime >= model.stat().st_mtime


def shown_by(bar: ProgressBar) -> Callable[[Progress], None]:
    """What the trainer tells, on a bar."""

    def show(progress: Progress) -> None:
        losses = "  ".join(f"{Objective.parse(name).short} {value:.3f}" for name, value in progress.losses.items())
        rate = f"  {progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""
        bar(progress.stage, progress.done, progress.total, losses + rate + progress.note)

    return show
