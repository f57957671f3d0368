"""Small data measured by folds: every record is asked about once, by a model that has not learnt it.

A tenth of few records tells little: of ten, one answer more is ten points. Two ways, the exact one first. Where the
linear opinion answers alone, what answers is refitted on the other folds, which takes a moment. Where a network
answers, a run like this one is trained on the other folds, in a share of the time that this one had: its figures
are those of the whole procedure, and rather too low than too high. Altogether that takes no longer than the run
itself, unless a number of folds was asked for: what would take longer is left out, and the records of these folds are
not asked about.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plait.classifiers.classifier import Classifier
from plait.classifiers.held_out import stratified_folds
from plait.core.config import SIZES, Recipe, parse_recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.data.dataset import Dataset, SubsetDataset
from plait.data.grouping import group_folds, split_groups
from plait.evaluation.alternatives import fit_alternative
from plait.evaluation.decide import fit_classifiers
from plait.evaluation.examples import Examples, read_examples
from plait.evaluation.few_records import fit_few
from plait.inference.model import PlaitModel, load
from plait.inference.opinions import opinion_scores
from plait.training.parts import training_seconds
from plait.training.trainer import train

FEW = 500  # labelled records below which a classifier is measured by folds
FOLDS = 5
SHARE = 1 / 2  # of the run's minutes, which networks of all folds take together
LEAST_SECONDS = 60.0  # that folds may take, however short the run was
FEWEST_FOLDS = 2  # that are asked about, however long they take
AROUND = 3.0  # seconds that a fold takes beside its training, roughly: reading, fitting, asking
VAL_SHARE = 9  # one in so many of the other folds' records is val
ALL = 2**31
UNKNOWN = -50.0  # log-probability of a label that the other folds do not have

Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]


@dataclass
class OutOfFold:
    """What models that have not learnt them say of records.

    `indices` (N,) are numbers of records, ascending; `scores` (N, labels) log-probabilities; `simple` (N,) the classes
    by the simple alternative, refitted by the same folds; `folds` are those that were asked about, of `of` that there
    are; `seconds` each network was trained for, 0 where none was.
    """

    indices: np.ndarray
    scores: np.ndarray
    simple: np.ndarray
    folds: int
    of: int
    seconds: float = 0.0


def by_folds(
    model: PlaitModel, dataset: Dataset, run: Path, folds: int | None, seed: int, device: str, progress: Progress,
    tell: Tell,
) -> dict[tuple[str, str], OutOfFold]:  # fmt: skip
    """(source, target) -> what is measured by folds. With `folds` networks are trained where they answer, else where
    the run was given a time and not steps; none where there are FEW records or more, or the data have a test set of
    their own. `tell` is called with what is about to be done, and how long that takes.
    """
    measured: dict[tuple[str, str], OutOfFold] = {}
    networks: list[Classifier] = []
    for one in model.checkpoint.classifiers:
        known = set(one.labels)
        count = sum(text in known for text in dataset.texts(one.target))
        if folds is None and (count >= FEW or dataset.manifest.own_splits):
            continue
        if one.mixture.used == ["linear"]:
            measured[one.source, one.target] = _refitted(model, dataset, one, folds or FOLDS, seed)
        else:
            networks.append(one)
    metadata = read_json(run / "run.json")
    recipe = parse_recipe(metadata["recipe"], str(run / "run.json"))
    if recipe.training.steps is None:  # a run that was trained for longer had more than its recipe says
        recipe.training.minutes = training_seconds(metadata) / 60
    if networks and (folds is not None or recipe.training.steps is None):
        bound = None if folds is not None else max(training_seconds(metadata), LEAST_SECONDS)
        measured |= _retrained(model, dataset, networks, recipe, folds or FOLDS, bound, seed, device, progress, tell)
    return measured


def _whole(model: PlaitModel, dataset: Dataset, one: Classifier) -> Examples:
    """All records of a direction, whatever their split."""
    nothing = np.zeros(0, np.int64)
    view = SubsetDataset(dataset, {"train": np.arange(len(dataset), dtype=np.int64), "val": nothing, "test": nothing})
    return read_examples(model, view, one.source, one.target, "train", ALL, 0)


def _groups(dataset: Dataset) -> np.ndarray | None:
    """The number (N,) of each record's group, of those without one each its own; None where there are no groups."""
    names = dataset.groups
    if names is None:
        return None
    number = {name: place for place, name in enumerate(dict.fromkeys(filter(None, names)))}
    return np.array([len(number) + place if name is None else number[name] for place, name in enumerate(names)])


def _folds(dataset: Dataset, examples: Examples, folds: int, seed: int) -> np.ndarray:
    """(N,) the fold of each record: of each label as many in each, or whole groups where there are some; what is a
    duplicate goes where the first one is."""
    groups = _groups(dataset)
    if groups is None:
        fold = stratified_folds(examples.classes, folds, seed)
    else:
        fold = group_folds(groups[examples.indices], folds, seed)
    file = Path(str(dataset.path)) / "duplicates.jsonl"
    if not file.is_file():
        return fold
    place = {dataset.ids[i]: n for n, i in enumerate(examples.indices)}
    first = np.arange(len(examples))

    def root(n: int) -> int:
        while first[n] != n:
            n = int(first[n])
        return n

    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        pair = [place.get(entry[name]["id"]) for name in ("first", "second")]
        if pair[0] is not None and pair[1] is not None:
            low, high = sorted(map(root, pair))  # type: ignore[arg-type]
            first[high] = low
    return fold[[root(n) for n in range(len(examples))]]


