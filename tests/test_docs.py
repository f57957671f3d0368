"""Documentation: what is made from code is up to date, links lead somewhere, commands exist, and blocks run."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from plait import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The code blocks of a page: language and text, in order."""
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text(encoding="utf-8")) if found[1] in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `plait` command in a page's shell blocks."""
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["plait"]:
                ends = [words.index(end) for end in ("|", ">", "&", "&&") if end in words]
                yield words[1 : min(ends, default=len(words))]


def test_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python docs/make.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_commands_exist(page: Path) -> None:
    """Relative links lead to files; each `plait` command has its name, options and arguments."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    root: Any = typer.main.get_command(cli.app)
    for words in commands(page):
        command, rest = root, list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"no such command: plait {shlex.join(words)}"
            command = command.commands[rest.pop(0)]
        if "--help" in rest or hasattr(command, "commands"):
            continue
        for parameter in command.params:
            parameter.callback = None  # which would look for models that the page has made before
        try:
            command.make_context("plait", rest)
        except (click.ClickException, typer.Exit) as error:
            pytest.fail(f"plait {shlex.join(words)}: {getattr(error, 'message', error)}")


def test_every_command_shows_an_example() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert f"Example: plait {name}" in (command.help or ""), name


def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which `plait` and `python` are these."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, line in (("plait", f'"{sys.executable}" -m plait "$@"'), ("python", f'"{sys.executable}" "$@"')):
        (folder / name).write_text(f"#!/bin/sh\nexec {line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}


def execute(page: Path, folder: Path, skip: str = "") -> int:
    """Run a page's shell and Python blocks in order, in one folder; returns how many there were."""
    around, count = environment(folder), 0
    for language, text in blocks(page, "sh", "python"):
        if skip and re.search(skip, text):
            continue
        command = ["sh", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout}{done.stderr}"
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")
def test_the_tutorial_runs(tmp_path: Path) -> None:
    assert execute(ROOT / "docs" / "tutorial" / "first-model.md", tmp_path) >= 5


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs" / "tutorial" / "first-model.ipynb", as_version=4)
    client(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "photos/three/0003.png: " in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")
def test_the_readme_runs(tmp_path: Path) -> None:
    """From `plait` to the last block, each command right after the one before. `make` and `pip` set up a clone."""
    assert execute(ROOT / "README.md", tmp_path, skip=r"^(make|pip|git) ") == 3


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: no page is missing, no link is broken, each name of the Python reference is found."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "plait.library.training.train" in page and "minutes" in page
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!plait-ml)[^"]+"', page)
    assert not fetched, "the site fetches from elsewhere"
