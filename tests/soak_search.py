"""The faults of a search index at length: killed while it adds, deletes and compacts (R17), and two writers (R16).

    python tests/soak_search.py --model runs/demo             # 200 kills, 20 second writers
    python tests/soak_search.py --model runs/demo R17 --count 20

A child does one thing to an index and says what is done; it is killed at a uniform time of what that thing took before.
Then every id whose adding was acknowledged and whose deletion had not begun must be there, none whose deletion was
acknowledged, a deletion that was not must have happened wholly or not at all, and every file and entry must be whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lancedb  # noqa: F401 - once here, not once in every child
import numpy as np
from PIL import Image

from plait.core.errors import PlaitError
from plait.inference.model import PlaitModel, load
from plait.search import adding as indexing
from plait.search import index as searching
from plait.search.index import Index

warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)


def child(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """A forked process at work: its id, and the end of a pipe on which it tells. LanceDB starts its threads anew in a
    child; only children ever open an index."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 1
    try:
        os.close(reading)
        work(lambda text: os.write(writing, f"{text}\n".encode()) and None)
        code = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(writing, f"error {type(error).__name__}: {' '.join(str(error).split())}\n".encode())
    finally:
        os._exit(code)


def heard(process: int, reading: int, seconds: float | None = None) -> tuple[list[str], float]:
    """What a child told, and how long it lived; killed after `seconds`, where they are given."""
    begun, told = time.monotonic(), b""
    while True:
        left = None if seconds is None else begun + seconds - time.monotonic()
        if left is not None and (left <= 0 or not select.select([reading], [], [], left)[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            seconds = None
        piece = os.read(reading, 65536)
        if not piece:
            break
        told += piece
    os.close(reading)
    os.waitpid(process, 0)
    return told.decode().splitlines(), time.monotonic() - begun


def listed(index: Index) -> list[str]:
    return sorted(index.table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist())


def r17(model: PlaitModel, folder: Path, count: int, draw: random.Random) -> tuple[int, list[str]]:
    """Killed in add, delete and compact."""
    indexing.COMMIT = searching.BATCH = 16
    files, place = folder / "files", folder / "index"
    files.mkdir()
    rng = np.random.default_rng(0)
    for i in range(64 * (count + 2)):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(files / f"{i:06d}.png")
    paths = sorted(files.iterdir())
    there: set[str] = set()  # known to be in the index
    unsure: list[set[str]] = []  # of what was killed: each of these, for deletions all of them together
    usual = {"add": 0.5, "delete": 0.1, "compact": 0.2}
    good, wrong, at = 0, [], 0
    for turn in range(count + 3):  # the first three are not killed: they show how long each takes
        kind = ("add", "delete", "compact")[turn % 3]
        some = [str(path.resolve()) for path in paths[at : at + 64]]
        picked = sorted(there)[turn % 7 :: 5]

        def work(
            tell: Callable[[str], None], kind: str = kind, some: list[str] = some, picked: list[str] = picked
        ) -> None:
            index = Index(place, model)
            tell("ready")
            if kind == "add":
                index.add(some, progress=lambda stage, done, total: tell(f"{stage} {done}"))
            elif kind == "delete":
                index.delete("id IN ({})".format(", ".join(f"'{name}'" for name in picked)))
            else:
                index.compact()
            tell("done")

        process, reading = child(work)
        opened = os.read(reading, 6) == b"ready\n"  # the clock starts when the index is open
        told, lived = heard(process, reading, None if turn < 3 else draw.uniform(0, usual[kind] * 1.1))
        if turn < 3 or "done" in told:
            usual[kind] = 0.5 * usual[kind] + 0.5 * lived if turn >= 3 else lived
        errors = [line for line in told if line.startswith("error")]
        acknowledged = max((int(line.split()[1]) for line in told if line.startswith("add ")), default=0)
        if kind == "add":
            there |= set(some[:acknowledged])
            unsure = [{name} for name in some[acknowledged:]] if "done" not in told else []
            at += 64
        elif kind == "delete":
            there -= set(picked)
            unsure = [set(picked)] if "done" not in told and picked else []
        else:
            unsure = []

        def check(tell: Callable[[str], None]) -> None:
            index = Index(place)
            for name in listed(index):
                tell(f"id {name}")
            for line in index.verify():
                tell(f"wrong {line}")

        seen, _ = heard(*child(check))
        found = {line[3:] for line in seen if line.startswith("id ")}
        faults = (
            errors + [line for line in seen if not line.startswith("id ")] + ([] if opened else ["it did not open"])
        )
        if there - found:
            faults.append(f"{len(there - found)} acknowledged ids are missing")
        allowed = set().union(*unsure) if unsure else set()
        if found - there - allowed:
            faults.append(f"{len(found - there - allowed)} ids are there that were not added or had been deleted")
        if any(group & found and not group <= found for group in unsure):
            faults.append("a deletion happened by half")
        there = found
        if turn >= 3:
            good += not faults
            wrong += [f"turn {turn}, {kind}: {fault}" for fault in faults]
    return good, wrong


def r16(model: PlaitModel, folder: Path, count: int, draw: random.Random) -> tuple[int, list[str]]:
    """A second writer is refused, with the process id of the first."""
    place, image = folder / "two", folder / "one.png"
    Image.new("RGB", (8, 8), "red").save(image)
    good, wrong = 0, []
    for turn in range(count):

        def first(tell: Callable[[str], None]) -> None:
            index = Index(place, model)
            with index._writing():
                tell("held")
                time.sleep(30)

        def second(tell: Callable[[str], None]) -> None:
            try:
                Index(place, model).add(image)
                tell("added")
            except PlaitError as error:
                tell(f"refused {error}")

        holder, reading = child(first)
        assert os.read(reading, 5) == b"held\n"
        said, _ = heard(*child(second))
        os.kill(holder, signal.SIGKILL)
        heard(holder, reading)
        after, _ = heard(*child(second))  # the lock goes with its holder
        if len(said) == 1 and said[0].startswith("refused") and f"process {holder}." in said[0] and after == ["added"]:
            good += 1
        else:
            wrong.append(f"turn {turn}: {said} {after}")
    return good, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=["R16", "R17"])
    parser.add_argument("--model", default="runs/demo", help="a run that reads images")
    parser.add_argument("--count", type=int, help="R17: kills (200); R16: second writers (20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loaded = load(options.model, "cpu")
    assert isinstance(loaded, PlaitModel)
    failed = False
    for name, work, usual in (("R16", r16, 20), ("R17", r17, 200)):
        if name in options.faults:
            begun, count = time.monotonic(), options.count or usual
            with tempfile.TemporaryDirectory() as folder:
                good, wrong = work(loaded, Path(folder), count, random.Random(options.seed))
            print(f"{name}: {good}/{count} in {time.monotonic() - begun:.0f} s")
            for line in wrong[:20]:
                print(f"  {line}")
            failed |= good < count
    sys.exit(failed)


if __name__ == "__main__":
    main()