def _refitted(model: PlaitModel, dataset: Dataset, one: Classifier, folds: int, seed: int) -> OutOfFold:
    """Linear answers, fitted on the other folds. They are the simple alternative themselves."""
    examples = _whole(model, dataset, one)
    fold = _folds(dataset, examples, folds, seed)
    scores = np.full((len(examples), len(one.labels)), -np.log(len(one.labels)))
    for number in np.unique(fold):
        rest = examples.only(np.flatnonzero(fold != number))
        if len(np.unique(rest.classes)) < 2:
            continue
        here = np.flatnonzero(fold == number)
        fitted = fit_few(replace(one, novelty={}), rest, one.features.bands, seed)
        linear = fitted.linear_scores([examples.inputs[i] for i in here])
        scores[here] = fitted.mixture.log_probabilities({"linear": linear})
    count = len(np.unique(fold))
    return OutOfFold(examples.indices, scores, scores.argmax(1), count, count)


def _retrained(
    model: PlaitModel, dataset: Dataset, classifiers: list[Classifier], recipe: Recipe, folds: int,
    bound: float | None, seed: int, device: str, progress: Progress, tell: Tell,
) -> dict[tuple[str, str], OutOfFold]:  # fmt: skip
    """Runs of the same recipe on the other folds, in a share of its time, as many as `bound` seconds hold."""
    recipe = _shortened(recipe, folds)
    seconds = 60 * (recipe.training.minutes or 0.0)
    begun = time.perf_counter()
    tell(_announced(folds, seconds, bound))
    parts: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    everything = np.arange(len(dataset), dtype=np.int64)
    fold = np.zeros(len(dataset), np.int64)
    examples = _whole(model, dataset, classifiers[0])
    fold[examples.indices] = _folds(dataset, examples, folds, seed)
    groups = _groups(dataset)
    done = 0
    for number in range(folds):
        used = time.perf_counter() - begun
        if bound is not None and done >= FEWEST_FOLDS and used * (done + 1) / done > bound:
            tell(f"Stopped after {done} of {folds} folds and {used:.0f} s; --folds {folds} takes them all.")
            break
        progress(f"a run of {seconds:.0f} s and its answers for each of {folds} folds", number, folds)
        rest, test = everything[fold != number], np.intersect1d(examples.indices, everything[fold == number])
        if groups is None:
            for_val = (
                np.arange(len(rest)) % VAL_SHARE == number % VAL_SHARE
            )  # records lie as their contents' hash has them
        else:
            for_val = split_groups(groups[rest] * 0.618 % 1, splits=(1,)) == 1  # in an order that is not theirs
        view = SubsetDataset(dataset, {"train": rest[~for_val], "val": rest[for_val], "test": test})
        with tempfile.TemporaryDirectory(prefix="plait-fold-") as scratch:
            folder = Path(scratch) / "run"
            train(view, folder, recipe, lambda progress_row: None, device)
            other = load(folder, device).plait_model
            if other is None:
                raise PlaitError(f"{folder} is no model that plait trained.")
            for one in fit_classifiers(other, view, seed):
                answers = _asked(other, view, one, model.labels[one.target])
                if answers is not None:
                    parts.setdefault((one.source, one.target), []).append(answers)
        done += 1
    progress(f"a run of {seconds:.0f} s and its answers for each of {done} folds", done, done)
    asked_pairs = {(one.source, one.target) for one in classifiers}
    return {key: _joined(answers, done, folds, seconds) for key, answers in parts.items() if key in asked_pairs}


def _announced(folds: int, seconds: float, bound: float | None) -> str:
    """What is about to be done, and about how long it takes."""
    expected = folds * (seconds + AROUND)
    limit = (
        f"; after {FEWEST_FOLDS} folds it stops where one more would end after {bound:.0f} s"
        if bound is not None
        else ""
    )
    return (
        f"So few records are measured by folds: {folds} times a run like this one learns from the others, in "
        f"{seconds:.0f} s each, and is asked about the rest. That takes about {expected:.0f} s{limit}. To measure on "
        "test alone instead: --folds 0"
    )


def _shortened(recipe: Recipe, folds: int) -> Recipe:
    """The recipe of one fold: the run's minutes or steps, in a share of the time."""
    training = recipe.training.model_dump()
    seconds = 60 * (recipe.training.max_minutes or recipe.training.minutes or SIZES[recipe.model.size].minutes)
    minutes = seconds * SHARE / folds / 60
    training |= {"minutes": minutes, "max_minutes": minutes if recipe.training.steps is not None else None}
    return parse_recipe({**recipe.model_dump(), "training": training}, "the recipe of a fold")


def _asked(
    model: PlaitModel, view: Dataset, one: Classifier, labels: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Numbers (N,), log-probabilities (N, labels) in the order of `labels`, and the simple alternative's classes (N,)
    of the view's test records; None where it has none that the model knows."""
    test = read_examples(model, view, one.source, one.target, "test", ALL, 0)
    if not len(test):
        return None
    own = one.mixture.log_probabilities(opinion_scores(model, one, test.inputs, one.mixture.used))
    place = [labels.index(label) for label in one.labels]
    scores = np.full((len(test), len(labels)), UNKNOWN)
    scores[:, place] = own
    train = read_examples(model, view, one.source, one.target, "train", ALL, 0)
    plain = fit_alternative(one.features.kind, train.inputs, train.classes, one.labels, one.features.bands)
    return test.indices, scores, np.array(place)[plain.linear_scores(test.inputs).argmax(1)]


def _joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], folds: int, of: int, seconds: float) -> OutOfFold:
    indices = np.concatenate([part[0] for part in parts])
    order = np.argsort(indices)
    scores, simple = (np.concatenate([part[n] for part in parts])[order] for n in (1, 2))
    return OutOfFold(indices[order], scores, simple, folds, of, seconds)
