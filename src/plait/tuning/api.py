"""`plait.tune`: find better settings by trials, and whether they beat the default on fresh seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.config import Recipe, as_recipe
from plait.core.frames import data_frame, html_table
from plait.core.progress import ProgressBar, StudyNews
from plait.data.dataset import Dataset


class TuningStudy:
    """What a study of trials found.

    Attributes:
        folder: the study's folder.
        facts: everything that `study.json` holds.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state: complete, pruned, failed."""
        return dict(self.facts["counts"])

    @property
    def best_trial(self) -> int:
        """The number of the best trial."""
        return int(self.facts["best"]["number"])

    @property
    def best_value(self) -> float:
        """Its objective on val."""
        return float(self.facts["best"]["value"])

    @property
    def best_params(self) -> dict[str, Any]:
        """Its settings, by the fields that were tuned."""
        return dict(self.facts["best"]["params"])

    @property
    def verdict(self) -> str:
        """Whether the best beats the default on fresh seeds, as a sentence."""
        return str(self.facts["verdict"]["text"])

    @property
    def recipe(self) -> Path:
        """The best recipe, a YAML file."""
        return self.folder / "best.yaml"

    @property
    def report(self) -> Path:
        """The page with all trials."""
        return self.folder / "report.html"

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row a trial. Raises PlaitError where pandas is not installed."""
        rows = self.facts["trials"]
        names = list(dict.fromkeys(name for row in rows for name in row["params"]))
        columns: dict[str, list[Any]] = {"state": [row["state"] for row in rows]}
        columns["value"] = [row["value"] for row in rows]
        columns |= {name: [row["params"].get(name) for row in rows] for name in names}
        return data_frame(columns, [row["number"] for row in rows], "trial")

    def __repr__(self) -> str:
        return f"TuningStudy({str(self.folder)!r}, best_value={self.best_value:.4f}, best_params={self.best_params})"

    def _repr_html_(self) -> str:
        rows = [[name, value] for name, value in self.best_params.items()]
        rows += [["value on val", f"{self.best_value:.4f}"], ["verdict", self.verdict]]
        return html_table(["best trial", str(self.best_trial)], rows, str(self.folder))


def tune(
    dataset: Dataset | str | Path,
    out: str | Path,
    *,
    over: Sequence[str] = ("learning_rate", "batch_size"),
    trials: int = 20,
    minutes: float | None = None,
    steps: int | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    size: str | None = None,
    objective: str = "loss",
    processes: int = 1,
    seeds: int = 3,
    storage: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> TuningStudy:
    """Find better settings by trials. Killed at any time, the same call goes on; more trials go on too.

    Args:
        dataset: a prepared dataset with a val split, or its folder.
        out: the study's folder.
        over: what to tune: learning_rate, batch_size, width, layers, dropout, weight_decay, warmup, cond_dropout,
            weights, guards; with a range as "learning_rate=0.0001:0.01".
        trials: recipes to try, the default one first.
        minutes: the time of each trial.
        steps: the steps of each trial, instead of minutes.
        recipe: the default recipe.
        size: tiny, small, base or large.
        objective: what is made small on val: loss, or text, image, audio, contrastive.
        processes: trials at once on this machine.
        seeds: fresh seeds on which the best meets the default.
        storage: a database for many machines, postgresql://HOST/NAME; a file in the study's folder if left out.
        seed: of the study and of its trials.
        device: auto, cpu, cuda or mps.
        progress: True for bars, or lines where there is no terminal; None for bars in terminals and notebooks alone.

    Raises PlaitError for what the user can mend.
    """
    from plait.tuning.study import Plan
    from plait.tuning.study import tune as run_study

    training = {"minutes": minutes, "steps": steps, "seed": seed}
    settings = as_recipe(recipe, {"model": {"size": size}, "training": training})
    fields = [over] if isinstance(over, str) else list(over)
    plan = Plan(settings, fields, objective, trials, seeds, processes, device)
    opened = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    with ProgressBar(progress) as bar:

        def show(news: StudyNews) -> None:
            if news.line:
                bar.message(news.line)
            bar(news.stage, news.done, news.total, news.note)

        return TuningStudy(Path(out), run_study(opened, Path(out), plan, show, storage))
