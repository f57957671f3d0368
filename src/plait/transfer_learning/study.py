"""Transfer: whether going on from a trained model beats starting from nothing, by how many labels there are.

A study's folder holds `study.json` (what was decided, and all figures), the runs under `runs/` and `report.html`. Each
way to begin trains as many steps, or minutes, on the same records of each seed; then it is tested on the new data, and
on the source's own. The same command goes on where a study stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.config import LoraRecipe, Recipe
from plait.core.errors import PlaitError
from plait.core.files import only_writer, read_json, write_json
from plait.core.progress import StudyNews
from plait.core.rng import uniform
from plait.data.dataset import Dataset, SubsetDataset
from plait.data.stores import Location, read_place
from plait.inference.model import PlaitModel, load
from plait.model.checkpoint import find_checkpoint
from plait.training.run import Progress
from plait.training.trainer import train
from plait.transfer_learning.report import verdicts, write_comparison

WAYS = ("scratch", "frozen", "lora", "full")
ALL = "all"
_KEY = 41  # of `uniform`


@dataclass(frozen=True)
class Plan:
    """What is compared; the recipe says steps or minutes, and what the network is where it begins from nothing."""

    recipe: Recipe
    labels: tuple[str, ...] = ("1", "10", "100", ALL)  # records a label
    seeds: int = 3
    ways: tuple[str, ...] = WAYS
    column: str | None = None  # what is answered; the first column of text with few values
    source: str | None = None  # what is read; the first column of media, else of text
    limit: int = 1000  # test records
    old: str | None = None  # the source's own data; None: what its run.json names
    device: str = "auto"


@dataclass
class Task:
    """Naming what one column shows, in one of another's values."""

    dataset: Dataset
    read: str
    answered: str
    labels: list[str]

    @classmethod
    def of(cls, dataset: Dataset, read: str | None, answered: str | None) -> Task:
        """Of a dataset and, where they are named, the columns. Raises PlaitError where there is nothing to name."""
        texts = {name: dataset.texts(name) for name, kind in dataset.columns.items() if kind == "text"}
        for name in (read, answered):
            if name is not None and name not in dataset.columns:
                known = ", ".join(dataset.columns)
                raise PlaitError(f"{dataset.path} has no column '{name}'. Its columns are {known}.")
        train = dataset.indices("train")
        if answered is None:
            few = {name: {values[i] for i in train} - {None} for name, values in texts.items()}
            answered = min((name for name in few if len(few[name]) > 1), key=lambda name: len(few[name]), default=None)
        if answered is None or answered not in texts:
            raise PlaitError(f"{dataset.path} has no column of labels. Name one of text with --column.")
        media = [name for name, kind in dataset.columns.items() if kind != "text" and name != answered]
        others = [name for name in dataset.columns if name != answered]
        if read is None:
            read = next(iter([*media, *others]), None)
        if read is None:
            raise PlaitError(f"{dataset.path} has nothing to read beside '{answered}'.")
        labels = sorted({value for i in train if (value := texts[answered][i]) is not None})
        if len(labels) < 2 or len(labels) > 500:
            raise PlaitError(
                f"Column '{answered}' of {dataset.path} has {len(labels)} values in train; transfer compares answers "
                "among 2 to 500. Name another with --column."
            )
        return cls(dataset, read, answered, labels)

    def present(self, split: str) -> np.ndarray:
        """The records of a split that have both columns."""
        answers = self.dataset.texts(self.answered)
        indices = self.dataset.indices(split)
        if self.dataset.columns[self.read] == "text":
            texts = self.dataset.texts(self.read)
            return np.array([i for i in indices if answers[i] is not None and texts[i] is not None], np.int64)
        pairs = zip(indices, self.dataset.iterate(indices, [self.read]), strict=True)
        return np.array([i for i, r in pairs if answers[i] is not None and self.read in r.parts], np.int64)

    def chosen(self, count: str, seed: int) -> np.ndarray:
        """`count` training records of each label, drawn by the seed."""
        present = self.present("train")
        if count == ALL:
            return present
        order = present[np.argsort(uniform(seed, _KEY, present), kind="stable")]
        answers = self.dataset.texts(self.answered)
        by_label: dict[str | None, list[int]] = {label: [] for label in self.labels}
        for i in order.tolist():
            if len(by_label[answers[i]]) < int(count):
                by_label[answers[i]].append(i)
        return np.sort(np.array([i for indices_of_label in by_label.values() for i in indices_of_label], np.int64))

    def _shown(self, model: PlaitModel, value: str | bytes) -> Any:
        """A part as the model reads it; of an audio clip longer than its window, the beginning."""
        return value if isinstance(value, str) else (self.read, model.modality(self.read).windows(value)[:1])

    def accuracy(self, model: PlaitModel, limit: int, seed: int) -> float:
        """The share of test records whose likeliest label is right."""
        split = "test" if len(self.dataset.indices("test")) else "val"
        present = self.present(split)
        present = np.sort(present[np.argsort(uniform(seed, _KEY, present), kind="stable")][:limit])
        if not len(present):
            raise PlaitError(f"{self.dataset.path} has no test records with {self.read} and {self.answered}.")
        answers = self.dataset.texts(self.answered)
        right = 0
        for start in range(0, len(present), 256):
            part = present[start : start + 256]
            records = self.dataset.iterate(part, [self.read])
            values = [record.parts[self.read] for record in records]
            contexts = [model.context([self._shown(model, value)]) for value in values]
            best = model.score(contexts, self.answered, self.labels).argmax(1)
            right += sum(self.labels[b] == answers[i] for b, i in zip(best, part, strict=True))
        return right / len(present)


