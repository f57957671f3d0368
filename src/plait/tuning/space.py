"""Which settings of a recipe can be tuned: their default values, and ranges that the size dial derives."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from plait.core.config import SIZES, Recipe, parse_recipe
from plait.core.errors import PlaitError
from plait.core.objective import CONTRASTIVE, Objective, weighted_sum
from plait.data.dataset import Dataset

FIRST = ("learning_rate", "batch_size")  # what is tuned where nothing else is named
NAMES = (*FIRST, "width", "layers", "dropout", "weight_decay", "warmup", "cond_dropout", "weights")
# Guards against over-fitting, each on or off: what stands for on where the recipe has it off.
GUARDS = {"dropout": 0.1, "weight_decay": 0.05, "label_smoothing": 0.1, "ema": 0.999, "augment": 1}
_PLACES = {"width": "model.backbone.width", "layers": "model.backbone.layers", "dropout": "model.backbone.dropout"}


@dataclass(frozen=True)
class Field:
    """A setting, its value in the default recipe, and either choices or a range. None of these settings touches the
    tokenizer, the codecs or what is validated, so that losses can be compared."""

    name: str
    place: str  # in the recipe, with dots
    default: float | int
    low: float | int
    high: float | int
    log: bool = False
    choices: tuple[float | int, ...] = ()
    guard: bool = False  # on or off; a study tries it first with all else at the default

    def metadata(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "choices": list(self.choices)}


def fields_of(recipe: Recipe, dataset: Dataset, over: list[str]) -> list[Field]:
    """The fields named in `over`, each a name or NAME=LOW:HIGH; "weights" stands for those of all objectives,
    "guards" for all guards against over-fitting, on or off.

    The default value always lies within. Raises PlaitError for what is not known or cannot be tuned here.
    """
    fields: dict[str, Field] = {}
    weights = _weights(recipe, dataset)
    for entry in over or list(FIRST):
        name, _, bounds = entry.strip().partition("=")
        if name == "guards" and not bounds:
            fields |= {guard: _guard(guard, recipe) for guard in GUARDS}
            continue
        expanded = [f"weights.{key}" for key in weights] if name == "weights" else [name]
        for each in expanded:
            if each.startswith("weights.") and each.removeprefix("weights.") not in weights:
                raise PlaitError(f"There is no weight '{each}' to tune; there are {', '.join(weights)}.")
            if not each.startswith("weights.") and each not in NAMES:
                raise PlaitError(f"'{each}' cannot be tuned. What can be: {', '.join(NAMES)}, guards.")
            fields[each] = _field(each, recipe, dataset, weights, _range(entry, bounds))
    return list(fields.values())


def _weights(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """The weights of the objectives that this data has; one of 0 is a decision, not a value to tune."""
    kinds = list(dict.fromkeys(dataset.columns.values()))
    known = {
        name: Objective.parse(name).weight(recipe.training.weights)
        for name in [*kinds, *[CONTRASTIVE][: len(kinds) - 1]]
    }
    return {name: weight for name, weight in known.items() if weight > 0}


def _range(entry: str, bounds: str) -> tuple[float, float] | None:
    if not bounds:
        return None
    try:
        low, high = (float(part) for part in bounds.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and low < high):
        raise PlaitError(f"'{entry}' names no range; write it as learning_rate=0.0001:0.01.")
    return low, high


def _field(
    name: str, recipe: Recipe, dataset: Dataset, weights: dict[str, float], bounds: tuple[float, float] | None
) -> Field:
    size, training, backbone = SIZES[recipe.model.size], recipe.training, recipe.model.backbone
    place = _PLACES.get(name, f"training.{name}")
    if recipe.model.init_from and name in ("width", "layers"):
        raise PlaitError(f"'{name}' cannot be tuned: the backbone of {recipe.model.init_from} has its own.")
    if name in ("batch_size", "width"):
        if name == "batch_size":
            default, most = training.batch_size or size.batch_size, len(dataset.indices("train"))
            low, high = bounds or (size.batch_size / 4, size.batch_size * 4)
            low, high = max(low, training.grad_accum_steps), min(high, most)
            values = [2**power for power in range(1, 24) if low <= 2**power <= high]
        else:
            default, heads = backbone.width or size.width, backbone.heads or size.heads
            low, high = bounds or (size.width / 2, size.width * 2)
            unit = 8 * heads if default % (8 * heads) == 0 else 2 * heads  # whole heads, of even width
            shares = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
            values = [v for s in shares if low <= (v := max(round(default * s / unit), 1) * unit) <= high]
        choices = tuple(sorted({*values, default}))
        return Field(name, place, default, choices[0], choices[-1], True, choices)
    if name == "layers":
        default = backbone.layers or size.layers
        low, high = bounds or (max(size.layers // 2, 1), size.layers * 2)
        return Field(name, place, default, min(max(int(low), 1), default), max(int(high), default))
    if name == "learning_rate":
        value, low, high = training.learning_rate or size.learning_rate, size.learning_rate / 10, size.learning_rate * 5
    elif name.startswith("weights."):
        value = weights[name.removeprefix("weights.")]
        low, high = value / 4, value * 4
    else:
        value = float(getattr(backbone if name == "dropout" else training, name))
        low, high = {
            "dropout": (0.0, 0.3), "weight_decay": (0.005, 0.5), "warmup": (0.01, 0.2), "cond_dropout": (0.0, 0.3),
        }[name]  # fmt: skip
    low, high = bounds or (low, high)
    low, high = min(low, value), max(high, value)
    return Field(name, place, value, low, high, log=low > 0)


def _guard(name: str, recipe: Recipe) -> Field:
    value = getattr(recipe.model.backbone if name == "dropout" else recipe.training, name)
    default = int(value) if name == "augment" else float(value or 0)
    choices = (0, 1) if name == "augment" else (0.0, default or GUARDS[name])
    place = _PLACES.get(name, f"training.{name}")
    return Field(name, place, default, choices[0], choices[1], choices=choices, guard=True)


def with_values(recipe: Recipe, fields: list[Field], values: dict[str, Any], seed: int | None = None) -> Recipe:
    """The recipe with a trial's values, and another seed where one is given. Raises PlaitError where they do not fit
    together."""
    raw = recipe.model_dump(mode="json")
    for field in fields:
        section, *inner = field.place.split(".")
        at = raw[section]
        for part in inner[:-1]:
            at = at[part]
        value = values[field.name]
        at[inner[-1]] = bool(value) if field.name == "augment" else (value or None) if field.name == "ema" else value
    if seed is not None:
        raw["training"]["seed"] = seed
    return parse_recipe(raw, "a trial's recipe")


def check_objective(name: str, dataset: Dataset) -> None:
    """Raise PlaitError where validation on this data measures no such objective."""
    kinds = sorted(set(dataset.columns.values()))
    pairs = [str(Objective.of_pair(a, b)) for a, b in combinations(kinds, 2)]
    known = ["loss", *kinds, *([CONTRASTIVE, *pairs] if pairs else [])]
    if name not in known:
        raise PlaitError(
            f"There is no objective '{name}' in validation on {dataset.path}; there are {', '.join(known)}."
        )


def score(losses: dict[str, float], objective: str, recipe: Recipe) -> float:
    """What a study minimises, of the losses of a validation: one of them, the mean of the contrastive ones, or "loss",
    all as the study's own recipe weights them, also where a trial tunes the weights."""
    if objective == "loss":
        return weighted_sum(losses, recipe.training.weights)
    measured = [value for name, value in losses.items() if objective in (name, Objective.parse(name).kind)]
    if not measured:
        raise PlaitError(f"Validation measured no '{objective}'; there are loss, {', '.join(losses)}.")
    return sum(measured) / len(measured)
