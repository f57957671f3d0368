"""What histories are wanted for, and what of a recipe follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.core.config import Recipe
from plait.training.expectation import Measured, Point
from plait.training.tasks import with_sections


class RecommendTask:
    """Saying what comes next: a narrow network, since histories are short and items many."""

    meaning = "say what comes next in a history"
    needs = (
        "a table with a user and an item in each row (columns as user, customer; item, product; time), or one whose "
        "columns a recipe names: data.items.columns"
    )
    source: Mapping[str, Any] = {"items": {}}
    measured = Measured(
        "recommend", 943, 1, 0.199, "943 people's histories of films",
        (Point(40, 0.197, "ml100k --seed 0"), Point(150, 0.231, "ml100k --seed 0")), "of last items among ten",
    )  # fmt: skip

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with this network where it is of the least size, and says nothing of its own."""
        if recipe.model.size != "tiny":
            return recipe
        chosen = {"width": 64, "layers": 2, "heads": 2, "context": 200, "dropout": 0.2}
        own = recipe.model.backbone.model_dump(exclude_unset=True)
        training: dict[str, Any] = {} if recipe.training.batch_size else {"batch_size": 64}
        return with_sections(recipe, model={"backbone": {**chosen, **own}}, training=training)


TASK = RecommendTask()