def transfer(
    source: str, dataset: Dataset, folder: Path, plan: Plan, tell: Callable[[StudyNews], None]
) -> dict[str, Any]:  # fmt: skip
    """Run a study, or go on with it; returns what `study.json` then holds.

    Raises PlaitError for what the user can mend: data without labels, a source that shares no modality with them,
    another study's folder, fewer records than are asked for.
    """
    with only_writer(folder):
        return _Study(source, dataset, folder, plan, tell).run()


class _Study:
    def __init__(
        self, source: str, dataset: Dataset, folder: Path, plan: Plan, tell: Callable[[StudyNews], None]
    ) -> None:  # fmt: skip
        self.source, self.dataset, self.folder, self.plan, self.tell = source, dataset, folder, plan, tell
        unknown = [way for way in plan.ways if way not in WAYS]
        if unknown:
            raise PlaitError(f"There is no way '{unknown[0]}' to begin. Ways are {', '.join(WAYS)}.")
        wrong = [count for count in plan.labels if count != ALL and not (count.isdigit() and int(count) > 0)]
        if wrong:
            raise PlaitError(f"--labels takes numbers above 0 and 'all', not '{wrong[0]}'.")
        self.task = Task.of(dataset, plan.source, plan.column)
        place = find_checkpoint(source)
        if place is None:
            raise PlaitError(f"{source} is no run or checkpoint. Transfer compares what begins from a run of Plait's.")
        model = load(source, plan.device).plait_model
        if model is None:
            raise PlaitError(f"{source} runs in transformers. Transfer compares what begins from a run of Plait's.")
        shared = set(model.columns.values()) & set(dataset.columns.values())
        if not shared - {"text"} and dataset.columns[self.task.read] != "text":
            raise PlaitError(
                f"{source} knows {', '.join(sorted(set(model.columns.values())))} and {dataset.path} holds "
                f"{', '.join(sorted(set(dataset.columns.values())))}: what is read, {self.task.read}, has nothing in "
                "common with it. Choose a source that has seen such data."
            )
        self.model = model
        # What begins from nothing is fitted as the source is, not to the few records that a run sees.
        self.fitted = {
            name: modality.settings.model_dump(mode="json", exclude={"hf_encoder"})
            for name, modality in model.checkpoint.model.media.items()
        }
        self.old = self._old()
        self.metadata = self._open()

    def _old(self) -> Task | None:
        """What the source could do before, where its data are at hand."""
        facts = Path(self.source) / "run.json"
        name: Location | None = self.plan.old
        if name is None and facts.is_file() and "dataset" in (known := read_json(facts)):
            name = read_place(known["dataset"], facts.parent)
        if name is None:
            self.tell(
                StudyNews(
                    "old abilities", 1, 1, line="What is forgotten is not measured: name the old data with --old."
                )
            )
            return None
        try:
            return Task.of(Dataset.open(name), None, next(iter(self.model.labels), None))
        except PlaitError as error:
            if self.plan.old is not None:
                raise
            self.tell(StudyNews("old abilities", 1, 1, line=f"What is forgotten is not measured: {error}"))
            return None

    def _open(self) -> dict[str, Any]:
        """Begin or go on. Refuses the folder of another study."""
        shards = "".join(shard.sha256 for shard in self.dataset.manifest.shards)
        settings = {
            "source": str(self.source),
            "data": hashlib.sha256(shards.encode()).hexdigest(),
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "read": self.task.read,
            "answered": self.task.answered,
            "limit": self.plan.limit,
        }
        path = self.folder / "study.json"
        if not path.exists():
            facts = {"version": 1, "dataset": str(self.dataset.path), "settings": settings, "rows": []}
            write_json(path, facts)
            return facts
        study: dict[str, Any] = read_json(path)
        different = [key for key, value in settings.items() if study.get("settings", {}).get(key) != value]
        if different:
            raise PlaitError(
                f"{self.folder} holds a study with another {' and another '.join(different)}. Choose another folder "
                "with -o, or delete it."
            )
        return study

    def run(self) -> dict[str, Any]:
        if self.old is not None and "before" not in self.metadata:
            self.tell(StudyNews("old abilities", 0, 1))
            self.metadata["before"] = self.old.accuracy(self.model, self.plan.limit, 0)
            write_json(self.folder / "study.json", self.metadata)
        known = self.model.columns
        if "as_it_is" not in self.metadata and self.task.read in known and known.get(self.task.answered) == "text":
            self.metadata["as_it_is"] = self.task.accuracy(self.model, self.plan.limit, 0)
        del self.model
        jobs = list(product(self.plan.labels, range(self.plan.seeds), self.plan.ways))
        done = {(row["labels"], row["way"], row["seed"]) for row in self.metadata["rows"]}
        for number, (count, seed, way) in enumerate(jobs):
            if (count, way, seed) in done:
                continue
            row = self._one(count, way, seed, number, len(jobs))
            self.metadata["rows"].append(row)
            self._write()
            old = "" if row["old"] is None else f", old {row['old']:.3f}"
            line = f"{count} a label, {way}, seed {seed}: {row['accuracy']:.3f}{old}"
            self.tell(StudyNews("transfer", number + 1, len(jobs), line=line))
        self._write()
        return self.metadata

    def _one(self, count: str, way: str, seed: int, number: int, total: int) -> dict[str, Any]:
        """Train one run and test it; its folder is deleted, but for its log."""
        chosen = self.task.chosen(count, seed)
        if len(chosen) < 2:
            raise PlaitError(f"{self.dataset.path} has {len(chosen)} records to train on; at least 2 are needed.")
        recipe = self._recipe(way, seed, len(chosen))
        folder = self.folder / "runs" / f"{way}-{count}-seed-{seed}"

        def report(progress: Progress) -> None:
            note = f"{way}, {count} a label, seed {seed}: {progress.stage} {progress.done}/{progress.total}"
            self.tell(StudyNews("transfer", number, total, note))

        train(SubsetDataset(self.dataset, {"train": chosen}), folder, recipe, report, self.plan.device)
        model = load(folder, self.plan.device).plait_model
        assert model is not None
        row = {
            "labels": count, "way": way, "seed": seed, "records": len(chosen),
            "steps": model.checkpoint.training["step"],
            "accuracy": self.task.accuracy(model, self.plan.limit, 0),
            "old": None,
        }  # fmt: skip
        if way != "scratch" and self.old is not None:
            row["old"] = self.old.accuracy(model, self.plan.limit, 0)
        for name in ("checkpoints", "cache", "codecs", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        return row

    def _recipe(self, way: str, seed: int, records: int) -> Recipe:
        recipe = self.plan.recipe.model_copy(deep=True)
        recipe.training.seed = seed
        if recipe.training.batch_size and records < recipe.training.batch_size:
            recipe.training.batch_size = max(records, 2)
        if way == "scratch":
            for name, settings in self.fitted.items():
                user_settings = getattr(recipe.model, name, None)
                if name in self.dataset.columns.values() and isinstance(user_settings, dict):
                    setattr(recipe.model, name, {**settings, **user_settings})
            return recipe
        recipe.model.init_from = str(self.source)
        if way == "frozen":
            recipe.training.freeze = ["encoder", "backbone"]
        if way == "lora":
            recipe.training.lora = recipe.training.lora or LoraRecipe()
        return recipe

    def _write(self) -> None:
        self.metadata["verdicts"] = verdicts(self.metadata["rows"], list(self.plan.labels))
        write_json(self.folder / "study.json", self.metadata)
        write_comparison(self.folder / "report.html", self.folder.resolve().name, self.metadata)
