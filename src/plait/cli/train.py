"""Commands from files to a run: prepare, train, checkpoint, tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from plait.console import Bar, DeviceOption, RunArgument, SeedOption, app, err, out, plain, show_manifest

if TYPE_CHECKING:
    from plait.data.dataset import Dataset, Manifest
    from plait.training.distributed import Group


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="A folder, archive or table, a URL, or hf:NAME of the Hugging Face hub.")
    ],
    out_folder: Annotated[str, typer.Option("-o", "--out", help="The dataset's folder, or a URL.")],
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="What a column is: image=COL, audio=COL, text=COL, text=COL:NEWNAME, ignore=COL."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Regular expression on file names; its named groups become text columns.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Take map, labels and pattern from this recipe.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode media; all cores if left out.")
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option(help="Look for records that are alike; see duplicates.jsonl.")
    ] = True,
    drop_near_duplicates: Annotated[
        bool, typer.Option("--drop-near-duplicates", help="Leave out of train what val or test has too.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Check files and make a dataset of them: splits, counts, what was rejected and why.

    Ctrl-C stops it, and the same command goes on from there.

    Example: plait prepare photos/ -o data/photos
    """
    from plait.core.config import load_recipe

    given: dict[str, str] = {}
    for entry in map_ or []:
        kind, _, column = entry.partition("=")
        given[kind] = f"{given[kind]},{column}" if kind in given else column
    data = load_recipe(recipe, {"data": {"map": given or None, "pattern": pattern}}).data
    near = {"near_duplicates": near_duplicates, "drop_near_duplicates": drop_near_duplicates}
    manifest = prepare_files(source, out_folder, data, workers=workers, seed=seed, **near)
    show_manifest(manifest, out_folder)
    out.print(f"Next: plait train {out_folder} -o runs/{Path(out_folder).name}")


def prepare_files(source: str | Path, folder: str | Path, data: Any, **options: Any) -> Manifest:
    from plait.data.prepare import prepare as make

    with Bar() as bar:
        try:
            return make(
                source, folder, column_map=data.map or None, labels=data.labels or None, pattern=data.pattern,
                items=data.items, progress=bar, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            err.print("\nStopped. What is done is kept; the same command goes on from here.")
            raise


def _dataset(source: str, run: Path, recipe: Any) -> Dataset:
    """A prepared dataset, or raw files, which are prepared first, into the run's folder."""
    from plait.data.dataset import Dataset

    if "://" in source or (Path(source) / "manifest.json").is_file():
        return Dataset.open(source)
    if not (run / "data" / "manifest.json").is_file():
        show_manifest(prepare_files(source, run / "data", recipe.data), run / "data")
    return Dataset.open(run / "data")


@app.command()
def train(
    dataset: Annotated[
        str, typer.Argument(help="A prepared dataset (a folder or a URL), or files that `prepare` reads.")
    ],
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")],
    recipe: Annotated[str | None, typer.Option(help="A YAML file, or a name of `plait recipes`.")] = None,
    size: Annotated[str | None, typer.Option(help="tiny, small, base or large; see plait sizes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Fit the schedule to a time budget.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The schedule's peak.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Go on from a run, a checkpoint, or a Hugging Face GPT-2, Llama or Qwen3.")
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
    from plait.core.config import LoraRecipe, load_recipe
    from plait.training import distributed

    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, sys.argv[1:]))

    training = {
        "minutes": minutes, "steps": steps, "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate,
        "save_every": save_every, "parallel": parallel, "grad_accum_steps": grad_accum_steps, "canaries": canaries,
        "freeze": freeze.split(",") if freeze else None, "replay": _shares(replay),
    }  # fmt: skip
    settings = load_recipe(recipe, {"model": {"size": size, "init_from": init_from}, "training": training})
    if lora and settings.training.lora is None:
        settings.training.lora = LoraRecipe()
    with distributed.processes() as group:
        out.quiet = err.quiet = not group.is_main
        with group.main_first():
            prepared = _dataset(dataset, run, settings)
        train_run(prepared, run, settings, device, allow_changes, group)
    out.print(f"Next: plait evaluate {run}")


def _shares(given: list[str] | None) -> dict[str, float] | None:
    """Each DATASET=SHARE as an entry."""
    from plait.core.errors import PlaitError

    found = {}
    for entry in given or []:
        path, _, share = entry.rpartition("=")
        try:
            found[path] = float(share)
        except ValueError:
            path = ""
        if not path:
            raise PlaitError(f"--replay {entry}: write DATASET=SHARE, as in data/photos=0.3.")
    return found or None


def train_run(
    dataset: Dataset, run: Path, recipe: Any, device: str, allow_changes: bool = False, group: Group | None = None
) -> None:
    from plait.core.errors import Terminated
    from plait.core.files import link_target
    from plait.evaluation.findings import Findings
    from plait.recommend.model import embedder
    from plait.reports.report import read_run, write_report
    from plait.training.run import describe
    from plait.training.trainer import train as fit

    with Bar() as bar:
        try:
            fit(
                dataset, run, recipe, bar.training, device, allow_changes=allow_changes, group=group,
                embed=lambda items: embedder(recipe.model.item.encoder, device)(items),
            )  # fmt: skip
        except (KeyboardInterrupt, Terminated) as stop:
            last = run / "checkpoints" / "last"
            state = f"Saved: {link_target(last) or last.name}" if last.exists() else "There is no checkpoint yet"
            how = "Stopped by SIGTERM" if isinstance(stop, Terminated) else "Stopped"
            err.print(f"\n{how}. {state}; the same command goes on from there: {run}")
            raise
    if group is None or group.is_main:
        write_report(run / "report.html", {}, Findings(), read_run(run, dataset.path))
        out.print(plain(describe(run)))


checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="List and verify the checkpoints of a run.\n\nExample: plait checkpoint verify runs/photos",
)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel="From files to a model")


