"""Where a run's samples come from: records of columns, or data that a feature knows.

`Source` is all that the trainer asks of data. `RecordSource` is the usual one; a feature adds another for datasets of
its own kind (`Manifest.kind`), with the settings of what it puts into the model, its batches and its own validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from plait.core.config import Recipe
from plait.core.device import Device
from plait.core.features import ExtensionPoint
from plait.data.blocks import plan_blocks
from plait.data.dataset import ConcatDataset, Dataset
from plait.modalities.text import Text
from plait.model.multimodal import Multimodal
from plait.training.batches import Sampler
from plait.training.split import BlockSettings, Split, load_blocks, load_split

VALIDATION_RECORDS = 2000  # of val, at most


@dataclass(frozen=True)
class Score:
    """What a run's best checkpoint is chosen by, where that is not its loss."""

    name: str
    value: float  # the greater the better


class Source(Protocol):
    """The data of a run, ready to be learnt from."""

    settings: Mapping[str, BaseModel]  # of the modalities that the data bring along, by name
    parts: Mapping[str, Any]  # what checkpoints keep for features, by the feature's name
    sampler: type[Sampler]
    validation_batch_size: int | None  # of the samples of a validation step; None: the size's

    def split(self, name: str, text: Text, model: Multimodal) -> Split:
        """The samples of a split ("train" or "val")."""
        ...

    def fill(self, model: Multimodal) -> None:
        """Give a new model what it is to know of the data beside its weights."""
        ...

    def score(self, model: Multimodal, device: Device, sampler: Sampler) -> Score | None:
        """How good a model is on the samples of val; None where its loss says it."""
        ...


class OpenSource(Protocol):
    """Makes the `Source` of a dataset; what takes long is kept in the folder `cache`. Raises PlaitError for what the
    user can mend."""

    def __call__(self, dataset: Dataset, recipe: Recipe, cache: Path, device: Device) -> Source: ...


SOURCES: ExtensionPoint[OpenSource] = ExtensionPoint("training_source")  # by the kind of data, a feature's name


@dataclass
class RecordSource:
    """Records of columns: texts, images, audio, conversations. `blocks` says how texts alone are tokenised while
    training goes on; None: all of them before."""

    dataset: Dataset
    cache: Path
    progress: Callable[[str, int, int], None]
    blocks: BlockSettings | None = None
    settings: Mapping[str, BaseModel] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    sampler: type[Sampler] = Sampler
    validation_batch_size: int | None = None

    def split(self, name: str, text: Text, model: Multimodal) -> Split:
        context = model.config.backbone.max_length
        if name == "train" and self.blocks is not None and self._is_large():
            return load_blocks(self.dataset, name, text, self.cache, context, self.blocks)
        return load_split(
            self.dataset,
            name,
            text,
            model.media,
            self.cache,
            context,
            self.progress,
            limit=None if name == "train" else VALIDATION_RECORDS,
            vocabulary=model.vocabulary,
        )

    def _is_large(self) -> bool:
        """Whether the data are texts alone, and more than a block holds. Conversations, and datasets that are replayed,
        are read before training."""
        assert self.blocks is not None
        dataset, columns = self.dataset, list(self.dataset.columns)
        if isinstance(dataset, ConcatDataset) or dataset.manifest.chats or set(dataset.columns.values()) != {"text"}:
            return False
        return plan_blocks(dataset, "train", columns, self.blocks.size).count > 1

    def fill(self, model: Multimodal) -> None:
        """Nothing: a model learns all of it."""

    def score(self, model: Multimodal, device: Device, sampler: Sampler) -> Score | None:
        return None
