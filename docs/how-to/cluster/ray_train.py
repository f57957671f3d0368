"""Train by Ray Train: Ray places the workers, Plait trains. `pip install -e ".[ray]"` first.

python docs/how-to/cluster/ray_train.py data/photos runs/photos --workers 2 [--gpu] [--recipe recipe.yaml]

The data set and the run's folder must lie where all nodes see them. Started again, a run goes on where it stopped.
Checked on one machine: Ray 2.60, two workers, gloo.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(given: dict[str, Any]) -> None:
    """What each worker does."""
    from plait.core.config import load_recipe
    from plait.data.dataset import Dataset
    from plait.training.distributed import processes
    from plait.training.trainer import Progress, train

    def report(progress: Progress) -> None:
        if progress.losses:
            losses = "  ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
            print(f"{progress.stage} {progress.done}/{progress.total}  {losses}", flush=True)

    with processes() as group:
        recipe = load_recipe(given["recipe"], {"training": {"steps": given["steps"]}})
        train(Dataset.open(given["dataset"]), given["run"], recipe, report, group=group)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    given = parser.parse_args()
    settings = {name: value.resolve() if isinstance(value, Path) else value for name, value in vars(given).items()}
    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(
            name=given.run.name,
            storage_path=str(given.run.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
