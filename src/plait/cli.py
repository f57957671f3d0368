"""The command line: one function a command, and no logic of its own."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# A thread that waits for another must not spin while somebody else could use the processor; read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from plait.applications.model import Model
    from plait.applications.pretrained import Pretrained
    from plait.data.dataset import Dataset, Manifest
    from plait.training.distributed import Group
    from plait.training.trainer import Progress as TrainingProgress

app = typer.Typer(
    name="plait",
    help="One model that reads and writes text, pictures and sound from your own files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ModelArgument = Annotated[str, typer.Argument(help="A run, a checkpoint, or a Hugging Face name or folder.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one message and exit code 1."""
    from plait.runtime import PlaitError, Terminated

    try:
        app()
    except PlaitError as error:
        err.quiet = False
        err.print(f"[red]plait:[/red] {_plain(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("\nStopped.")
        sys.exit(130)
    except Terminated:
        sys.exit(143)


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", "\\[")


# --- progress ---------------------------------------------------------------------------------------------------


class _Bar:
    """A bar for each stage of long work; on a pipe, a line now and then instead."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:14}"), BarColumn(30), TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=err,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}
        self.told: dict[str, float] = {}

    def __enter__(self) -> _Bar:
        if err.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        if err.is_terminal:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=total, note="")
            self.bars.update(self.tasks[stage], completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self.told.get(stage, 0.0) > 20:
            self.told[stage] = time.monotonic()
            err.print(f"{stage}: {done}{f'/{total}' if total else ''}{f'  {note}' if note else ''}")

    def training(self, progress: TrainingProgress) -> None:
        """What the trainer tells."""
        losses = "  ".join(f"{name.replace('contrastive:', '')} {value:.3f}" for name, value in progress.losses.items())
        rate = f"  {progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""
        self(progress.stage, progress.done, progress.total, losses + rate + progress.note)


def _show_manifest(manifest: Manifest, folder: str | Path) -> None:
    table = Table("column", "what", "records", "length", box=None, header_style="bold")
    for name, kind in manifest.columns.items():
        lengths = manifest.statistics.get(name)
        if lengths is not None:
            span = f"{lengths.min:.4g} to {lengths.max:.4g} {lengths.unit}"
            table.add_row(name, kind, str(lengths.records), span)
    out.print(table)
    counts = ", ".join(f"{split} {count}" for split, count in manifest.counts.items())
    overlap = "".join(f"; {pair} overlap {count}" for pair, count in manifest.overlap.items() if count)
    near = "".join(f"; {pair} near-duplicates {count}" for pair, count in manifest.near_duplicates.items())
    out.print(
        f"Records: {counts}. Rejected: {manifest.rejected}. Exact duplicates: {manifest.duplicates}{overlap}{near}."
    )
    for warning in manifest.warnings:
        out.print(f"[yellow]Note:[/yellow] {_plain(warning)}")
    if manifest.rejected:
        out.print(f"What was rejected, and why: {folder}/rejects.jsonl")
    out.print(f"Report: {folder}/report.html")


# --- data and training ------------------------------------------------------------------------------------------


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
    recipe: Annotated[Path | None, typer.Option(help="Take map, labels and pattern from this recipe.")] = None,
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
    from plait.config import load_recipe

    given: dict[str, str] = {}
    for entry in map_ or []:
        kind, _, column = entry.partition("=")
        given[kind] = f"{given[kind]},{column}" if kind in given else column
    data = load_recipe(recipe, {"data": {"map": given or None, "pattern": pattern}}).data
    near = {"near_duplicates": near_duplicates, "drop_near_duplicates": drop_near_duplicates}
    manifest = _prepare(source, out_folder, data, workers=workers, seed=seed, **near)
    _show_manifest(manifest, out_folder)
    out.print(f"Next: plait train {out_folder} -o runs/{Path(out_folder).name}")


def _prepare(source: str | Path, folder: str | Path, data: Any, **options: Any) -> Manifest:
    from plait.data.prepare import prepare as make

    with _Bar() as bar:
        try:
            return make(
                source, folder, column_map=data.map or None, labels=data.labels or None, pattern=data.pattern,
                progress=bar, **options,
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
        _show_manifest(_prepare(source, run / "data", recipe.data), run / "data")
    return Dataset.open(run / "data")


@app.command()
def train(
    dataset: Annotated[
        str, typer.Argument(help="A prepared dataset (a folder or a URL), or files that `prepare` reads.")
    ],
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")],
    recipe: Annotated[Path | None, typer.Option(help="A YAML file; see recipes/.")] = None,
    size: Annotated[str | None, typer.Option(help="tiny, small, base or large; see plait sizes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Fit the schedule to a time budget.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The schedule's peak.")] = None,
    init_from: Annotated[str | None, typer.Option(help="A Hugging Face GPT-2, Llama or Qwen3 to start from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; else at validations.")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with a run though its recipe or data changed.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="So many processes on this machine, as torchrun would start them.")
    ] = 1,
    parallel: Annotated[str | None, typer.Option(help="ddp, or fsdp: the backbone's blocks sharded.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Compute each batch in so many parts.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a model. Ctrl-C and SIGTERM leave a usable run, and the same command goes on from it, with as many
    processes as you like.

    Example: plait train data/photos -o runs/photos --size tiny --minutes 10
    """
    from plait.config import load_recipe
    from plait.training import distributed

    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, sys.argv[1:]))

    training = {
        "minutes": minutes, "steps": steps, "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate,
        "save_every": save_every, "parallel": parallel, "accumulate": accumulate,
    }  # fmt: skip
    settings = load_recipe(recipe, {"model": {"size": size, "init_from": init_from}, "training": training})
    with distributed.processes() as group:
        out.quiet = err.quiet = not group.first
        with group.in_turn():
            prepared = _dataset(dataset, run, settings)
        _train(prepared, run, settings, device, allow_changes, group)
    out.print(f"Next: plait evaluate {run}")


