"""Every module imports by itself, nothing heavy loads before it is needed, and libraries do not print."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plait

SOURCE = Path(plait.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
COMMANDS = {"cli", "commands.py"}  # what talks to people


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(SOURCE)) for f in FILES])
def test_every_module_imports(file: Path) -> None:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts[-1] != "__main__":
        importlib.import_module(".".join(("plait", *(p for p in parts if p != "__init__"))))


def test_help_is_quick_to_load() -> None:
    heavy = "import sys, plait.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_print_belongs_to_the_command_line() -> None:
    for file in FILES:
        if COMMANDS & set(file.relative_to(SOURCE).parts):
            continue
        calls = (
            node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), file


@pytest.mark.parametrize("words", ["plait --help", "plait tr", "plait train --h"])
def test_help_and_completion_load_no_model_code(words: str) -> None:
    script = (
        "import atexit, sys; from plait.cli import main;"
        "atexit.register(lambda: print(*(m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules)));"
        f"sys.argv = {words.split()!r}; main()"
    )
    options = {} if "--help" in words else {"_PLAIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
    if words.startswith("plait train"):
        options["COMP_CWORD"] = "2"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **options}, capture_output=True, text=True, check=False
    )
    lines = done.stdout.split("\n")
    assert lines[-2] == "", "what was loaded"
    assert {"plait --help": "prepare", "plait tr": "train", "plait train --h": "--help"}[words] in done.stdout


@pytest.mark.parametrize(
    "words",
    ["generate nobody/nothing hello", "train x.csv -o run --init-from nobody/nothing", "serve a=nobody/nothing"],
)
def test_a_missing_model_is_told_before_model_code_is_loaded(words: str) -> None:
    script = (
        "import atexit, sys; from plait.cli import main;"
        "atexit.register(lambda: print(*(m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules)));"
        f"sys.argv = ['plait', *{words.split()!r}]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (1, ""), "what was loaded"
    assert "'nobody/nothing' is not a local folder" in done.stderr


def test_version_is_one() -> None:
    from typer.testing import CliRunner

    from plait.cli import app

    assert CliRunner().invoke(app, ["--version"]).stdout == f"plait {plait.__version__}\n"
    root = SOURCE.parent.parent
    if (root / "CITATION.cff").is_file():  # not in an installed package
        assert f"version: {plait.__version__}" in (root / "CITATION.cff").read_text(encoding="utf-8")
