"""Documentation that is made from code is up to date, and what the README names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import typer

from plait import cli

ROOT = Path(__file__).parent.parent


def test_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python docs/make.py"


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
    known = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^plait (\w+)", readme, re.MULTILINE)) <= known


def test_every_command_shows_an_example() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert f"Example: plait {name}" in (command.help or ""), name
