"""Writes docs/sizes.md and docs/recipes.md from the code; a test checks that they are up to date.

python docs/make.py
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from plait.core import config
from plait.modalities.audio import AudioSettings
from plait.modalities.image import ImageSettings
from plait.training.build import size_table

HERE = Path(__file__).parent


def sizes() -> str:
    table = size_table()
    names = list(next(iter(table.values())))
    rows = [f"| {name} | " + " | ".join(values.values()) + " |" for name, values in table.items()]
    head = f"| size | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}"
    return f"""# Sizes

`--size` is one row of this table (`plait sizes` prints it); a recipe may override any part. `parameters` count a
model of coloured images, audio and text; `image` is the largest side in pixels, smaller images keep theirs,
and they are grey where all of the data's are; `rate` is of audio in Hz, `seconds` the longest clip; `minutes` is
the budget where neither `--minutes` nor `--steps` is given.

{head}
{chr(10).join(rows)}
"""


def fields(model: type[BaseModel]) -> str:
    """A table of a section's keys. Raises ValueError for a key without a description."""
    rows = []
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description: Field(..., description=...)")
        default = field.get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):
            rows.append(f"| `{name}` | {_type(field.annotation)} | `{default}` | {field.description} |")
    return "| key | type | default | |\n| --- | --- | --- | --- |\n" + "\n".join(rows)


def _type(annotation: Any) -> str:
    """A type as people read it: `one of ddp, fsdp`, `number or None`."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in get_args(annotation)))
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) in (list, tuple):
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {float: "number", int: "integer", bool: "true or false", str: "text", type(None): "None"}
    return names.get(annotation, str(annotation))


def recipes() -> str:
    sections = {
        "data": config.DataRecipe,
        "data.items": config.ItemsRecipe,
        "model": config.ModelRecipe,
        "model.backbone": config.BackboneRecipe,
        "model.text": config.TextRecipe,
        "model.image": ImageSettings,
        "model.audio": AudioSettings,
        "model.item": config.ItemModelRecipe,
        "training": config.TrainingRecipe,
        "training.lora": config.LoraRecipe,
        "generation": config.GenerationConfig,
    }
    tables = "\n\n".join(f"## {name}\n\n{fields(model)}" for name, model in sections.items())
    return f"""# Recipes

A recipe is a YAML file with the sections below; every key may be left out, and an unknown one is an error. `None` means
that `--size` or the data decide.

{tables}
"""


def pages() -> dict[Path, str]:
    return {HERE / "sizes.md": sizes(), HERE / "recipes.md": recipes()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
