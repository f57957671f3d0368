"""The command that measures a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.cli.figures import show_figures
from plait.console import DeviceOption, PrecisionOption, SeedOption, app, err, out, plain, show_metrics
from plait.evaluation.keys import TIMING


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; if left out test, or val where test is empty.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Records a task, at most.")] = None,
    made: Annotated[
        int | None, typer.Option(help="Images, and clips, to make and judge, at most: 200 if left out.")
    ] = None,
    reference_seconds: Annotated[float, typer.Option(help="Time to train the judge of drawings and speech.")] = 15.0,
    folds: Annotated[
        int | None,
        typer.Option(help="Ask about all records, in so many folds; by itself 5 below 500 records, 0 for none."),
    ] = None,
    alternatives: Annotated[
        str, typer.Option(help="quick; all: also a small CNN that is trained for as long as the run, once.")
    ] = "quick",
    all_figures: Annotated[bool, typer.Option("--all", help="All figures but those of single labels.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json.")] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="List likely wrong labels, and what to label next, instead.")
    ] = False,
    column: Annotated[str | None, typer.Option(help="With --labels: the column of labels.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Measure a run on held-out data, beside chance and a simple baseline; writes metrics.json and report.html.

    Example: plait evaluate runs/photos
    """
    if labels:
        _review(run, data, column, seed, device)
        return
    evaluation = plait.evaluate(
        run, data=data, split=split, limit=limit, made=made, reference_seconds=reference_seconds, folds=folds,
        alternatives=alternatives, seed=seed, device=device, precision=precision, progress=True,
    )  # fmt: skip
    for note in evaluation.notes:
        err.print(f"[yellow]Note:[/yellow] {plain(note)}")
    if as_json:
        out.print_json(data=evaluation.to_dict())
        return
    if all_figures:
        show_metrics({name: evaluation[name]._asdict() for name in evaluation.main()})
    else:
        show_figures({key: evaluation[key] for key in evaluation.headline_keys() or evaluation.metric_keys})
    if evaluation.verdict is not None:
        out.print(f"\n{plain(str(evaluation.verdict))}\n")
    out.print(f"All figures: {run / 'metrics.json'}\nReport: {evaluation.report}")
    if evaluation.findings.answers:
        wrong = sum(one.truth != one.answer for one in evaluation.findings.answers)
        by_folds = any(key.task == TIMING and key.direction.source == "folds" for key in evaluation.metric_keys)
        whose = " (of models that had not learnt the record; the run itself has, and may answer otherwise)"
        out.print(f"Each answer, the {wrong:,} wrong ones first: {run / 'answers.csv'}{whose if by_folds else ''}")
    if any(key.task == "recognition" for key in evaluation.metric_keys):
        size = plait.Run(run).metadata.get("size") if (run / "run.json").is_file() else None
        why = f"; why: plait explain {run} NEW_FILE -o why.html" if size != "head" else ""  # a head is not explained
        out.print(f"To use it: plait classify {run} FOLDER -o said.csv{why}")


def _review(run: Path, data: str | None, column: str | None, seed: int, device: str) -> None:
    review = plait.label_review(run, data, column=column, seed=seed, device=device, progress=True)
    for note in review.notes:
        err.print(f"[yellow]Note:[/yellow] {plain(note)}")
    for one in review.suspects[:10]:
        out.print(
            plain(
                f"{one.source}: labelled {one.label} ({one.probability:.3f}), "
                f"rather {one.suggested} ({one.suggested_probability:.3f})"
            )
        )
    out.print(
        f"{review.likely} of {review.labelled} labels in column {plain(review.column)} are doubted (a weak model "
        f"doubts right ones too: begin with the surest); {review.unlabelled} records have none.\n"
        f"Images: {run / 'labels.html'}\nTable: {run / 'labels.csv'}"
    )
