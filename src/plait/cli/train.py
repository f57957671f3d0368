"""The command that trains a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.console import DeviceOption, app, err, out, plain
from plait.core.config import known_tasks


@app.command()
def train(
    dataset: Annotated[
        str, typer.Argument(help="A prepared dataset (a folder or a URL), or files that `prepare` reads.")
    ],
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")],
    recipe: Annotated[str | None, typer.Option(help="A YAML file, or a name of `plait recipes`.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(known_tasks()[1:])}; else seen in the data."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny, small, base or large; see plait sizes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Fit the schedule to a time budget.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The schedule's peak.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Go on from a run, a checkpoint, or a Hugging Face GPT-2, Llama or Qwen3.")
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

    Example: plait train data/photos -o runs/photos --size tiny --minutes 10
    """
    from plait.core.errors import Terminated
    from plait.core.files import link_target
    from plait.training import distributed

    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, sys.argv[1:]))
    out.quiet = err.quiet = distributed.launched() and os.environ["RANK"] != "0"
    try:
        trained = plait.train(
            dataset, run, recipe=recipe, task=task, size=size, minutes=minutes, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, init_from=init_from, start=start, models=models or (),
            freeze=freeze.split(",") if freeze else None, lora=lora,
            replay=_shares(replay), seed=seed, save_every=save_every, canaries=canaries, parallel=parallel,
            grad_accum_steps=grad_accum_steps, allow_changes=allow_changes, device=device, progress=True,
            tell=lambda line: out.print(plain(line)),
        )  # fmt: skip
    except (KeyboardInterrupt, Terminated) as stop:
        last = run / "checkpoints" / "last"
        state = f"Saved: {link_target(last) or last.name}" if last.exists() else "There is no checkpoint yet"
        how = "Stopped by SIGTERM" if isinstance(stop, Terminated) else "Stopped"
        err.print(f"\n{how}. {state}; the same command goes on from there: {run}")
        raise
    out.print(plain(trained.describe()))
    out.print(f"Next: plait evaluate {run}")


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
