"""`plait.evaluate`: a run measured on held-out data, beside chance and a simple baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.core.frames import data_frame, html_table
from plait.core.progress import ProgressBar
from plait.data.dataset import Dataset
from plait.evaluation.findings import AnsweredRecord, Findings
from plait.evaluation.keys import TIMING, Direction, MetricKey, Metrics
from plait.evaluation.metrics import interval
from plait.library.model_cards import write_card
from plait.library.runs import Run
from plait.library.tables import encode_table
from plait.reports.metric_labels import headline_keys, metric_labels
from plait.reports.report import read_run, write_metrics, write_report
from plait.training.parts import training_seconds

if TYPE_CHECKING:
    from plait.evaluation.folds import OutOfFold
    from plait.evaluation.label_review import LabelReview


class Metric(NamedTuple):
    """One figure.

    Attributes:
        value: the figure; None where it could not be measured.
        stderr: its bootstrap standard error.
        chance: what guessing would have.
        baseline: what the simple alternative has.
        n: records that it is of.
        low, high: its 95 % interval; None where there is no standard error.
    """

    value: float | None
    stderr: float | None
    chance: float | None
    baseline: float | None
    n: int | None
    low: float | None = None
    high: float | None = None

    def __float__(self) -> float:
        return float("nan") if self.value is None else float(self.value)


class Evaluation(Mapping[str, Metric]):
    """Figures by "TASK/FROM-TO/METRIC", as `evaluation["recognition/image-label/accuracy"].value`.

    Attributes:
        folder: the run's folder, in which `metrics.json` and `report.html` lie.
        split: what was measured on.
        notes: what to know about the figures.
        verdict: one sentence and a next step; None where there is nothing to compare.
    """

    def __init__(self, folder: Path, split: str, metrics: Metrics, findings: Findings) -> None:
        self.folder, self.split, self.findings = folder, split, findings
        self.notes = list(findings.notes)
        self.verdict = findings.verdict
        self._metrics = metrics

    def __getitem__(self, name: str | MetricKey) -> Metric:
        metric = self._metrics[name]
        return Metric(*(metric.get(field) for field in Metric._fields))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return map(str, self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    @property
    def metric_keys(self) -> list[MetricKey]:
        """The names of all figures, in their parts: task, direction, metric."""
        return list(self._metrics)

    @property
    def report(self) -> Path:
        """The page with all figures, images and audio clips."""
        return self.folder / "report.html"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Everything as plain dictionaries, as `metrics.json` holds it."""
        return {name: self[name]._asdict() for name in self}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row a figure, indexed by its name. Raises PlaitError where pandas is not installed."""
        columns = {field: [getattr(self[name], field) for name in self] for field in Metric._fields}
        return data_frame(columns, list(self), "metric")

    def headline_keys(self) -> list[MetricKey]:
        """The names of the main figures."""
        return headline_keys(self._metrics)

    def headlines(self) -> dict[str, dict[str, Any]]:
        """The main figures, as `to_dict` has them."""
        return {str(key): self[key]._asdict() for key in self.headline_keys()}

    def main(self) -> list[str]:
        """The names of the figures of whole tasks, without those of single labels and times."""
        return [str(key) for key in self._metrics if key.main]

    def __repr__(self) -> str:
        return f"Evaluation({str(self.folder)!r}, split={self.split!r}, {len(self)} figures)"

    def _repr_html_(self) -> str:
        rows = [[name, *map(_shown, self[name])] for name in self.main()]
        return html_table(["figure", "value", "±", "chance", "baseline", "n"], rows, f"{self.folder}, {self.split}")


def _shown(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


ALTERNATIVES = ("quick", "all")


def evaluate(
    run: Run | str | Path,
    *,
    data: Dataset | str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    made: int | None = None,
    reference_seconds: float = 15.0,
    folds: int | None = None,
    alternatives: str = "quick",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: bool | None = None,
) -> Evaluation:
    """Measure a run on held-out data; writes `metrics.json` and `report.html` into its folder.

    Args:
        run: a Run, or its folder.
        data: another dataset than the run's own.
        split: train, val or test; if left out test, or val where the run's own data have no test records.
        limit: records a task, at most.
        made: images, and clips, to make and judge at most, over all columns that ask for them; 200 if left out.
        reference_seconds: time to train the classifier that judges drawings and speech.
        folds: measure what recognises labels on all records, each asked about by a model that has not learnt it, in so
            many folds; networks take half of the run's minutes for that. If left out, 5 where fewer than 500
            records have labels and the data name no splits themselves, fewer where these would take longer than the
            run did; 0 for none.
        alternatives: "quick" are those that take little beside the run; "all" also fits a small CNN on labelled images
            or audio for as long as the run was trained, and keeps it for the next time, by the content of the data.
        seed: of samples and of what is written.
        device: auto, cpu, cuda or mps.
        precision: as in `plait.load`.
        progress: as in `plait.train`.

    Returns:
        The figures, each with its standard error, chance and a simple baseline.

    Raises PlaitError where the split is empty, the dataset is not there or its columns are not the model's.
    """
    from plait.evaluation.folds import by_folds
    from plait.evaluation.further import measure_dual_encoder, measure_further
    from plait.evaluation.heads import measure_head
    from plait.hf.dual_encoder import DualEncoder
    from plait.hf.heads import HeadModel
    from plait.hf.pretrained import Pretrained
    from plait.inference.model import load

    folder = run.folder if isinstance(run, Run) else Path(run).expanduser()
    own = data is None
    if folds is not None and (folds < 0 or folds == 1):
        raise PlaitError(f"folds is {folds}: it must be at least 2, or 0 for none.")
    if made is not None and made < 1:
        raise PlaitError(f"made is {made}: it must be at least 1.")
    if alternatives not in ALTERNATIVES:
        raise PlaitError(f"There are no alternatives '{alternatives}'. Known are {' and '.join(ALTERNATIVES)}.")
    if folds and not (own and split in (None, "test")):
        raise PlaitError("Folds are made of all records of the run's own data: leave --split and --data out.")
    if data is None:
        data = Run(folder).dataset_path
    dataset = data if isinstance(data, Dataset) else Dataset.open(data)
    loaded = load(folder, device, precision)
    measured = _measured_split(dataset, own, split)
    if isinstance(loaded, HeadModel):
        metrics, findings = measure_head(loaded, dataset, measured.name, limit)
        return _kept(folder, dataset, measured, metrics, findings)
    if isinstance(loaded, DualEncoder):
        with ProgressBar(progress) as bar:
            metrics, findings = measure_dual_encoder(loaded, dataset, measured.name, limit, bar)
        return _kept(folder, dataset, measured, metrics, findings)
    if isinstance(loaded, Pretrained):
        with ProgressBar(progress) as bar:
            metrics, findings = measure_further(loaded, dataset, measured.name, limit, bar)
        return _kept(folder, dataset, measured, metrics, findings)
    model = loaded.plait_model
    if model is None:
        raise PlaitError(f"{folder} is no model that plait trained; evaluation needs a run.")
    with ProgressBar(progress) as bar:
        begun = time.perf_counter()
        by_fold = measured.own_default and folds != 0
        fold_metrics = by_folds(model, dataset, folder, folds, seed, device, bar, bar.message) if by_fold else {}
        fold_seconds = time.perf_counter() - begun
        seconds = training_seconds(Run(folder).metadata) if alternatives == "all" else None
        if fold_metrics:  # which are of all records, so that val takes no place
            measured = replace(measured, name="test", in_place_of_test=False)
        metrics, findings = _measure(
            model,
            dataset,
            measured.name,
            {"records": limit, "made": made},
            reference_seconds,
            seconds,
            seed,
            bar,
            fold_metrics,
        )
    if fold_metrics:
        metrics.keep(MetricKey(TIMING, Direction("folds"), "seconds"), fold_seconds)
    return _kept(folder, dataset, measured, metrics, findings)


@dataclass(frozen=True)
class MeasuredSplit:
    """The split that figures are of.

    Attributes:
        name: train, val or test.
        own: Whether it is of the run's own data.
        in_place_of_test: Whether it is val since test, which was meant, has no records.
    """

    name: str
    own: bool
    in_place_of_test: bool = False

    @property
    def own_test(self) -> bool:
        """Whether the figures are of the run's own test records."""
        return self.own and self.name == "test"

    @property
    def own_default(self) -> bool:
        """Whether test of the run's own data was meant: folds of all records may be made then."""
        return self.own_test or self.in_place_of_test


