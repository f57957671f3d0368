"""Every module imports by itself, nothing heavy loads before it is needed, and libraries do not print."""

from __future__ import annotations

import ast
import importlib
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
