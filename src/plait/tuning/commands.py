"""The command that tunes a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.console import DeviceOption, app, err, out, plain


@app.command()
def tune(
    dataset: Annotated[Path, typer.Argument(help="A prepared dataset with a val split.")],
    study: Annotated[Path, typer.Option("-o", "--out", help="The study's folder.")],
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try, the default one first.")] = 20,
    over: Annotated[
        str,
        typer.Option(
            help="What to tune, with commas: learning_rate, batch_size, width, layers, dropout, weight_decay, warmup, "
            "cond_dropout, weights, guards (against over-fitting); a range of one's own as learning_rate=0.0001:0.01."
        ),
    ] = "learning_rate,batch_size",
    minutes: Annotated[float | None, typer.Option(help="The time of each trial.")] = None,
    steps: Annotated[int | None, typer.Option(help="The steps of each trial, instead of minutes.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The default recipe: a YAML file, or a name of `plait recipes`.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny, small, base or large; see plait sizes.")] = None,
    objective: Annotated[
        str, typer.Option(help="What is made small on val: loss, or text, image, audio, contrastive.")
    ] = "loss",
    processes: Annotated[int, typer.Option(min=1, help="Trials at once on this machine.")] = 1,
    seeds: Annotated[int, typer.Option(min=0, help="Fresh seeds on which the best meets the default.")] = 3,
    storage: Annotated[
        str | None,
        typer.Option(help="A database for many machines, postgresql://HOST/NAME; else a file in the study's folder."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the study and of its trials.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Find better settings by trials; ends with best.yaml and whether it beats the default on fresh seeds.

    Killed at any time, the same command goes on; more --trials go on too.

    Example: plait tune data/photos -o studies/photos --trials 20 --minutes 2 --over learning_rate,batch_size
    """
    from plait.tuning.api import tune as search

    try:
        tuned = search(
            dataset, study, over=over.split(","), trials=trials, minutes=minutes, steps=steps, recipe=recipe, size=size,
            objective=objective, processes=processes, seeds=seeds, storage=storage, seed=seed, device=device,
            progress=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        err.print(f"\nStopped. The same command goes on from here: {study}")
        raise
    counts = ", ".join(f"{count} {state}" for state, count in tuned.counts.items() if count)
    best = ", ".join(f"{name} {value:.4g}" for name, value in tuned.best_params.items())
    out.print(f"Trials: {counts}. Best: trial {tuned.best_trial}, {tuned.best_value:.4f} ({best}).")
    out.print(plain(tuned.verdict))
    out.print(f"All figures: {study / 'study.json'}\nReport: {tuned.report}")
    out.print(f"Next: plait train {dataset} -o runs/best --recipe {tuned.recipe}")
