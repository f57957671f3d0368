"""`plait.demo`: handwritten digits and spoken names, from files to figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from plait.library.datasets import prepare
from plait.library.evaluations import Evaluation, evaluate
from plait.library.training import train

CODEC_STEPS = 420  # of each codec


def demo(
    out: str | Path = "runs/demo",
    *,
    steps: int = 1200,
    max_minutes: float = 12.0,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Write the demo's data as ordinary files, prepare them, train a model and evaluate it.

    It trains for a number of steps, so that a machine that is slower or busy takes longer and is as good.

    Args:
        out: the run's folder; files and dataset lie in it too.
        steps: steps to train for.
        max_minutes: the most that training may take; steps that it does not hold are left out, which is told before.
            Where making codecs took more than a third of it, steps have two thirds of it all the same.
        seed: of weights, order, augmentation and samples.
        device: auto, cpu, cuda or mps.
        progress: as in `plait.train`.
        tell: called with what is to be known, as that there is no speech synthesis here.

    Returns:
        The figures on the test split.
    """
    from plait.data.demo_data import write_demo

    folder = Path(out)
    if not (folder / "data" / "manifest.json").is_file():
        write_demo(folder / "files", tell or (lambda text: None))
        prepare(folder / "files", folder / "data", progress=progress)
    recipe = {
        "training": {
            "task": "draw", "steps": steps, "codec_steps": CODEC_STEPS, "max_minutes": max_minutes, "validations": 10
        }
    }  # fmt: skip
    train(folder / "data", folder, recipe=recipe, seed=seed, device=device, progress=progress)
    return evaluate(folder, seed=seed, device=device, progress=progress)