def _measured_split(dataset: Dataset, own: bool, asked: str | None) -> MeasuredSplit:
    """The split to measure: the one that was asked for, else test, or val where a run's own data hold nothing out but
    that.

    Args:
        dataset: What is measured on.
        own: Whether these are the run's own data.
        asked: The split that was asked for, if any.
    """
    if asked is not None:
        return MeasuredSplit(asked, own)
    if own and dataset.manifest.kind == "records" and len(dataset.indices("val")) and not len(dataset.indices("test")):
        return MeasuredSplit("val", own, in_place_of_test=True)
    return MeasuredSplit("test", own)


NO_TEST = (
    "test has no records, so these are the figures of val, which also chose the checkpoint: they are rather too good. "
    "More data leave some for test."
)


def _kept(folder: Path, dataset: Dataset, split: MeasuredSplit, metrics: Metrics, findings: Findings) -> Evaluation:
    """Figures, answers and report written into a run's folder; its card too where they are of its own test records."""
    if split.in_place_of_test:
        findings.notes.insert(0, NO_TEST)
    add_intervals(metrics)
    write_metrics(folder / "metrics.json", metrics)
    if findings.answers:
        write_atomic(folder / "answers.csv", _answer_table(findings.answers))
    write_report(folder / "report.html", metrics, findings, read_run(folder, dataset.path))
    if split.own_test:
        write_card(folder, metrics)
    return Evaluation(folder, split.name, metrics, findings)


