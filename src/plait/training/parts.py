"""The parts of a run: a finished run that is trained for longer begins a new part, a schedule of its own.

`run.json` holds what the current part decided in its usual places; `parts` are those that came before it, and `more` is
what the current one was asked for, where it is not the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.config import SIZES, Recipe, parse_recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json

# What a part decides once, and the next one decides anew.
DECIDED = ("steps", "revisions", "validations", "stopped_early", "prepared", "recogniser_steps", "finished")
CLOSE = 1e-9  # minutes below which two budgets are the same


@dataclass(frozen=True)
class Budget:
    """What a part of a run is given: minutes, or steps that may be capped by minutes."""

    minutes: float | None = None
    steps: int | None = None
    max_minutes: float | None = None

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.minutes:g} minutes"


def recipe_budget(recipe: Recipe) -> Budget:
    """The budget of a run's first part."""
    training = recipe.training
    if training.steps is not None:
        return Budget(training.minutes, training.steps, training.max_minutes)
    return Budget(training.minutes or SIZES[recipe.model.size].minutes)


def current_budget(metadata: Mapping[str, Any], recipe: Recipe) -> Budget:
    """The budget of the part that a run is in."""
    return Budget(**metadata["more"]) if "more" in metadata else recipe_budget(recipe)


def first_step(metadata: Mapping[str, Any]) -> int:
    """Steps that were done when the part began that a run is in."""
    parts = metadata.get("parts")
    return int(parts[-1]["end"]) if parts else 0


def begin_part(metadata: dict[str, Any], more: Budget) -> None:
    """Put what the part decided that has ended into `parts`; the next one decides for itself."""
    last = (metadata.get("revisions") or [metadata])[-1]["steps"]
    ended = {name: metadata.pop(name) for name in DECIDED if name in metadata}
    ended["end"] = int(ended.get("stopped_early", last))
    if "more" in metadata:
        ended["more"] = metadata["more"]
    metadata["parts"] = [*metadata.get("parts", []), ended]
    metadata["more"] = {name: value for name, value in vars(more).items() if value is not None}


def ask_for_more(folder: Path, recipe: Recipe, minutes: float | None, steps: int | None) -> Budget | None:
    """What a command that names more minutes or steps than a run was asked for so far asks of it beside that. The
    recipe then gets those of the run's first part, by which it is the recipe of that run. None where it asks for no
    more, or there is no run yet.

    Args:
        folder: A run's folder.
        recipe: What the command gives, with its minutes or steps.
        minutes, steps: Of the command; None for what it did not name.

    Raises PlaitError where the run is still in its first part, which has to end before.
    """
    if not (folder / "run.json").is_file() or (minutes is None and steps is None):
        return None
    metadata = read_json(folder / "run.json")
    if not is_trained_by_steps(metadata):
        return None
    began = parse_recipe(metadata["recipe"], str(folder / "run.json"))
    first, extra = recipe_budget(began), _extras(metadata)
    more = None
    if minutes is not None and first.steps is None:
        assert first.minutes is not None
        total = first.minutes + sum(one.minutes or 0.0 for one in extra)
        more = Budget(minutes=minutes - total) if minutes > total + CLOSE else None
        known = minutes <= total + CLOSE and extra and minutes >= first.minutes
    elif steps is not None and first.steps is not None:
        total_steps = first.steps + sum(one.steps or 0 for one in extra)
        more = Budget(steps=steps - total_steps, max_minutes=first.max_minutes) if steps > total_steps else None
        known = steps <= total_steps and extra and steps >= first.steps
    else:
        return None
    if more is not None and "finished" not in metadata:
        return None  # a run that was stopped goes on as it was asked for: another length is another recipe
    if more is not None or known:
        began_training = began.training
        recipe.training.minutes, recipe.training.steps = began_training.minutes, began_training.steps
        recipe.training.max_minutes = began_training.max_minutes
    return more


def training_seconds(metadata: Mapping[str, Any]) -> float:
    """The time that a run was given in all its parts; of parts that were given steps, what they took together."""
    recipe = parse_recipe(metadata["recipe"], "run.json")
    budgets = [recipe_budget(recipe), *_extras(metadata)]
    if any(one.steps is not None for one in budgets):
        return max(float(metadata.get("finished", 0.0)) - float(metadata["started"]), 1.0)
    return 60 * sum(one.minutes or 0.0 for one in budgets)


def _extras(metadata: Mapping[str, Any]) -> list[Budget]:
    """The budgets of all parts after the first."""
    budgets = [part["more"] for part in metadata.get("parts", []) if "more" in part]
    if "more" in metadata:
        budgets.append(metadata["more"])
    return [Budget(**one) for one in budgets]


def is_trained_by_steps(metadata: Mapping[str, Any]) -> bool:
    """Whether a run is trained step by step by the trainer; a head over a frozen encoder is fitted at once."""
    return metadata.get("size") not in ("head", "pairs", "speech")


def check_more(folder: Path) -> None:
    """Raise PlaitError where a run cannot be trained for longer."""
    if not (folder / "run.json").is_file():
        raise PlaitError(f"{folder} is not a run (it has no run.json). Train one: plait train DATA -o {folder}")
    metadata = read_json(folder / "run.json")
    if not is_trained_by_steps(metadata):
        raise PlaitError(
            f"{folder} is fitted over a pretrained encoder, not trained for a time that could be longer. Give it more "
            "records, or another encoder: --init-from."
        )
    if "finished" not in metadata and "more" not in metadata:
        raise PlaitError(
            f"{folder} was stopped before its end. Let it end first, by the command that began it; then ask for more."
        )


def describe_parts(metadata: Mapping[str, Any]) -> str:
    """The parts of a run that was trained for longer, for people; "" for a run of one part."""
    parts = metadata.get("parts")
    if not parts:
        return ""
    ends = [part["end"] for part in parts]
    begins = [0, *ends]
    last = metadata.get("stopped_early") or (metadata.get("revisions") or [metadata])[-1].get("steps", ends[-1])
    counts = [end - begin for begin, end in zip(begins, [*ends, last], strict=True)]
    return " + ".join(f"{count:,}" for count in counts)