def _train(
    dataset: Dataset, run: Path, recipe: Any, device: str, allow_changes: bool = False, group: Group | None = None
) -> None:
    from plait.evaluation.report import Findings, read_run, write_report
    from plait.runtime import Terminated
    from plait.training.trainer import describe
    from plait.training.trainer import train as fit

    with _Bar() as bar:
        try:
            fit(dataset, run, recipe, bar.training, device, allow_changes=allow_changes, group=group)
        except (KeyboardInterrupt, Terminated) as stop:
            last = run / "checkpoints" / "last"
            state = f"Saved: {last.resolve().name}" if last.exists() else "There is no checkpoint yet"
            how = "Stopped by SIGTERM" if isinstance(stop, Terminated) else "Stopped"
            err.print(f"\n{how}. {state}; the same command goes on from there: {run}")
            raise
    if group is None or group.first:
        write_report(run / "report.html", {}, Findings(), read_run(run, dataset.path))
        out.print(_plain(describe(run)))


checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="List and verify the checkpoints of a run.\n\nExample: plait checkpoint verify runs/photos",
)
app.add_typer(checkpoint_app, name="checkpoint")
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.")]


@checkpoint_app.command("list")
def list_checkpoints(run: RunArgument) -> None:
    """Show the checkpoints of a run, the newest first.

    Example: plait checkpoint list runs/photos
    """
    from plait.training.saving import describe

    table = Table("step", "", "MB", "validation", "state", box=None, header_style="bold")
    for row in describe(run):
        losses = "  ".join(f"{name} {value:.3f}" for name, value in row["validation"].items())
        state = "[red]damaged[/red]" if row["wrong"] else "whole"
        table.add_row(str(row["step"]), " ".join(row["names"]), f"{row['bytes'] / 1e6:.1f}", _plain(losses), state)
    out.print(table)


