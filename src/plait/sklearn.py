"""A scikit-learn classifier over Plait: images, audio clips or texts in, labels and probabilities out.

from plait.sklearn import PlaitClassifier
from sklearn.model_selection import cross_val_score

cross_val_score(PlaitClassifier(minutes=4), images, labels, cv=3)
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from plait.core.errors import PlaitError
from plait.library.datasets import prepare
from plait.library.training import train

INPUT, LABEL = "input", "label"  # the columns of the dataset that `fit` makes
VAL_SHARE = 0.1  # of the training data, by which training stops and probabilities are calibrated


class PlaitClassifier(ClassifierMixin, BaseEstimator):
    """Classifies images, audio clips or texts with a model that is trained from scratch in a time budget.

    Args:
        minutes: the time to train; ignored where `steps` are given.
        steps: steps to train for, instead of minutes.
        size: tiny, small, base or large.
        recipe: a recipe: a YAML file, a name of `plait recipes`, or a dictionary.
        init_from: a run, a checkpoint, or a Hugging Face name or folder to begin from.
        device: auto, cpu, cuda or mps.
        folder: where the run is kept; in a temporary folder, as long as the classifier lives, if left out.
        random_state: seed of weights, order and augmentation; 0 if None.
        verbose: whether to show progress.

    Attributes:
        classes_: the labels (C,), sorted.
        kind_: what the inputs are: image, audio or text.
        run_: the folder of the run.

    Inputs are a list, or an array of images (N, H, W) or (N, H, W, C), or a pandas column: PIL images, arrays, paths of
    media files, bytes, (waveform, rate), or texts; all of one kind.
    """

    def __init__(
        self,
        minutes: float = 4.0,
        steps: int | None = None,
        size: str = "tiny",
        recipe: Any = None,
        init_from: str | None = None,
        device: str = "auto",
        folder: str | None = None,
        random_state: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.minutes = minutes
        self.steps = steps
        self.size = size
        self.recipe = recipe
        self.init_from = init_from
        self.device = device
        self.folder = folder
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.non_deterministic = True  # a time budget is
        tags.no_validation = True
        return tags

    def fit(self, X: Sequence[Any], y: Sequence[Any]) -> PlaitClassifier:  # noqa: N803
        """Train on inputs and their labels; a tenth of each label is kept to validate by.

        Raises PlaitError where inputs are of several kinds or cannot be read, and ValueError for fewer than two labels.
        """
        inputs, labels = list(X), np.asarray(list(y))
        if len(inputs) != len(labels):
            raise ValueError(f"X has {len(inputs)} inputs, y {len(labels)} labels.")
        if labels.ndim != 1:
            raise ValueError(f"y must be one label an input, not an array of shape {labels.shape}.")
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"There must be two classes at least to learn from; y has {len(self.classes_)}.")
        self._names = _names(self.classes_)
        seed = 0 if self.random_state is None else int(self.random_state)
        rows = [{INPUT: value, LABEL: self._names[code]} for value, code in zip(inputs, codes, strict=True)]
        held = _held_out(codes, seed)
        splits = {"train": [row for row, val in zip(rows, held, strict=True) if not val]}
        if held.any():
            splits["val"] = [row for row, val in zip(rows, held, strict=True) if val]
        self._scratch = tempfile.TemporaryDirectory(prefix="plait-") if self.folder is None else None
        folder = Path(self._scratch.name if self._scratch else str(self.folder))
        progress = bool(self.verbose)
        dataset = prepare(splits, folder / "data", seed=seed, near_duplicates=False, progress=progress)
        if dataset.rejects:
            first = dataset.rejects[0]
            warnings.warn(f"{len(dataset.rejects)} inputs cannot be used, the first: {first.reason}", stacklevel=2)
        if INPUT not in dataset.columns:
            raise PlaitError(f"The inputs are of several kinds: {', '.join(dataset.columns)}. Give one kind.")
        self.kind_ = dataset.columns[INPUT]
        budget = {"steps": self.steps} if self.steps is not None else {"minutes": self.minutes}
        run = train(
            dataset, folder / "run", recipe=self.recipe, task="recognise", size=self.size,
            init_from=self.init_from, seed=seed, device=self.device, progress=progress, **budget,
        )  # fmt: skip
        self.run_ = run.folder
        self._model = run.model(self.device)
        return self

    def predict_proba(self, X: Sequence[Any]) -> np.ndarray:  # noqa: N803
        """The probability of each label, (N, C), columns in the order of `classes_`."""
        check_is_fitted(self)
        places = {name: place for place, name in enumerate(self._names)}
        probabilities = np.zeros((len(X), len(self.classes_)))
        inputs = [self._input(value) for value in X]
        for row, predictions in zip(
            probabilities, self._loaded().classify(inputs, column=LABEL, top=None), strict=True
        ):
            for label, probability in predictions:
                row[places[label]] = probability
        return probabilities

    def predict(self, X: Sequence[Any]) -> np.ndarray:  # noqa: N803
        """The likeliest label of each input, (N,)."""
        check_is_fitted(self)
        chosen: np.ndarray = self.classes_[self.predict_proba(X).argmax(1)]
        return chosen

    def _input(self, value: Any) -> Any:
        """An input as the model reads it, of the kind that it was trained on."""
        if self.kind_ == "text":
            return INPUT, str(value)
        return Path(value) if isinstance(value, str) else value

    def _loaded(self) -> Any:
        if self._model is None:
            from plait.inference.model import load

            self._model = load(self.run_, self.device)
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        """Everything, the checkpoint's files in place of the model, so that a copy works in another process."""
        state = dict(super().__getstate__())
        if state.get("_model") is not None:
            best = (Path(self.run_) / "checkpoints" / "best").resolve()
            state["_files"] = {path.name: path.read_bytes() for path in best.iterdir() if path.is_file()}
        return {**state, "_model": None, "_scratch": None} if "_model" in state else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop("_files", None)
        super().__setstate__(state)
        if files is not None:
            self._scratch = tempfile.TemporaryDirectory(prefix="plait-")
            self.run_ = Path(self._scratch.name)
            for name, data in files.items():
                (self.run_ / name).write_bytes(data)


def _names(classes: np.ndarray) -> list[str]:
    """Labels as texts that differ and are not blank."""
    names = [str(label).strip() for label in classes.tolist()]
    if len(set(names)) < len(names) or not all(names):
        return [f"class {place}" for place in range(len(classes))]
    return names


def _held_out(codes: np.ndarray, seed: int) -> np.ndarray:
    """Which records (N,) are kept for validation: a tenth of each label, none of labels with one record."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(codes), bool)
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        count = min(round(len(members) * VAL_SHARE), len(members) - 1)
        held[rng.permutation(members)[: max(count, 1 if len(members) > 4 else 0)]] = True
    return held
