"""What the source keeps to, beside the order of imports: one modality a file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

SOURCE = Path(__file__).parents[1] / "src" / "plait"

# Names of protocols that happen to be spelt as a modality: OpenAI's `stream_format`, the type of Anthropic's parts.
WIRE_NAMES = {("server/api_media.py", "body.stream_format == 'audio'"), ("server/schemas.py", "kind == 'image'")}


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text())


def compared(node: ast.AST) -> Iterator[object]:
    """The constants that a comparison or a case of a match holds, those in tuples, sets and lists too."""
    if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
            for part in ast.walk(side) if isinstance(side, (ast.Tuple, ast.Set, ast.List)) else [side]:
                if isinstance(part, ast.Constant):
                    yield part.value
    elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
        yield node.value.value


def test_no_comparison_with_a_modality_outside_modalities() -> None:
    """What differs between modalities is asked of their descriptors, so that a new modality is one file."""
    from plait.modalities.media import MEDIA
    from plait.modalities.registry import MODALITIES

    names = {*MEDIA, *MODALITIES}
    assert {"image", "audio"} <= names
    found = {
        (name, ast.unparse(node))
        for name, tree in parsed()
        if not name.startswith(("modalities/", "recommend/"))
        for node in ast.walk(tree)
        if names.intersection(value for value in compared(node) if isinstance(value, str))
    }
    assert found == WIRE_NAMES


def test_only_its_own_folder_names_recommendation() -> None:
    """A feature registers what it adds; what lies below it knows neither items' tables nor histories of them."""
    words = re.compile(r"(?<!hf\.)catalogue|recommend|\bhistories\b|\bItem\w*Recipe\b|\binteractions\b", re.IGNORECASE)
    own = ("recommend/", "modalities/item.py")
    found = {
        f"{name}:{number}"
        for path in sorted(SOURCE.rglob("*.py"))
        if not (name := path.relative_to(SOURCE).as_posix()).startswith(own)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    }
    assert not found


# Pages are named by their paths, and the fields of what comes and goes over HTTP are described one by one.
OF_HTTP = re.compile(r"studio/|server/(schemas|answers|api_\w+)\.py|.*/routes\w*\.py")


def test_every_public_function_and_class_says_what_it_is() -> None:
    missing = {
        f"{name}:{node.name}"
        for name, tree in parsed()
        if not OF_HTTP.match(name)
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if ast.get_docstring(node) is None and not {"overload"} & {ast.unparse(d) for d in node.decorator_list}
    }
    assert not missing


LONG = 60  # lines of a function, its signature and docstring aside


def test_functions_have_one_purpose() -> None:
    """Lengths are a proxy; a function that outgrows a screen has steps that want names."""
    found = set()
    for name, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > LONG:
                    found.add(f"{name}:{node.name}")
    assert not found


def commands(command: Any, name: str = "plait") -> Iterator[tuple[str, Any]]:
    """The command and all below it, by what is typed."""
    yield name, command
    for below, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {below}")


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A recipe's section, and all within it."""
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_command_option_and_recipe_key_has_a_description() -> None:
    from plait import cli
    from plait.core.config import Recipe
    from plait.core.settings import RECIPE_SECTIONS
    from plait.modalities.registry import SETTINGS

    found = dict(commands(typer.main.get_command(cli.app)))
    assert len(found) > 20
    silent = {name for name, command in found.items() if not command.help}
    silent |= {
        f"{name} {parameter.name}"
        for name, command in found.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    }
    added = [section.settings for sections_added in RECIPE_SECTIONS.all() for section in sections_added]
    for section in [one for root in (Recipe, *SETTINGS.values(), *added) for one in sections(root)]:
        silent |= {f"{section.__name__}.{key}" for key, field in section.model_fields.items() if not field.description}
    assert silent == set()


def test_every_public_method_is_described_once() -> None:
    """In its own class, or in one that declares the interface; libraries' hooks are described by them."""
    methods = [
        (f"{name}:{cls.name}.{method.name}", cls.name, method)
        for name, tree in parsed()
        if not OF_HTTP.match(name) and name != "server/network.py"
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and not method.name.startswith("_")
    ]
    described = {method.name for _, _, method in methods if ast.get_docstring(method)} | {"forward", "backward"}
    missing = {place for place, cls, method in methods if not cls.startswith("_") and method.name not in described}
    assert missing == set()