@checkpoint_app.command("verify")
def verify_checkpoints(run: RunArgument) -> None:
    """Compare every file of a run's checkpoints with its sha256; exit code 1 where one is damaged.

    Example: plait checkpoint verify runs/photos
    """
    from plait.training.saving import describe

    damaged = 0
    for row in describe(run):
        damaged += bool(row["wrong"])
        out.print(f"step {row['step']}: {'damaged' if row['wrong'] else 'whole'}")
        for line in row["wrong"]:
            out.print(f"  [red]{_plain(line)}[/red]")
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
            "drop_condition, weights; a range of one's own as learning_rate=0.0001:0.01."
        ),
    ] = "learning_rate,batch_size",
    minutes: Annotated[float | None, typer.Option(help="The time of each trial.")] = None,
    steps: Annotated[int | None, typer.Option(help="The steps of each trial, instead of minutes.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The default recipe, a YAML file.")] = None,
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
    from plait.config import load_recipe
    from plait.data.dataset import Dataset
    from plait.tune import News, Plan
    from plait.tune import tune as search

    settings = load_recipe(
        recipe, {"model": {"size": size}, "training": {"minutes": minutes, "steps": steps, "seed": seed}}
    )
    plan = Plan(settings, over.split(","), objective, trials, seeds, processes, device)
    with _Bar() as bar:

        def tell(news: News) -> None:
            if news.line:
                err.print(_plain(news.line))
            bar(news.stage, news.done, news.total, news.note)

        try:
            found = search(Dataset.open(dataset), study, plan, tell, storage)
        except KeyboardInterrupt:
            err.print(f"\nStopped. The same command goes on from here: {study}")
            raise
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    best = ", ".join(f"{name} {value:.4g}" for name, value in found["best"]["params"].items())
    out.print(f"Trials: {counts}. Best: trial {found['best']['number']}, {found['best']['value']:.4f} ({best}).")
    out.print(_plain(found["verdict"]["text"]))
    out.print(f"All figures: {study / 'study.json'}\nReport: {study / 'report.html'}")
    out.print(f"Next: plait train {dataset} -o runs/best --recipe {study / 'best.yaml'}")


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A run, a checkpoint or a dataset to check too.")] = None,
) -> None:
    """Check the installation, and the integrity of a run or a dataset; exit code 1 where something fails.

    Example: plait doctor runs/photos
    """
    from plait.doctor import check_folder, check_installation

    findings = check_installation(folder or Path()) + (check_folder(folder) if folder else [])
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for found in findings:
        mark = f"[{colours[found.level]}]{found.level:4}[/{colours[found.level]}]"
        out.print(f"{mark}  {_plain(found.subject)}: {_plain(found.text)}")
    if any(found.level == "fail" for found in findings):
        sys.exit(1)


@app.command()
def sizes() -> None:
    """Show what each --size stands for.

    Example: plait sizes
    """
    from plait.training.setup import size_table

    rows = size_table()
    table = Table("size", *rows, box=None, header_style="bold")
    for name in next(iter(rows.values())):
        table.add_row(name, *(values[name] for values in rows.values()))
    out.print(table)


