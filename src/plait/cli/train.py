"""The command that trains a model."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, app, err, found_model, out, plain
from plait.core.config import known_tasks

# What a run of a model of transformers that was trained further is for; others are measured next.
BESIDE_MORE = ("dataset", "more", "processes", "device")  # the parameters that mean something to a run that goes on


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            help="A prepared dataset (a folder or a URL), or files that `prepare` reads; with --more, a run."
        ),
    ],
    run: Annotated[Path | None, typer.Option("-o", "--out", help="The run's folder.")] = None,
    more: Annotated[
        float | None,
        typer.Option(help="Train a finished run, which stands in the data's place, for so many minutes more."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A YAML file, or a name of `plait recipes`.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(known_tasks()[1:])}; else seen in the data."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Of files that are prepared: what has its records in one split; see plait prepare."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny, small, base or large; see plait sizes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Fit the schedule to a time budget.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The schedule's peak.")] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Go on from a run, a checkpoint, or a Hugging Face name or folder; for images with captions also from "
            "VISION,TEXT, two encoders."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="best: from the best pretrained model on this machine that fits; scratch: from none."),
    ] = None,
    models: Annotated[
        list[Path] | None, typer.Option(help="A folder of models to look in, beside the Hugging Face cache.")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(help="Parts of it that stay as they are, with commas: encoder, backbone, token_embedding."),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train low-rank updates of its backbone, and what is new.")
    ] = False,
    replay: Annotated[
        list[str] | None, typer.Option(help="DATASET=SHARE: of each batch, so much comes from this prepared dataset.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; else at validations.")] = None,
    canaries: Annotated[
        int | None, typer.Option(min=0, help="Plant so many random texts, and see later which were learnt by heart.")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run though its recipe or data changed.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="So many processes on this machine, as torchrun would start them.")
    ] = 1,
    parallel: Annotated[str | None, typer.Option(help="ddp, or fsdp: the backbone's blocks sharded.")] = None,
    grad_accum_steps: Annotated[int | None, typer.Option(help="Compute each batch in so many parts.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a model. Ctrl-C and SIGTERM leave a usable run, and the same command goes on from it, with as many
    processes as you like.

    A finished run goes on where it is given more minutes than it had, or by --more: plait train runs/photos --more 5

    Example: plait train data/photos -o runs/photos --size tiny --minutes 10
    """
    if run is None or not (run.expanduser() / "run.json").is_file():  # a run that has begun may no longer need it
        from plait.hf.hub import encoder_names

        for name in encoder_names(init_from or "") or (init_from,):
            found_model(name)
    from plait.training import distributed

    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, sys.argv[1:]))
    out.quiet = err.quiet = distributed.launched() and os.environ["RANK"] != "0"
    if more is not None:
        _check_alone(context, dataset)
        with _stoppable(Path(dataset)):
            trained = plait.Run(dataset).more(more, device=device, progress=True, tell=_say)
    elif run is None:
        raise plait.PlaitError("Name the folder that the run is written to: -o RUN.")
    else:
        with _stoppable(run):
            trained = plait.train(
                dataset, run, recipe=recipe, task=task, group_by=group_by, size=size, minutes=minutes, steps=steps,
                batch_size=batch_size, learning_rate=learning_rate, init_from=init_from, start=start,
                models=models or (), freeze=freeze.split(",") if freeze else None, lora=lora,
                replay=_shares(replay), seed=seed, save_every=save_every, canaries=canaries, parallel=parallel,
                grad_accum_steps=grad_accum_steps, allow_changes=allow_changes, device=device, progress=True,
                tell=_say,
            )  # fmt: skip
    out.print(plain(trained.describe()))
    out.print(f"Next: plait evaluate {trained.folder}")
    if trained.recipe.training.task == "language" and (words := trained.first_words()) is not None:
        end_of_options = ["--"] if words.startswith("-") else []
        command = shlex.join(["plait", "generate", str(trained.folder), *end_of_options, words])
        out.print(plain(f"See it at work: {command}"))


def _say(line: str) -> None:
    out.print(plain(line))


def _check_alone(context: typer.Context, run: str) -> None:
    """Raise PlaitError for an option beside --more that a run decided when it began."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in BESIDE_MORE and source is not None and source.name == "COMMANDLINE":
            option = "-o" if name == "run" else f"--{name.replace('_', '-')}"
            raise plait.PlaitError(
                f"{option} and --more exclude each other: a run goes on as it began. Write plait train {run} --more "
                "MINUTES, where the first is the run."
            )


@contextmanager
def _stoppable(run: Path) -> Iterator[None]:
    """Say what was saved where training is stopped."""
    from plait.core.errors import Terminated
    from plait.core.files import link_target

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        last = run / "checkpoints" / "last"
        state = f"Saved: {link_target(last) or last.name}" if last.exists() else "There is no checkpoint yet"
        how = "Stopped by SIGTERM" if isinstance(stop, Terminated) else "Stopped"
        err.print(f"\n{how}. {state}; the same command goes on from there: {run}")
        raise


def _shares(entries: list[str] | None) -> dict[str, float] | None:
    """Each DATASET=SHARE as an entry. Raises PlaitError for what is none."""
    shares = {}
    for entry in entries or []:
        path, _, share = entry.rpartition("=")
        try:
            shares[path] = float(share)
        except ValueError:
            path = ""
        if not path:
            raise plait.PlaitError(f"--replay {entry}: write DATASET=SHARE, as in data/photos=0.3.")
    return shares or None
