"""Recipes that ship with Plait, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from plait.core.errors import PlaitError

FOLDER = Path(__file__).parent.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The recipes that ship with Plait: name to file, in order of names."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a packaged one.

    A file that exists goes before a packaged recipe of the same name. Raises PlaitError with the nearest known name.
    """
    path, packaged = Path(name_or_path), packaged_recipes()
    if path.is_file():
        return path
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        raise PlaitError(f"Recipe {path} cannot be read: no such file. `plait recipes` lists those that come by name.")
    near = difflib.get_close_matches(str(name_or_path), packaged, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(packaged)}"
    raise PlaitError(f"There is no recipe '{name_or_path}': {hint} A file of your own ends in .yaml.")


def describe_recipe(name: str) -> str:
    """What a packaged recipe is for: the first line of its comment."""
    return find_recipe(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