@app.command()
def plan(
    source: Annotated[str | None, typer.Argument(help="A recipe, a run, or a folder with a config.json.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A network known by name: tiny, gpt3-175b, llama3-405b, ...")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="here, or a row of the table in docs/plan.md: h100, a100, ...")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="Of a device and hour, in your money.")] = None,
    data_tokens: Annotated[float | None, typer.Option(min=1, help="Tokens to train on.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0, help="Model FLOPs, as a share of the peak; else .4.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0, help="Instead: TFLOP/s that a device reaches, recomputation counted.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a device holds at a time.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence; else the context.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="Only this one: one, ddp, fsdp, tensor, sequence, sequence+fsdp.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="none, selective (attention scores) or full.")] = "none",
    budget: Annotated[
        str | None, typer.Option(help="For the best size: FLOPs (1e22), days (10d), money ($50000).")
    ] = None,
    failures: Annotated[bool, typer.Option("--failures", help="Simulate the run on machines that fail.")] = False,
    mtbf: Annotated[float | None, typer.Option(min=0, help="Hours between the failures of one machine.")] = None,
    machines: Annotated[int | None, typer.Option(min=1, help="Machines; else one for 8 devices.")] = None,
    interruptions: Annotated[
        float | None, typer.Option(min=0, help="Instead of --mtbf: of the whole system ...")
    ] = None,
    in_days: Annotated[float | None, typer.Option(min=0, help="... in so many days.")] = None,
    save_seconds: Annotated[float, typer.Option(min=0.001, help="That a checkpoint stops the work.")] = 30.0,
    restart_minutes: Annotated[float, typer.Option(min=0, help="From a failure until work goes on.")] = 10.0,
    every: Annotated[float | None, typer.Option(min=0.001, help="Minutes between checkpoints; else the best.")] = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Foresee what a model weighs, where it fits, and what training it costs.

    Example: plait plan --preset gpt3-175b --gpus 1024 --gpu h100 --price 3
    """
    from plait.plan import networks
    from plait.plan.report import Options, make_plan, sheets
    from plait.runtime import PlaitError

    if (source is None) == (preset is None):
        raise PlaitError("Say what to plan: a recipe, or --preset NAME. Example: plait plan --preset gpt3-175b")
    network = networks.preset(preset) if preset is not None else networks.network(str(source))
    made = make_plan(
        network,
        Options(
            gpu=gpu, gpus=gpus, price=price, tokens=data_tokens, utilisation=utilisation, tflops=tflops, batch=batch,
            length=length, layout=layout, recompute=recompute, budget=budget, fails=failures, between=mtbf,
            machines=machines, interruptions=interruptions, days=in_days, save=save_seconds, restart=restart_minutes,
            every=every, seed=seed,
        ),
    )  # fmt: skip
    if as_json:
        out.print_json(data=made)
        return
    for warning in made["warnings"]:
        err.print(f"[yellow]Note:[/yellow] {_plain(warning)}")
    for sheet in sheets(made):
        out.print(f"\n[bold]{_plain(sheet.title)}[/bold]")
        table = Table(*sheet.heads, box=None, show_header=bool(sheet.heads), header_style="bold")
        for row in sheet.rows:
            table.add_row(*map(_plain, row))
        out.print(table)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Records a task, at most.")] = None,
    judge_seconds: Annotated[float, typer.Option(help="Time to train the judge of drawings and speech.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure a run on held-out data, beside chance and a simple baseline; writes metrics.json and report.html.

    Example: plait evaluate runs/photos
    """
    metrics = _evaluate(run, data, split, limit, judge_seconds, seed, device)
    if as_json:
        out.print_json(data=metrics)
        return
    _show_metrics(metrics)
    out.print(f"All figures: {run / 'metrics.json'}\nReport: {run / 'report.html'}")


def _evaluate(
    run: Path, data: str | None, split: str, limit: int | None, judge_seconds: float, seed: int, device: str
) -> dict[str, Any]:
    from plait.applications.model import Model, load
    from plait.data.dataset import Dataset
    from plait.evaluation.report import read_run, write_metrics, write_report
    from plait.evaluation.tasks import Limits
    from plait.evaluation.tasks import evaluate as measure
    from plait.runtime import PlaitError, read_json

    if data is None:
        if not (run / "run.json").is_file():
            raise PlaitError(f"{run} is not a run (it has no run.json). Name a run, or a dataset with --data.")
        facts = read_json(run / "run.json")
        if "dataset" not in facts:
            raise PlaitError(f"{run / 'run.json'} does not say which dataset it is of. Name one with --data.")
        data = facts["dataset"]
    dataset = Dataset.open(data)
    model = load(run, device)
    if not isinstance(model, Model):
        raise PlaitError(f"{run} is no model that plait trained; evaluation needs a run.")
    with _Bar() as bar:
        limits = Limits() if limit is None else Limits(records=limit)
        metrics, findings = measure(
            model, dataset, split, seed=seed, limits=limits, judge_seconds=judge_seconds, progress=bar
        )
    for note in findings.notes:
        err.print(f"[yellow]Note:[/yellow] {_plain(note)}")
    write_metrics(run / "metrics.json", metrics)
    write_report(run / "report.html", metrics, findings, read_run(run, data))
    return metrics


