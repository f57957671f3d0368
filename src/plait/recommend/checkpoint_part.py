"""The catalogue in a checkpoint."""

from __future__ import annotations

from plait.core.dist import docs_page
from plait.core.errors import PlaitError
from plait.model.checkpoint import Checkpoint, PartFile
from plait.recommend.catalogue import Catalogue
from plait.recommend.feature import FEATURE

# Without the images and audio clips of the items, which the data have.
CATALOGUE_FILE = PartFile("items.parquet", Catalogue.read, lambda catalogue, path: catalogue.write(path, media=False))


def catalogue_of(checkpoint: Checkpoint) -> Catalogue:
    """The items that a model knows. Raises PlaitError where it is no model of histories."""
    part = checkpoint.parts.get(FEATURE.name)
    if not isinstance(part, Catalogue):
        raise PlaitError(
            f"This model knows no items: recommending needs a run of histories: {docs_page('how-to/recommending')}"
        )
    return part
