"""Histories as a kind of data: how `plait prepare` knows them, and what it then writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from plait.core.config import DataRecipe
from plait.data.dataset import Manifest
from plait.data.files import Tree
from plait.data.prepare import Writer
from plait.data.writing import Progress
from plait.recommend.interactions import find
from plait.recommend.settings import ItemsRecipe
from plait.recommend.write_histories import write_histories


def histories_in(tree: Tree, recipe: DataRecipe) -> Writer | None:
    """What writes the histories of a source; None where it holds none.

    Raises PlaitError where its section data.items asks for histories and there are none.
    """
    settings: ItemsRecipe | None = getattr(recipe, "items")  # noqa: B009 - this feature's own key
    tables = find(tree, settings)
    if tables is None:
        return None
    return partial(_write, tree, *tables, settings or ItemsRecipe())


def _write(
    tree: Tree, interactions: str, items: str | None, settings: ItemsRecipe, folder: Path, seed: int, progress: Progress
) -> Manifest:
    return write_histories(tree, interactions, items, folder, settings, seed, progress)
