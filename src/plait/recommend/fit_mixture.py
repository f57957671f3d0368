"""Once a run of histories is trained: what followed what is counted, and weighed against the network on val."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from plait.core.config import Recipe
from plait.data.dataset import Dataset
from plait.inference.model import load
from plait.model.checkpoint import add_fitted
from plait.recommend.feature import FEATURE
from plait.recommend.mixture import Followed, fit_followed
from plait.recommend.model import RecommendationModel
from plait.recommend.next_item import NextItem, next_item_scorer
from plait.recommend.ranking import Targets, targets_of, training_histories
from plait.recommend.write_histories import VAL, read_histories


def fit_mixture(folder: Path, dataset: Dataset, recipe: Recipe) -> list[str] | None:
    """Fit what a run's best checkpoint lacks, store it there, and return what to tell; None for a run of other data.

    A catalogue whose items are written in several codes is answered by the network alone.
    """
    if dataset.manifest.kind != FEATURE.name:
        return None
    model = cast(RecommendationModel, load(folder).plait_model)
    followed: Followed | None = model.checkpoint.fitted.get(FEATURE.name)
    if followed is None:
        network = next_item_scorer(model.checkpoint.model, model.device)
        if not isinstance(network, NextItem):
            return None
        histories, count = read_histories(dataset), len(model.catalogue)
        seed = int(model.checkpoint.training.get("seed", 0))
        asked = _known(targets_of(histories, (VAL,)), count)
        followed = fit_followed(network.log_chances, training_histories(histories, count), asked, seed)
        assert model.folder is not None
        add_fitted(model.folder.resolve(), FEATURE.name, followed)
    return [followed.describe()]


def _known(targets: Targets, count: int) -> Targets:
    """Those among the first `count` items, after what the histories have of these; the others joined later."""
    histories = [history[history < count] for history in targets.histories]
    asked = np.array([len(history) > 0 for history in histories], bool) & (targets.items < count)
    return Targets(targets.users, targets.items, histories).only(asked)
