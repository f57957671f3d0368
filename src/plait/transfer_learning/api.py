"""`plait.transfer`: whether going on from a trained model beats starting from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.config import Recipe, as_recipe, parse_recipe
from plait.core.files import read_json
from plait.core.frames import data_frame, html_table
from plait.core.progress import ProgressBar, StudyNews
from plait.data.dataset import Dataset

_PAYS = {True: "pays", False: "costs", None: "not told apart from scratch"}


class TransferStudy:
    """What a comparison found.

    Attributes:
        folder: the study's folder.
        facts: everything that `study.json` holds.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    @property
    def source_accuracy(self) -> float | None:
        """Accuracy of the source as it is, without any of the new records; None where it cannot answer."""
        value = self.facts.get("as_it_is")
        return None if value is None else float(value)

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """For each number of labels and each way: the gain over scratch, its standard error, and whether it pays."""
        return list(self.facts["verdicts"])

    @property
    def report(self) -> Path:
        """The page with curves and figures."""
        return self.folder / "report.html"

    def lines(self) -> list[str]:
        """The verdicts as sentences."""
        lines = []
        for verdict in self.verdicts:
            error = "" if verdict["standard_error"] is None else f" ± {verdict['standard_error'] * 100:.1f}"
            gain = f"{verdict['gain'] * 100:+.1f}{error} points"
            lines.append(f"{verdict['labels']} a label, {verdict['way']}: {gain}, {_PAYS[verdict['pays']]}")
        return lines

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row a run. Raises PlaitError where pandas is not installed."""
        names = ("labels", "way", "seed", "accuracy", "old")
        return data_frame({name: [row[name] for row in self.facts["rows"]] for name in names})

    def __repr__(self) -> str:
        return f"TransferStudy({str(self.folder)!r}, {len(self.facts['rows'])} runs)"

    def _repr_html_(self) -> str:
        return html_table(["verdicts"], [[line] for line in self.lines()], str(self.folder))


def transfer(
    source: str | Path,
    dataset: Dataset | str | Path,
    out: str | Path,
    *,
    labels: Sequence[str | int] = ("1", "10", "100", "all"),
    ways: Sequence[str] = ("scratch", "frozen", "lora", "full"),
    seeds: int = 3,
    minutes: float | None = None,
    steps: int | None = None,
    read: str | None = None,
    column: str | None = None,
    old: str | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    limit: int = 1000,
    device: str = "auto",
    progress: bool | None = None,
) -> TransferStudy:
    """Compare beginning from nothing with going on from a trained model. The same call goes on where it stopped.

    Args:
        source: a trained run to go on from.
        dataset: a prepared dataset with a column of labels.
        out: the study's folder.
        labels: training records a label; "all" for all.
        ways: what is compared: scratch, frozen, lora, full.
        seeds: runs of each.
        minutes: the time of each run.
        steps: the steps of each run, instead of minutes.
        read: the column that is read; the first medium if left out.
        column: the column of labels; the one with the fewest if left out.
        old: the source's own data, by which forgetting is measured.
        recipe: the recipe; the source's if left out.
        limit: test records, at most.
        device: auto, cpu, cuda or mps.
        progress: as in `plait.train`.

    Raises PlaitError for data without labels, and for a source that shares no modality with them.
    """
    from plait.transfer_learning.study import Plan
    from plait.transfer_learning.study import transfer as compare

    settings = _recipe(Path(source) / "run.json", recipe, {"minutes": minutes, "steps": steps})
    plan = Plan(settings, tuple(map(str, labels)), seeds, tuple(ways), column, read, limit, old, device)
    opened = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    with ProgressBar(progress) as bar:

        def show(news: StudyNews) -> None:
            bar(news.stage, news.done, news.total, news.note)
            if news.line:
                bar.message(news.line)

        return TransferStudy(Path(out), compare(str(source), opened, Path(out), plan, show))


def _recipe(facts: Path, recipe: Recipe | str | Path | Mapping[str, Any] | None, budget: dict[str, Any]) -> Recipe:
    """The recipe that is asked for, else the source's own, beginning from nothing."""
    if recipe is not None or not facts.is_file():
        return as_recipe(recipe, {"training": budget})
    known = read_json(facts)["recipe"]
    known["model"]["init_from"] = None
    known["training"] |= {**budget, "replay": {}, "freeze": [], "lora": None}
    return parse_recipe(known, str(facts))