@checkpoint_app.command("list")
def list_checkpoints(run: RunArgument) -> None:
    """Show the checkpoints of a run, the newest first.

    Example: plait checkpoint list runs/photos
    """
    from plait.training.checkpointing import describe

    table = Table("step", "", "MB", "validation", "state", box=None, header_style="bold")
    for row in describe(run):
        losses = "  ".join(f"{name} {value:.3f}" for name, value in row["validation"].items())
        state = "[red]damaged[/red]" if row["wrong"] else "whole"
        table.add_row(str(row["step"]), " ".join(row["names"]), f"{row['bytes'] / 1e6:.1f}", plain(losses), state)
    out.print(table)


@checkpoint_app.command("verify")
def verify_checkpoints(run: RunArgument) -> None:
    """Compare every file of a run's checkpoints with its sha256; exit code 1 where one is damaged.

    Example: plait checkpoint verify runs/photos
    """
    from plait.training.checkpointing import describe

    damaged = 0
    for row in describe(run):
        damaged += bool(row["wrong"])
        out.print(f"step {row['step']}: {'damaged' if row['wrong'] else 'whole'}")
        for line in row["wrong"]:
            out.print(f"  [red]{plain(line)}[/red]")
    if damaged:
        sys.exit(1)


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
    recipe: Annotated[str | None, typer.Option(help="The default recipe, a YAML file.")] = None,
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
    from plait.core.config import load_recipe
    from plait.data.dataset import Dataset
    from plait.tuning.study import News, Plan
    from plait.tuning.study import tune as search

    settings = load_recipe(
        recipe, {"model": {"size": size}, "training": {"minutes": minutes, "steps": steps, "seed": seed}}
    )
    plan = Plan(settings, over.split(","), objective, trials, seeds, processes, device)
    with Bar() as bar:

        def tell(news: News) -> None:
            if news.line:
                err.print(plain(news.line))
            bar(news.stage, news.done, news.total, news.note)

        try:
            found = search(Dataset.open(dataset), study, plan, tell, storage)
        except KeyboardInterrupt:
            err.print(f"\nStopped. The same command goes on from here: {study}")
            raise
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    best = ", ".join(f"{name} {value:.4g}" for name, value in found["best"]["params"].items())
    out.print(f"Trials: {counts}. Best: trial {found['best']['number']}, {found['best']['value']:.4f} ({best}).")
    out.print(plain(found["verdict"]["text"]))
    out.print(f"All figures: {study / 'study.json'}\nReport: {study / 'report.html'}")
    out.print(f"Next: plait train {dataset} -o runs/best --recipe {study / 'best.yaml'}")