def _show_metrics(metrics: dict[str, Any]) -> None:
    table = Table("figure", "value", "±", "chance", "baseline", "n", box=None, header_style="bold")
    # The figures of single labels, and times, are in the files.
    names = [name for name in metrics if "[" not in name and not name.startswith("timing/")]
    for name in names:
        metric = metrics[name]
        row = [metric[key] for key in ("value", "stderr", "chance", "baseline")]
        shown = ["" if value is None or value != value else f"{round(value, 9):.4g}" for value in row]
        table.add_row(_plain(name), *shown, "" if metric["n"] is None else str(metric["n"]))
    for column, least in zip(table.columns, (max(map(len, names), default=0), 8, 7, 6, 8, 3), strict=True):
        column.no_wrap, column.min_width = True, least
    out.print(table)


@app.command()
def demo(
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 2.5,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Handwritten digits, their names in English and Chinese, and spoken names: one model, from files to figures.

    Example: plait demo
    """
    from plait.applications.demo import write_demo
    from plait.config import load_recipe
    from plait.data.dataset import Dataset

    begun = time.monotonic()
    if not (run / "data" / "manifest.json").is_file():
        out.print(f"Writing pictures and sounds as ordinary files: {run / 'files'}")
        write_demo(run / "files", lambda text: err.print(f"[yellow]Note:[/yellow] {_plain(text)}"))
        _show_manifest(_prepare(run / "files", run / "data", load_recipe(None).data), run / "data")
    recipe = load_recipe(None, {"training": {"minutes": minutes, "seed": seed}})
    _train(Dataset.open(run / "data"), run, recipe, device)
    metrics = _evaluate(run, None, "test", None, 15.0, seed, device)
    _show_metrics({name: value for name, value in metrics.items() if name in _demo_figures(metrics)})
    out.print(f"\n{time.monotonic() - begun:.0f} s in all. All figures: {run / 'metrics.json'}")
    out.print(f"Report, with pictures and sounds: {run / 'report.html'}\n\nTry next:")
    out.print(f"  plait draw {run} three -n 16 -o threes.png", f"  plait speak {run} seven -o seven.wav", sep="\n")
    out.print(f"  plait classify {run} {run}/files/pictures/0003.png")
    sound = next(iter(sorted((run / "files" / "sounds").glob("en-*"))), None)
    if sound:
        out.print(f"  plait transcribe {run} {sound} --column en")


def _demo_figures(metrics: dict[str, Any]) -> list[str]:
    ends = ("/accuracy", "/judged_accuracy", "/judge_real", "/diversity", "/near_copies", "audio-image/p_at_10",
            "image-audio/p_at_10", "text/p_at_10")  # fmt: skip
    return [name for name in metrics if name.endswith(ends)]


# --- use --------------------------------------------------------------------------------------------------------


def _load(name: str, device: str = "auto") -> Model | Pretrained:
    from plait.applications.model import load

    return load(name, device)


def _media_or_text(value: str) -> str | Path:
    """An argument that names a file is that file; anything else is text."""
    if not re.search(r"\.(png|jpe?g|gif|webp|bmp|tiff?|wav|flac|ogg|opus|mp3)$", value, re.IGNORECASE):
        return value
    path = Path(value)
    with contextlib.suppress(OSError):  # a name longer than names may be
        if path.is_file():
            return path
    if re.search(r"\s", value):
        return value  # a sentence that ends like a file
    from plait.runtime import PlaitError

    raise PlaitError(f"{value} does not exist.")


def _existing(path: Path) -> Path:
    if not path.is_file():
        from plait.runtime import PlaitError

        raise PlaitError(f"{path} does not exist.")
    return path


def _note_windows(model: Model | Pretrained, value: str | Path) -> None:
    """Say so where a sound is longer than the model reads at once."""
    from plait.applications.model import Model as OurModel

    if isinstance(value, Path) and isinstance(model, OurModel) and (count := model.passes(value)) > 1:
        text = f"{value} is longer than this model reads at once; it is read in {count} windows that overlap by half."
        err.print(f"[yellow]Note:[/yellow] {_plain(text)}")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and continuation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of the continuation.")] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1)] = 1,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample; by itself where several are asked for.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Continue a text.

    Example: plait generate gpt2 "Hello, how are you?" --max-length 50 --num-return-sequences 5
    """
    made = _load(model, device).generate(
        prompt, max_length=max_length, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences,
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    texts = made if isinstance(made, list) else [made]
    for text in texts:
        out.print(text, markup=False)
        if len(texts) > 1:
            out.print("---")


@app.command()
def classify(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Pictures or recordings, or texts.")],
    labels: Annotated[str | None, typer.Option(help="Choose between these, with commas.")] = None,
    column: Annotated[str | None, typer.Option(help="Answer in this text column.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 3,
    device: DeviceOption = "auto",
) -> None:
    """Name what is in a picture or a recording, with probabilities.

    Example: plait classify runs/demo runs/demo/files/pictures/0003.png
    """
    loaded = _load(model, device)
    wanted = [label.strip() for label in labels.split(",")] if labels else None
    for file in files:
        value = _media_or_text(file)
        _note_windows(loaded, value)
        ranked = loaded.classify(value, labels=wanted, column=column, top=top)
        out.print(_plain(f"{file}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in ranked)))


@app.command()
def describe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Pictures.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Say in words what is in a picture.

    Example: plait describe runs/demo runs/demo/files/pictures/0003.png --column zh
    """
    loaded = _load(model, device)
    for file in files:
        out.print(_plain(f"{file}: {loaded.describe(_existing(file), column=column)}"))


@app.command()
def transcribe(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Recordings.")],
    column: Annotated[str | None, typer.Option(help="Write into this text column.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Write down what is said in a recording.

    Example: plait transcribe openai/whisper-tiny speech.wav
    """
    loaded = _load(model, device)
    for file in files:
        _note_windows(loaded, _existing(file))
        out.print(_plain(f"{file}: {loaded.transcribe(_existing(file), column=column)}"))


@app.command()
def draw(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(help="What to draw; each text gets a row.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures of each; more than one make a contact sheet.")] = 1,
    best_of: Annotated[int | None, typer.Option(help="Draw so many for each, keep those nearest to the text.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A PNG file.")] = Path("drawing.png"),
    device: DeviceOption = "auto",
) -> None:
    """Draw pictures of texts.

    Example: plait draw runs/demo "three" -n 16 -o threes.png
    """
    from plait.applications.sheet import contact_sheet

    loaded = _load(model, device)
    pictures = [p for text in texts for p in loaded.draw(text, n=n, best_of=best_of, guidance=guidance, seed=seed)]
    _write(out_file, contact_sheet(pictures, n if len(texts) > 1 else None))
    out.print(f"{len(pictures)} drawn: {out_file}")


@app.command()
def speak(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="What to say.")],
    guidance: Annotated[float | None, typer.Option(help="How strongly the text rules; 1 is not at all more.")] = None,
    seed: SeedOption = 0,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="A WAV file.")] = Path("speech.wav"),
    device: DeviceOption = "auto",
) -> None:
    """Say a text.

    Example: plait speak runs/demo "seven" -o seven.wav
    """
    from plait.data.media import encode_wav

    wave, rate = _load(model, device).speak(text, n=1, guidance=guidance, seed=seed)[0]
    _write(out_file, encode_wav(wave, rate))
    out.print(f"{len(wave) / rate:.2f} s of sound: {out_file}")


def _write(path: Path, data: bytes) -> None:
    from plait.runtime import PlaitError

    try:
        path.write_bytes(data)
    except OSError as error:
        raise PlaitError(f"Cannot write {path}: {error.strerror}. Choose another file with -o.") from error


@app.command()
def embed(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(help="Texts, pictures and recordings.")],
    out_file: Annotated[Path | None, typer.Option("-o", "--out", help="A .npy file; default: JSON lines.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Place texts, pictures and sounds in one space.

    Example: plait embed runs/demo "three" runs/demo/files/pictures/0003.png
    """
    import io
    import json

    import numpy as np

    loaded = _load(model, device)
    values = [_media_or_text(value) for value in inputs]
    for value in values:
        _note_windows(loaded, value)
    vectors = loaded.embed(values)
    if out_file is not None:
        array = io.BytesIO()
        np.save(array, vectors)
        _write(out_file, array.getvalue())
        out.print(f"{vectors.shape[0]} vectors of {vectors.shape[1]}: {out_file}")
        return
    for name, vector in zip(inputs, vectors, strict=True):
        out.print(_plain(json.dumps({"input": name, "embedding": [round(float(x), 6) for x in vector]})))


@app.command()
def export(
    model: ModelArgument,
    out_folder: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="transformers or onnx.")] = "transformers",
) -> None:
    """Write the text-and-codes backbone for other programs.

    Example: plait export runs/demo --to transformers -o exported
    """
    from plait.applications.model import Model as OurModel
    from plait.generation.legal import settle
    from plait.model.export import export_onnx, export_transformers
    from plait.runtime import PlaitError

    formats: dict[str, Callable[..., object]] = {"transformers": export_transformers, "onnx": export_onnx}
    if to not in formats:
        raise PlaitError(f"Unknown format '{to}'. Use {' or '.join(formats)}.")
    loaded = _load(model, "cpu")
    if not isinstance(loaded, OurModel):
        raise PlaitError(
            f"{model} runs in transformers already; only GPT-2, Llama, Qwen3 and Plait models are exported."
        )
    formats[to](settle(loaded.checkpoint, loaded.engine), out_folder)
    out.print(f"Written: {out_folder}")


# --- serving ----------------------------------------------------------------------------------------------------


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="Runs, checkpoints or Hugging Face names; NAME=MODEL renames.")],
    host: Annotated[str, typer.Option(help="The address; one off loopback needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that `plait key` made; every request needs one.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name that this server answers for.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A web page's origin that may call.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Samples written at once, a model.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Samples that may wait for a place in a model's batch.")] = 64,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="The longest that a request may take.")] = 120.0,
    read_seconds: Annotated[float, typer.Option(min=0.5, help="The longest that a client may stand still.")] = 10.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What open requests have left at SIGTERM.")] = 10.0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve models over HTTP, in the shapes of OpenAI's API.

    Example: plait serve runs/demo --port 8000
    """
    try:
        from plait.serving.app import Limits
        from plait.serving.app import serve as run
    except ModuleNotFoundError as error:
        from plait.runtime import PlaitError

        raise PlaitError(f"Serving needs {error.name}. Run: pip install 'plait[serve]'.") from None

    limits = Limits(
        batch=batch,
        queue=queue,
        request_seconds=request_seconds,
        read_seconds=read_seconds,
        drain_seconds=drain_seconds,
    )
    run(
        models, host, port, key_file=api_key_file, allow_hosts=allow_host, allow_origins=allow_origin, device=device,
        precision=precision, limits=limits, tell=lambda url: out.print(f"Serving at {url}/v1 (Ctrl-C stops)"),
    )  # fmt: skip


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="Where hashes of keys are kept.")],
    name: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
) -> None:
    """Make an API key: it is shown once, and only its hash is kept.

    Example: plait key keys.txt --name alice
    """
    from plait.serving.limits import new_key

    out.print(new_key(file, name))
