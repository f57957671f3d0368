"""The command that shows everything on digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import plait
from plait.cli.figures import show_figures
from plait.console import DeviceOption, SeedOption, app, err, out, plain, show_manifest
from plait.evaluation.keys import MetricKey

# The metrics that are printed; the others stand in metrics.json.
SHOWN = ("accuracy", "judged_accuracy", "judge_real", "diversity", "near_copies")
SHOWN_SEARCH = "p_at_10"  # between media alone
MEDIA_COLUMNS = ("image", "audio")


@app.command()
def demo(
    run: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps to train for.")] = 1200,
    max_minutes: Annotated[float, typer.Option(help="The most that training may take.")] = 12.0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Handwritten digits, their names in English and Chinese, and spoken names: one model, from files to figures.

    Example: plait demo
    """
    begun = time.monotonic()
    out.print(f"Trains {steps:,} steps: some 4 minutes on two cores, {max_minutes:g} at most.")
    evaluation = plait.demo(
        run, steps=steps, max_minutes=max_minutes, seed=seed, device=device, progress=True,
        tell=lambda text: err.print(f"[yellow]Note:[/yellow] {plain(text)}"),
    )  # fmt: skip
    show_manifest(plait.Run(run).dataset.manifest, run / "data")
    show_figures({key: evaluation[key] for key in evaluation.metric_keys if _is_shown(key)})
    out.print(f"\n{time.monotonic() - begun:.0f} s in all. All figures: {run / 'metrics.json'}")
    out.print(f"Report, with images and audio clips: {evaluation.report}\n\nTry next:")
    out.print(f"  plait draw {run} three -n 16 -o threes.png", f"  plait speak {run} seven -o seven.wav", sep="\n")
    out.print(f"  plait classify {run} {run}/files/images/0003.png")
    audio = next(iter(sorted((run / "files" / "audio").glob("en-*"))), None)
    if audio:
        out.print(f"  plait transcribe {run} {audio} --column en")


def _is_shown(key: MetricKey) -> bool:
    between_media = {key.direction.source, key.direction.target} <= {*MEDIA_COLUMNS}
    is_main = key.main and not key.clean
    return is_main and (key.metric in SHOWN or (key.metric == SHOWN_SEARCH and between_media))
