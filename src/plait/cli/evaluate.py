"""Commands that measure a run: evaluate, demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.train import prepare_files, train_run
from plait.console import (
    Bar,
    DeviceOption,
    PrecisionOption,
    SeedOption,
    app,
    err,
    out,
    plain,
    show_manifest,
    show_metrics,
)

if TYPE_CHECKING:
    from plait.evaluation.findings import Findings


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Records a task, at most.")] = None,
    reference_seconds: Annotated[float, typer.Option(help="Time to train the judge of drawings and speech.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Measure a run on held-out data, beside chance and a simple baseline; writes metrics.json and report.html.

    Example: plait evaluate runs/photos
    """
    metrics = _evaluate(run, data, split, limit, reference_seconds, seed, device, precision)
    if as_json:
        out.print_json(data=metrics)
        return
    show_metrics(metrics)
    out.print(f"All figures: {run / 'metrics.json'}\nReport: {run / 'report.html'}")


def _evaluate(
    run: Path,
    data: str | None,
    split: str,
    limit: int | None,
    reference_seconds: float,
    seed: int,
    device: str,
    precision: str,
) -> dict[str, Any]:
    from plait.core.errors import PlaitError
    from plait.core.files import read_json
    from plait.data.dataset import Dataset
    from plait.evaluation.tasks import Limits
    from plait.evaluation.tasks import evaluate as measure
    from plait.inference.model import Model, load

    if data is None:
        if not (run / "run.json").is_file():
            raise PlaitError(f"{run} is not a run (it has no run.json). Name a run, or a dataset with --data.")
        facts = read_json(run / "run.json")
        if "dataset" not in facts:
            raise PlaitError(f"{run / 'run.json'} does not say which dataset it is of. Name one with --data.")
        data = facts["dataset"]
    dataset = Dataset.open(data)
    model = load(run, device, precision)
    if not isinstance(model, Model):
        raise PlaitError(f"{run} is no model that plait trained; evaluation needs a run.")
    with Bar() as bar:
        if dataset.manifest.catalogue is not None:
            from plait.recommend.evaluate import evaluate_histories

            metrics, findings = evaluate_histories(model, dataset, split, seed=seed, limit=limit, progress=bar)
            return _keep(run, data, metrics, findings)
        limits = Limits() if limit is None else Limits(records=limit)
        metrics, findings = measure(
            model, dataset, split, seed=seed, limits=limits, reference_seconds=reference_seconds, progress=bar
        )
    return _keep(run, data, metrics, findings)


def _keep(run: Path, data: str, metrics: dict[str, Any], findings: Findings) -> dict[str, Any]:
    from plait.reports.report import read_run, write_metrics, write_report

    for note in findings.notes:
        err.print(f"[yellow]Note:[/yellow] {plain(note)}")
    write_metrics(run / "metrics.json", metrics)
    write_report(run / "report.html", metrics, findings, read_run(run, data))
    return metrics


@app.command()
def demo(
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 3.5,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Handwritten digits, their names in English and Chinese, and spoken names: one model, from files to figures.

    Example: plait demo
    """
    from plait.core.config import load_recipe
    from plait.data.dataset import Dataset
    from plait.data.demo_data import write_demo

    begun = time.monotonic()
    if not (run / "data" / "manifest.json").is_file():
        out.print(f"Writing images and sounds as ordinary files: {run / 'files'}")
        write_demo(run / "files", lambda text: err.print(f"[yellow]Note:[/yellow] {plain(text)}"))
        show_manifest(prepare_files(run / "files", run / "data", load_recipe(None).data), run / "data")
    recipe = load_recipe(None, {"training": {"minutes": minutes, "seed": seed}})
    train_run(Dataset.open(run / "data"), run, recipe, device)
    metrics = _evaluate(run, None, "test", None, 15.0, seed, device, "auto")
    show_metrics({name: value for name, value in metrics.items() if name in _demo_figures(metrics)})
    out.print(f"\n{time.monotonic() - begun:.0f} s in all. All figures: {run / 'metrics.json'}")
    out.print(f"Report, with images and audio clips: {run / 'report.html'}\n\nTry next:")
    out.print(f"  plait draw {run} three -n 16 -o threes.png", f"  plait speak {run} seven -o seven.wav", sep="\n")
    out.print(f"  plait classify {run} {run}/files/images/0003.png")
    audio = next(iter(sorted((run / "files" / "audio").glob("en-*"))), None)
    if audio:
        out.print(f"  plait transcribe {run} {audio} --column en")


def _demo_figures(metrics: dict[str, Any]) -> list[str]:
    ends = ("/accuracy", "/judged_accuracy", "/judge_real", "/diversity", "/near_copies", "audio-image/p_at_10",
            "image-audio/p_at_10", "text/p_at_10")  # fmt: skip
    return [name for name in metrics if name.endswith(ends)]
