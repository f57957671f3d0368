"""The package as people install it: a wheel in an environment that holds what it declares and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import RECIPE, write_world
from plait.core.device import compiler
from plait.core.dist import DISTRIBUTION, VERSION, check_extra, install_command
from plait.core.errors import PlaitError
from plait.core.recipes import describe_recipe, find_recipe, packaged_recipes

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Calls every command's help in one process, as its own command line does.
EVERY_HELP = """
import contextlib, io, sys
import click, typer
from plait import cli

def walk(command, path):
    yield path
    for name in getattr(command, "commands", {}):
        yield from walk(command.commands[name], [*path, name])

for path in walk(typer.main.get_command(cli.app), []):
    sys.argv = ["plait", *path, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, (path, end.code)
    assert "Usage: plait" in text.getvalue(), (path, text.getvalue())
    print("plait", *path)
"""


def test_names_agree() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    with pytest.raises(PlaitError, match=re.escape(f"Chess needs nothing_of_this_name. Run: {install_command('ui')}")):
        check_extra("nothing_of_this_name.part", "ui", "Chess")
    check_extra("numpy", "ui", "Counting")
    named = set()
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install '?\"?plait(?!-ml)", text), f"{file}: say it by plait.core.dist"
        calls = r"install_command\([\"'](\w+)[\"']\)|(?:check|import)_extra\(\s*\"?[\w.]+\"?, \"(\w+)\""
        named |= {extra for match in re.finditer(calls, text) for extra in match.groups() if extra}
    assert named and named <= set(PROJECT["optional-dependencies"])


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.core.config import load_recipe

    for name in packaged_recipes():
        load_recipe(name)
        assert describe_recipe(name)[-1] in ".:" and len(describe_recipe(name)) < 120
    with pytest.raises(PlaitError, match="did you mean 'fashion'"):
        load_recipe("fashon")
    with pytest.raises(PlaitError, match="no such file"):
        load_recipe("mine/chat.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").write_text("training: {steps: 3}")
    assert load_recipe("chat").training.steps == 3, "a file goes before a packaged recipe of its name"
    assert find_recipe("fashion").is_file()


def closure(requirements: list[str]) -> set[str]:
    """The installed distributions that these need, with what they need in turn."""
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        need, extra = waiting.pop()
        name = canonicalize_name(need.name)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        new = name not in found
        found.add(name)
        lines = metadata.requires(name) or []
        if new:
            waiting += [(Requirement(line), "") for line in lines]
        waiting += [(Requirement(line), wanted) for wanted in need.extras for line in lines if "extra" in line]
    return found


def bare_environment(folder: Path, requirements: list[str]) -> Path:
    """A virtual environment with links to the installed files of what is required. Returns its Python."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    site = next((folder / "lib").glob("python3*/site-packages"))
    for name in closure(requirements):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return {"sdist": next(folder.glob("*.tar.gz")), "wheel": next(folder.glob("*.whl"))}


@pytest.fixture(scope="module")
def bare(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it declares, without extras."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    python = bare_environment(folder, PROJECT["dependencies"])
    site = next((folder / "lib").glob("python3*/site-packages"))
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        wheel.extractall(site)
    return python


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=environment, text=True, encoding="utf-8", check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_distributions_hold_what_they_should(distributions: dict[str, Path]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no git clone")
    tracked_files = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked_files if not name.startswith((".github/", ".ci/"))} <= names
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        held = set(wheel.namelist())
        meta = wheel.read(f"plait_ml-{VERSION}.dist-info/METADATA").decode()
    assert {name.removeprefix("src/") for name in tracked_files if name.startswith("src/plait/")} <= held
    assert f"plait_ml-{VERSION}.dist-info/licenses/NOTICE" in held
    assert distributions["wheel"].stat().st_size < 5e6
    description = meta.partition("\n\n")[2]
    assert not re.findall(r"\]\((?!https://|#)", description), "links on the package index must be absolute"


@pytest.mark.slow
def test_the_wheel_brings_its_kernels(bare: Path, distributions: dict[str, Path], tmp_path: Path) -> None:
    """Where the machine that built it had a compiler: they load without one, and are for this system alone."""
    if compiler() is None:
        pytest.skip("no compiler here")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", distributions["wheel"].name)
    checked = run(bare, ROOT / "tests" / "check_wheel.py", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_bare_wheel_works(bare: Path, tmp_path: Path) -> None:
    """Every command answers; files become a model that is measured and used; what lacks an extra says what to type."""
    where = run(bare, "-c", "import plait; print(plait.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(bare.parent.parent), where
    answered = run(bare, "-c", EVERY_HELP, cwd=tmp_path)
    assert answered.returncode == 0, answered.stdout
    assert len(answered.stdout.splitlines()) > 25

    def plait(*arguments: object, code: int = 0) -> str:
        done = run(bare, "-m", "plait", *arguments, cwd=tmp_path)
        assert done.returncode == code and "Traceback" not in done.stdout, (arguments, done.stdout)
        return done.stdout

    write_world(tmp_path / "files", 48)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("steps: 160", "steps: 20").replace("_steps: 60", "_steps: 10"))
    plait("prepare", "files", "-o", "data")
    plait("train", "data", "-o", "run", "--recipe", "recipe.yaml", "--save-every", 10)
    plait("evaluate", "run", "--reference-seconds", 1)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "files/media/0.png" in plait("classify", "run", "files/media/0.png")
    for arguments in (
        ("recipes",), ("sizes",), ("plan", "fashion"), ("checkpoint", "list", "run"), ("doctor", "run"),
        ("describe", "run", "files/media/0.png"), ("transcribe", "run", "files/media/0.wav"),
        ("draw", "run", "red bar", "-o", "drawn.png"), ("speak", "run", "red bar", "-o", "said.wav"),
        ("generate", "run", "red", "--max-new-tokens", 3), ("embed", "run", "red", "-o", "red.npy"),
        ("explain", "run", "files/media/0.png", "-o", "why.html"),
        ("export", "run", "--to", "transformers", "-o", "exported"),
    ):  # fmt: skip
        plait(*arguments)
    for extra, arguments in (
        ("serve", ("serve", "run")),
        ("serve", ("key", "keys.txt")),
        ("search", ("index", "add", "an.index", "files", "--model", "run")),
        ("search", ("search", "an.index", "red")),
        ("tune", ("tune", "data", "-o", "study", "--trials", 1)),
        ("onnx", ("export", "run", "--to", "onnx", "-o", "onnx")),
        ("explain", ("explain", "run", "files/media/0.png", "--method", "integrated-gradients", "-o", "x.html")),
        ("hub", ("prepare", "hf:nobody/nothing", "-o", "hub")),
    ):
        assert install_command(extra) in plait(*arguments, code=1), (extra, arguments)
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "study").exists()
