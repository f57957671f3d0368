"""The sections of a recipe that this feature reads: data.items and model.item."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from plait.core.settings import Section, Settings

ITEM_COLUMNS = ("user", "item", "time", "weight", "id", "title", "text", "categories", "image", "audio")


class ItemsRecipe(Settings):
    """How interactions of users with items are read, and what of them is held out."""

    interactions: str | None = Field(
        None, description="File of the source with the interactions; found by itself where there is one."
    )
    items: str | None = Field(
        None, description="File of the source with the table of items; found by itself where there is one."
    )
    columns: dict[str, str] = Field(
        {},
        description="user, item, time, weight; id, title, text, categories, image, audio -> the column that holds it.",
    )
    split: Literal["leave-one-out", "time"] = Field(
        "leave-one-out", description="What is held out: each user's last item, or all that came after a time."
    )
    least_weight: float | None = Field(None, description="Interactions of less weight are left out; None for none.")
    untested: str | None = Field(
        None, description="FILE:COLUMN of a table of users; those marked 1 or true are trained on but not tested."
    )
    cold: float = Field(0.0, ge=0, lt=1, description="Share of the items that training never sees.")

    @field_validator("columns")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value if name not in ITEM_COLUMNS]:
            raise ValueError(f"'{unknown[0]}' is nothing that a column holds; known are {', '.join(ITEM_COLUMNS)}")
        return value


class ItemModelRecipe(Settings):
    """Overrides of what the data derive for items."""

    codes: Literal["auto", "one", "semantic"] = Field(
        "auto", description="Codes of an item: one up to 200,000 items, else semantic (several, from what the item is)."
    )
    encoder: str | None = Field(
        None, description="A run or an import whose embeddings are part of what is known of items."
    )
    words: int = Field(
        1024, ge=0, description="Most words of titles, categories and texts that the content tells apart."
    )
    drop: float = Field(0.1, ge=0, lt=1, description="Share of learnt item embeddings that a training step hides.")
    sampled: int | None = Field(
        None, ge=0, description="Items drawn for the softmax, 0 for all; by itself above 30,000 items."
    )


SECTIONS = [
    Section(
        "data",
        "items",
        ItemsRecipe,
        ItemsRecipe | None,
        Field(None, description="The source holds interactions of users with items; see data.items."),
    ),
    Section(
        "model",
        "item",
        ItemModelRecipe,
        ItemModelRecipe,
        Field(ItemModelRecipe(), description="Overrides for items; see model.item."),
    ),
]
