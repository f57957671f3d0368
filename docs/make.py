"""Writes what is generated: docs/reference's sizes, recipes and command line, and the tutorial's notebook; a test
checks that they are up to date.

python docs/make.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from plait import cli
from plait.core import config
from plait.core.settings import RECIPE_SECTIONS
from plait.modalities.audio import AudioSettings
from plait.modalities.image import ImageSettings
from plait.modalities.registry import SETTINGS
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
    added: dict[str, dict[str, type[BaseModel]]] = {"data": {}, "model": {}}
    for section in (one for sections in RECIPE_SECTIONS.all() for one in sections):
        added[section.parent][f"{section.parent}.{section.name}"] = section.settings
    sections = {
        "data": config.DataRecipe,
        **added["data"],
        "model": config.ModelRecipe,
        "model.backbone": config.BackboneRecipe,
        "model.text": config.TextRecipe,
        "model.image": ImageSettings,
        "model.audio": AudioSettings,
        "model.video": SETTINGS["video"],
        **added["model"],
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


def command_line() -> str:
    """Every command with its arguments and options, as --help has them."""
    root = typer.main.get_command(cli.app)
    panels: dict[str, list[str]] = {}
    for path, command in walk(root, ("plait",)):
        if len(path) > 1:
            panel = str(getattr(root.commands[path[1]], "rich_help_panel", None) or "Others")  # type: ignore[attr-defined]
            panels.setdefault(panel, []).append(describe_command(path, command))
    text = "\n\n".join(f"## {panel}\n\n" + "\n\n".join(entries) for panel, entries in panels.items())
    return f"""# Command line

Each command is a function of the library with the same options: see [Python](python.md). `plait COMMAND --help` shows
the same, and `plait --install-completion` teaches your shell the names. Exit codes: 0 done, 1 a mistake that the
message explains, 2 an unknown option, 130 stopped by Ctrl-C, 143 by SIGTERM.

{text}
"""


def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The commands below one, without the groups."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


def describe_command(path: tuple[str, ...], command: Any) -> str:
    """A command's section: what it does, an example, its arguments and options."""
    text, _, example = (command.help or "").partition("Example: ")
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        option = ", ".join(f"`{name}`" for name in parameter.opts + parameter.secondary_opts)
        name = option if parameter.param_type_name == "option" else f"`{parameter.name.upper()}`"
        default = parameter.default
        shown = "required" if parameter.required else "" if default in (None, False, [], ()) else f"`{default}`"
        help_text = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
        rows.append(f"| {name} | {shown} | {help_text} |")
    table = "| | default | |\n| --- | --- | --- |\n" + "\n".join(rows) if rows else ""
    shown_example = f"```sh\n{' '.join(example.split())}\n```\n\n" if example else ""
    return f"### {' '.join(path)}\n\n{text.strip()}\n\n{shown_example}{table}".rstrip()


def notebook(page: Path) -> str:
    """A page as a Jupyter notebook: text, Python cells, and shell blocks as `!` lines."""
    parts = re.split(r"^```(sh|python)\n(.*?)^```\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    cells = [_cell("markdown", parts[0])]
    for language, code, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        lines = code.splitlines()
        cells.append(_cell("code", code if language == "python" else "\n".join(f"!{line}" for line in lines)))
        if text.strip():
            cells.append(_cell("markdown", text))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    value = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _cell(kind: str, text: str) -> dict[str, Any]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.strip().splitlines(keepends=True), **code}


def pages() -> dict[Path, str]:
    tutorial = HERE / "tutorial" / "first-model.md"
    return {
        tutorial.with_suffix(".ipynb"): notebook(tutorial),
        HERE / "reference" / "sizes.md": sizes(),
        HERE / "reference" / "recipes.md": recipes(),
        HERE / "reference" / "command-line.md": command_line(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")