def _answer_table(answers: list[AnsweredRecord]) -> bytes:
    """All answers as CSV: wrong ones first, the surest of them first."""
    ordered = sorted(answers, key=lambda one: (one.direction, one.truth == one.answer, -one.probability))
    rows = [
        {
            "direction": one.direction, "record": one.record, "truth": one.truth, "answer": one.answer,
            "probability": round(one.probability, 4), "right": one.truth == one.answer,
        }
        for one in ordered
    ]  # fmt: skip
    return encode_table(rows, ".csv")


def add_intervals(metrics: Metrics) -> None:
    """The 95 % interval of every figure that has a standard error."""
    for key, metric in metrics.items():
        kind = metric_labels().meaning.get(key.metric, ("", "number", ""))[1]
        value, error = metric.get("value"), metric.get("stderr")
        if value is not None and error is not None and math.isfinite(value) and math.isfinite(error):
            metric["low"], metric["high"] = interval(value, error, metric.get("n"), kind == "share")


def _measure(
    model: Any,
    dataset: Dataset,
    split: str,
    limits: dict[str, int | None],
    reference_seconds: float,
    alternative_seconds: float | None,
    seed: int,
    bar: ProgressBar,
    out_of_fold: dict[tuple[str, str], OutOfFold],
) -> tuple[Metrics, Findings]:
    """The figures of a model, and what the report shows beside them; `limits` that are None are as always."""
    from plait.evaluation.tasks import Limits
    from plait.evaluation.tasks import evaluate as measure

    given = {name: value for name, value in limits.items() if value is not None}
    return measure(
        model, dataset, split, seed=seed, limits=Limits(**given), reference_seconds=reference_seconds,
        alternative_seconds=alternative_seconds, progress=bar, out_of_fold=out_of_fold,
    )  # fmt: skip


def label_review(
    run: Run | str | Path,
    data: Dataset | str | Path | None = None,
    *,
    column: str | None = None,
    most: int = 200,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
) -> LabelReview:
    """Which labels are likely wrong, and which records to label next; writes `labels.html` and `labels.csv` into the
    run's folder.

    Args:
        run: a Run, or its folder.
        data: another dataset than the run's own.
        column: the column of labels; the first if left out.
        most: entries of each list, at most.
        seed: of what is drawn.
        device: auto, cpu, cuda or mps.
        progress: as in `plait.train`.

    Raises PlaitError where the run decides about no labels that the dataset holds.
    """
    from plait.evaluation.label_review import review_labels
    from plait.inference.model import load
    from plait.reports.label_review import review_page, review_table

    folder = run.folder if isinstance(run, Run) else Path(run).expanduser()
    own_data = data is None
    if data is None:
        data = Run(folder).dataset_path
    dataset = data if isinstance(data, Dataset) else Dataset.open(data)
    model = load(folder, device).plait_model
    if model is None:
        raise PlaitError(f"{folder} is no model that plait trained; labels are reviewed by a run.")
    with ProgressBar(progress) as bar:
        review = review_labels(model, dataset, column, own=own_data, most=most, seed=seed, progress=bar)
    write_atomic(folder / "labels.html", review_page(review, model, dataset))
    write_atomic(folder / "labels.csv", review_table(review))
    return review
