"""Imports run downward only, every module imports, and nothing heavy loads before it is needed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import plait

ROOMS = ["runtime", "native", "config", "data", "modalities", "model", "training", "generation", "evaluation",
         "explain", "applications", "tune", "transfer", "doctor", "plan", "serving", "cli", "__main__"]  # fmt: skip
SOURCE = Path(plait.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def _room(parts: tuple[str, ...]) -> int:
    return ROOMS.index(parts[0])


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(SOURCE)) for f in FILES])
def test_imports_run_downward(file: Path) -> None:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):
        return  # the public face names what lies anywhere, and loads it late
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("plait."):
                assert _room(tuple(name.split(".")[1:])) <= _room(parts), f"{file}:{node.lineno} imports {name}"
    if parts[-1] != "__main__":
        importlib.import_module(".".join(("plait", *(p for p in parts if p != "__init__"))))


def test_help_is_quick_to_load() -> None:
    heavy = "import sys, plait.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_print_belongs_to_the_command_line() -> None:
    for file in FILES:
        if file.parent.name == "cli":
            continue
        calls = (
            node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), file
