"""The base of a recipe's sections, and the sections that features add to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

from plait.core.features import ExtensionPoint

S = TypeVar("S", bound=BaseModel)


class Settings(BaseModel):
    """A section of a recipe: unknown keys are errors, and defaults are validated too."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Section:
    """A section that a feature adds to a recipe.

    Attributes:
        parent: The section that it stands in: "data" or "model".
        name: Its key there.
        settings: Its class.
        annotation: The key's type: `settings`, or `settings | None`.
        field: Its default and description, pydantic's `Field(...)`.
    """

    parent: str
    name: str
    settings: type[Settings]
    annotation: Any
    field: Any


RECIPE_SECTIONS: ExtensionPoint[list[Section]] = ExtensionPoint("recipe_sections")


def with_sections(parent: str) -> Callable[[type[S]], type[S]]:
    """A decorator that gives a section's class the keys that features add to it."""

    def extended(base: type[S]) -> type[S]:
        added = [one for sections in RECIPE_SECTIONS.all() for one in sections if one.parent == parent]
        if not added:
            return base
        fields: dict[str, Any] = {one.name: (one.annotation, one.field) for one in added}
        section: type[S] = create_model(
            base.__name__, __base__=base, __module__=base.__module__, __doc__=base.__doc__, **fields
        )
        return section

    return extended
