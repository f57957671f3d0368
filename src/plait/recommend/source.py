"""Histories as the data of a run: what is known of the items, how histories become samples, and how well items rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes

from plait.core.config import Recipe
from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.data.dataset import Dataset
from plait.modalities.item import (
    FULL,
    MOST,
    Bag,
    Item,
    ItemCodes,
    ItemCodesSettings,
    ItemSettings,
    ItemsSettings,
    Known,
    bag_of,
    content_of,
    fit_codes,
    item_codes,
    item_rows,
    sizes_of,
)
from plait.modalities.text import Text
from plait.model.multimodal import Multimodal
from plait.recommend.catalogue import Catalogue
from plait.recommend.catalogue import Item as CatalogueItem
from plait.recommend.feature import FEATURE
from plait.recommend.model import Embed, embedder
from plait.recommend.sampler import HistorySampler, HistorySplit, history_split, ranking
from plait.recommend.settings import ItemModelRecipe
from plait.recommend.write_histories import TRAIN, Histories, read_catalogue, read_histories
from plait.training.batches import Sampler
from plait.training.source import Score

DRAWS = 8192  # items that stand for all where they are too many
VALIDATED = 512  # histories in a step of validation

Contents = Callable[[np.ndarray], np.ndarray]  # numbers of items (N,) to their content (N, C)


@dataclass
class HistorySource:
    """The histories of a dataset, as `plait.training.source.Source`."""

    catalogue: Catalogue
    histories: Histories
    items: ItemsSettings
    buffers: dict[str, torch.Tensor]  # of the model's items: their content (items, content), or their codes
    sampler: type[Sampler] = HistorySampler
    validation_batch_size: int | None = VALIDATED

    @property
    def settings(self) -> Mapping[str, BaseModel]:
        """The settings of its modalities."""
        name = ItemCodes.name if isinstance(self.items, ItemCodesSettings) else Item.name
        return {name: self.items}

    @property
    def parts(self) -> Mapping[str, Any]:
        return {FEATURE.name: self.catalogue}

    def split(self, name: str, text: Text | None = None, model: Multimodal | None = None) -> HistorySplit:
        """The histories of a split."""
        histories = history_split(self.histories, name, len(self.catalogue))
        if "table" in self.buffers:
            histories.code_table = self.buffers["table"].numpy().astype(np.int64)
        return histories

    def fill(self, model: Multimodal) -> None:
        """Give a new model what is known of the items, and how often each was chosen."""
        items = item_rows(model.modalities) or item_codes(model.modalities)
        assert items is not None
        for name, buffer in self.buffers.items():
            getattr(items, name).copy_(buffer)
        trained = self.histories.items[self.histories.parts == TRAIN]
        items.counts.copy_(torch.from_numpy(np.bincount(trained, minlength=self.items.items)))

    def score(self, model: Multimodal, device: Device, sampler: Sampler) -> Score | None:
        """NDCG@10, where every item has a row: a likelihood gets worse on val long before the ranking does."""
        if item_rows(model.modalities) is None:
            return None
        assert isinstance(sampler, HistorySampler)
        return Score("NDCG@10", ranking(model, device, sampler))


def open_histories(dataset: Dataset, recipe: Recipe, cache: Path, device: Device) -> HistorySource:
    """The histories of a dataset and the content of the items that stand in training histories: a bag of words, and
    beside it what the encoder that the recipe names sees in them; or the semantic codes that it becomes. What takes
    long is kept in the folder `cache`.

    Raises PlaitError for a catalogue that is too large, or of whose items too little is known.
    """
    catalogue, settings = read_catalogue(dataset).trained(), _settings(recipe)
    known = catalogue.items
    semantic = settings.codes == "semantic" or (settings.codes == "auto" and len(known) > MOST)
    if not semantic and len(known) > MOST:
        raise PlaitError(
            f"{len(known):,} items; with one code an item a model has at most {MOST:,}. Set model.item.codes to "
            "semantic, or leave out the rarest ones."
        )
    seen = None
    if settings.encoder is not None:
        seen = _seen(known, embedder(settings.encoder, device.name), cache)
    facts, contents = _content(known, settings, seen)
    items: ItemsSettings
    if semantic:
        items, buffers = _semantic(facts, contents, cache, recipe.training.seed)
    else:
        sampled = settings.sampled
        if sampled is None:
            sampled = 0 if len(known) <= FULL else DRAWS
        items = ItemSettings(**facts.model_dump(), drop=settings.drop if facts.content else 0.0, sampled=sampled)
        buffers = {"content": torch.from_numpy(contents(np.arange(len(known))))}
    return HistorySource(catalogue, read_histories(dataset), items, buffers)


def _seen(known: list[CatalogueItem], embed: Embed, cache: Path) -> np.ndarray:
    """What an encoder sees in the items, (N, E), found once."""
    file = cache / "items.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, embed(known))
    seen: np.ndarray = np.load(file)
    return seen


def _settings(recipe: Recipe) -> ItemModelRecipe:
    """The recipe's section model.item."""
    settings: ItemModelRecipe = getattr(recipe.model, "item")  # noqa: B009 - this feature's own key
    return settings


def _content(known: list[CatalogueItem], settings: ItemModelRecipe, seen: np.ndarray | None) -> tuple[Known, Contents]:
    """How items become numbers, and these numbers."""
    bag = Bag.fit((bag_of(item) for item in known), settings.words)
    facts = Known(
        items=len(known),
        content=len(bag.words) + (0 if seen is None else seen.shape[1]),
        words=bag.words,
        weights=[round(float(weight), 6) for weight in bag.weights],
        encoder=settings.encoder,
    )

    def contents(numbers: np.ndarray) -> np.ndarray:
        return content_of([known[i] for i in numbers], facts, None if seen is None else seen[numbers])

    return facts, contents


def _semantic(
    facts: Known, contents: Contents, cache: Path, seed: int
) -> tuple[ItemCodesSettings, dict[str, torch.Tensor]]:
    """The settings of semantic codes and their buffers, fitted once. Raises PlaitError where nothing is known."""
    if not facts.content:
        raise PlaitError(
            "Semantic codes come from what items are, and nothing is known of these. Give an items table with "
            "titles, texts or categories, or name a model.item.encoder."
        )
    file = cache / "item_codes.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(file, tensors_to_bytes(fit_codes(facts.items, contents, seed)))
    buffers = load_file(file)
    settings = ItemCodesSettings(**facts.model_dump(), reduced=buffers["basis"].shape[1], sizes=sizes_of(buffers))
    return settings, buffers
