"""What differs between systems: signals, locks, links, limits. A run on a system that lacks what Linux has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import RECIPE, write_world
from plait.core import files, system
from plait.core import signals as plait_signals
from plait.core.errors import PlaitError, Terminated

# Read by every Python that starts with this folder on its path: what Windows lacks is not there, links are refused, and
# texts are in its code page unless somebody says otherwise.
ELSEWHERE = """
import os, select, signal, sys
import filelock, platformdirs.unix, psutil  # they serve each system by themselves
from huggingface_hub import scan_cache_dir  # as does its terminal

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "pwd", "grp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in ("sched_getaffinity", "sysconf", "fork", "getuid", "geteuid", "getloadavg", "killpg", "nice"):
    delattr(os, name)
for name in ("SIGALRM", "alarm", "setitimer", "pthread_kill"):
    delattr(signal, name)

def refuse(*arguments, **options):
    raise OSError(1314, "A required privilege is not held by the client")

os.symlink = refuse
select.select = refuse
"""


@pytest.mark.slow
def test_a_run_where_linux_is_missing(tmp_path: Path) -> None:
    """Prepare, train, be killed, go on, evaluate, classify: with the same weights as a run that was not killed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sitecustomize.py").write_text(ELSEWHERE, encoding="utf-8")
    source = str(Path(files.__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLAIT_NATIVE": "0",
                   "PYTHONPATH": os.pathsep.join([str(tmp_path / "elsewhere"), source])}  # fmt: skip

    def plait(*arguments: object) -> str:
        command = [sys.executable, "-m", "plait", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    write_world(tmp_path / "files", 48)
    recipe = RECIPE.replace("steps: 160", "steps: 20").replace("_steps: 60", "_steps: 5").replace("size: 24", "size: 8")
    (tmp_path / "recipe.yaml").write_text(recipe)
    plait("prepare", "files", "-o", "data", "--workers", 1)
    train = ("train", "data", "--recipe", "recipe.yaml", "--save-every", 4)
    plait(*train, "-o", "whole")
    killed = subprocess.Popen(
        [sys.executable, "-m", "plait", *map(str, train), "-o", "run"], cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while killed.poll() is None and not (tmp_path / "run" / "checkpoints" / "step-000008").is_dir():
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    plait(*train, "-o", "run")
    last = tmp_path / "run" / "checkpoints" / "last"
    assert not last.is_symlink() and files.link_target(last) == "step-000020"
    a, b = (load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("whole", "run"))
    assert a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)
    assert "last" in plait("checkpoint", "list", "run")
    plait("evaluate", "run", "--reference-seconds", 1)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "0.png" in plait("classify", "run", "files/media/0.png")
    assert "whole" in plait("checkpoint", "verify", "run")


def test_links_and_what_stands_in_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
    files.point(tmp_path / "link", "a")
    assert (tmp_path / "link").is_symlink() and files.link_target(tmp_path / "link") == "a"
    with monkeypatch.context() as patch:

        def refuse(*arguments: object, **options: object) -> None:
            raise OSError(1314, "A required privilege is not held by the client")

        patch.setattr(os, "symlink", refuse)
        for target in ("b", "a", "a"):
            files.point(tmp_path / "link", target)
            assert files.link_target(tmp_path / "link") == target and not (tmp_path / "link").is_symlink()
            assert (tmp_path / "link" / "inner" / "file").read_text() == target
        assert (tmp_path / "link" / "inner" / "file").samefile(tmp_path / "a" / "inner" / "file")
    files.point(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "inner" / "file").read_text() == "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]
    assert files.link_target(tmp_path / "a") is None


def test_one_writer(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from plait.core.files import only_writer\n"
        f"with only_writer(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert other.stdout is not None and other.stdout.readline().strip() == b"held"
    with pytest.raises(PlaitError, match=f"being written by process {other.pid}"), files.only_writer(tmp_path):
        pass
    other.kill()
    other.communicate()
    here = f"being written by process {os.getpid()}"
    with files.only_writer(tmp_path), pytest.raises(PlaitError, match=here), files.only_writer(tmp_path):
        pass
    with files.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("alarm", [True, False])
def test_the_grace_of_sigterm_ends(alarm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held longer than the grace is cut, by the alarm or, where there is none, by a timer."""
    if alarm and not hasattr(signal, "SIGALRM"):
        pytest.skip("this system has no alarm")
    monkeypatch.setattr(plait_signals, "GRACE", 1)
    if not alarm:
        monkeypatch.setattr(plait_signals, "ALARM", None)
    with plait_signals.signals() as listening:
        with pytest.raises(Terminated), listening.held():
            signal.raise_signal(signal.SIGTERM)
            assert listening.received == signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)  # a second one does not shorten the grace
            end = time.monotonic() + 30
            while time.monotonic() < end:
                threading.Event().wait(0.01)
        with pytest.raises(Terminated):
            listening.check()
    with plait_signals.signals() as listening, pytest.raises(KeyboardInterrupt), listening.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_line_is_waited_for_only_so_long() -> None:
    def begin(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)

    asked: list[int] = []

    def expired_at(count: int) -> Callable[[], bool]:
        return lambda: asked.append(1) is None and len(asked) >= count

    with begin("print('yes')") as process:
        assert system.read_line(process, lambda: False, 0.05) in (b"yes\n", b"yes\r\n")
        assert system.read_line(process, lambda: False, 0.05) == b""
    with begin("import time; time.sleep(600)") as process:
        assert system.read_line(process, expired_at(3), 0.02) is None
    assert len(asked) == 3 and process.returncode != 0


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert files.cache_folder("x") == tmp_path / "xdg" / "plait" / "x"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert files.cache_folder("x") == tmp_path / ".cache" / "plait" / "x"
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path}:elsewhere")
    assert files.cache_folder("x") == tmp_path / "x"


def test_processors_and_memory() -> None:
    assert 1 <= system.processors() <= (os.cpu_count() or 1)
    assert 0 < system.available_memory() <= system.total_memory()
    assert not system.is_running(os.getpid())
