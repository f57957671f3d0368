"""The faults of a save itself: killed at each of its system calls (R2), and weights that change under it (R4)."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from faults import Child, Place, fork
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.training.checkpointing import Position, Saver, restore
from plait.training.distributed import Group
from plait.training.optimizer import make_optimizer

CALLS = (
    "write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "rename", "renameat", "renameat2", "unlink",
    "unlinkat", "rmdir", "mkdir", "mkdirat", "symlink", "symlinkat",
)  # fmt: skip


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


class _Saving:
    """A real model of a run, saved with every parameter equal to the number of the step."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.whole: Checkpoint = checkpoints.load(place.root / "whole" / "checkpoints" / "last")
        self.optimizer = make_optimizer([self.whole.model], 1e-3, 0.0, (0.9, 0.98))
        self.saver = Saver(folder, 1, None, Group())

    def save(self, step: int) -> None:
        _fill(self.whole.model, step)
        self.saver.save(self.whole, self.optimizer, None, Position(step=step))

    def holds(self) -> int:
        """The step that a resuming run finds; its weights are read as a run reads them."""
        self.saver.join()
        folder, wrong = self.saver.start()
        if folder is None:
            return 0
        assert not wrong, wrong
        position = restore(folder, self.whole.model, self.optimizer, None)
        assert all(bool((p == position.step).all()) for p in self.whole.model.parameters())
        return position.step


def r4(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """Weights change right after an asynchronous save returns; the file holds those of the call."""
    folder = place.root / "r4"
    good = 0

    def work() -> None:
        saving = _Saving(place, folder)
        for step in range(1, count + 1):
            saving.save(step)
            _fill(saving.whole.model, -1)
            saving.saver.wait()
            found = load_file(folder / "last" / "model.safetensors")
            trained = [name for name, _ in saving.whole.model.named_parameters()]
            assert all(bool((found[name] == step).all()) for name in trained), f"step {step} was torn"
            with (folder / "good").open("a") as file:
                file.write(".")

    shutil.rmtree(folder, ignore_errors=True)
    said = place.root / "r4.txt"
    assert fork(work, said).wait() == 0, said.read_text()
    good = len((folder / "good").read_text())
    return good, "files equal to the weights at the call"


def r2(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """SIGKILL at each system call of two saves that writes, makes, renames or removes something; `count` of them where
    it is not 0. And what a loss of power needs: files fsynced, renamed, the folder fsynced, in this order."""
    if not shutil.which("strace"):
        return 0, "skipped: needs strace"
    points = []
    for second in (False, True):
        trace, code = _traced(place, second, [])
        assert code == 0, trace
        _durable(trace)
        seen: Counter[str] = Counter()
        for _, call, text in _calls(trace):
            seen[call] += 1
            if "checkpoints" in text:
                points.append((second, call, seen[call]))
    chosen = points if not count else draw.sample(points, min(count, len(points)))
    good = 0
    for second, call, when in chosen:
        trace, code = _traced(place, second, ["-e", f"inject={call}:signal=SIGKILL:when={when}"])
        assert code == -signal.SIGKILL, (call, when, code)
        folder = place.root / "r2" / "checkpoints"
        before = 2 if second else 1
        for link in ("best", "last"):
            assert not checkpoints.verify(folder / link), f"{link} is not whole after {call} {when}"

        def recover(folder: Path = folder, before: int = before) -> None:
            saving = _Saving(place, folder)
            found = saving.holds()
            assert found in (before, before + 1), found
            saving.save(found + 1)
            assert saving.holds() == found + 1
            left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
            assert not left, left

        said = place.root / "r2.txt"
        assert fork(recover, said).wait() == 0, f"after {call} {when}: {said.read_text()[-1500:]}"
        good += 1
    return good, f"{len(chosen)} of {len(points)} calls of two saves; a whole checkpoint after each, links too"


def _traced(place: Place, second: bool, inject: list[str]) -> tuple[str, int]:
    """Save thrice, with strace at the second or the third; its log and the exit code. Only the thread that writes is
    counted: it is new with each save, and strace counts the calls of each thread apart."""
    folder = place.root / "r2" / "checkpoints"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()

    def work() -> None:
        saving = _Saving(place, folder)
        for step in (1, 2, 3):
            if step == 2 + second:
                os.write(ready_w, b".")
                os.read(go_r, 1)
            saving.save(step)
            saving.saver.wait()
            if step == 2 + second:
                os._exit(0)

    said = place.root / "r2.txt"
    said.unlink(missing_ok=True)
    child: Child = fork(work, said)
    os.close(ready_w)
    assert os.read(ready_r, 1), said.read_text()
    log = place.root / "strace.txt"
    log.unlink(missing_ok=True)
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(CALLS)}", *inject]
    tracer = subprocess.Popen([*command, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    while "attached" not in (line := tracer.stderr.readline()):
        if not line:
            raise RuntimeError("strace did not attach")
        time.sleep(0.001)
    os.write(go_w, b".")
    code = child.wait()
    tracer.communicate()
    for handle in (ready_r, go_r, go_w):
        os.close(handle)
    return log.read_text(), code


def _calls(trace: str) -> list[tuple[str, str, str]]:
    """(thread, call, the line) of the thread that saves: the one with most calls."""
    found = [(m[1], m[2], m[0]) for m in re.finditer(r"^(\d+) +(\w+)\(.*$", trace, re.MULTILINE)]
    busiest = Counter(thread for thread, _, _ in found).most_common(1)[0][0]
    return [call for call in found if call[0] == busiest]


def _durable(trace: str) -> None:
    """Assert the order that survives a loss of power, from the log of one save."""
    wet: set[str] = set()  # written or made since their last fsync
    stale: set[str] = set()  # folders whose entries changed since their last fsync
    published = 0
    for _, call, text in _calls(trace):
        if call in ("write", "pwrite64", "writev", "ftruncate") and (match := re.search(r"\(\d+<(.+?)>", text)):
            wet.add(match[1])
        elif call in ("fsync", "fdatasync") and (match := re.search(r"\(\d+<(.+?)>", text)):
            wet.discard(match[1])
            stale.discard(match[1])
        elif call.startswith("mkdir"):
            stale.add(str(Path(_names(text)[0])))
        elif call.startswith("symlink"):
            stale.add(str(Path(_names(text)[1]).parent))
        elif call.startswith("rename"):
            source, target = _names(text)
            if Path(source).parent == Path(target).parent and ".tmp" in str(Path(target).parent):
                # safetensors writes aside on its own account, within the folder that is not yet published
                wet = {target if path == source else path for path in wet}
                continue
            if target.endswith((".tmp", ".old")):  # out of the way, to be removed
                stale.add(str(Path(target).parent))
                continue
            assert not [path for path in wet if path.startswith(source)], f"renamed before fsync: {wet}"
            if not Path(source).name.startswith((".best", ".last")):
                assert source not in stale, f"{source} was renamed before its own fsync"
            else:
                assert published, "pointed at before it was published"
            stale.discard(source)
            stale.add(str(Path(target).parent))
            published += 1
    assert published == 3, f"{published} publications: a folder and two links were expected"
    assert not wet and not stale, f"never fsynced: {wet | stale}"


def _names(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)
