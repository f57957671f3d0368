"""`plait.demo`: handwritten digits and spoken names, from files to figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from plait.library.datasets import prepare
from plait.library.evaluations import Evaluation, evaluate
from plait.library.runs import train


def demo(
    out: str | Path = "runs/demo",
    *,
    minutes: float = 3.5,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Write the demo's data as ordinary files, prepare them, train a model and evaluate it.

    Args:
        out: the run's folder; files and dataset lie in it too.
        minutes: time to train.
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
    train(folder / "data", folder, task="draw", minutes=minutes, seed=seed, device=device, progress=progress)
    return evaluate(folder, seed=seed, device=device, progress=progress)
