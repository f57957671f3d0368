"""Many processes and what happens to them: R5 and R6 of docs/how-to/cluster.md, and SIGTERM; each prints its count.

    python tests/soak_processes.py               # in full: make soak
    python tests/soak_processes.py R6 --count 3  # some, shorter

Every run is begun by `plait train --processes`, disturbed, and gone on with by the same command; in the end its steps
must have had the records of a run of one process that nothing happened to, and losses within 1e-5 of that run's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

from conftest import write_world
from plait.data.prepare import prepare
from several import begin, rows, workers, write_recipe

STEPS = 60
GRACE = 30  # seconds in which all processes must have ended


class Place:
    """The data, the undisturbed run, and the runs beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"
        prepare(write_world(root / "files"), self.data)
        self.recipe = write_recipe(root, steps=STEPS)
        ends(self.go("whole", 1), 0.0)
        self.whole = rows(root / "whole")
        assert len(self.whole) == STEPS

    def go(self, name: str, processes: int, *options: object, after: int | None = None) -> subprocess.Popen[str]:
        """A run, and wait until so many steps are done."""
        return begin(self.data, self.root / name, self.recipe, *options, after=after, processes=processes)

    def worst(self, name: str) -> float:
        """The largest relative difference of a loss; the records of each step must be the same."""
        mine = rows(self.root / name)
        assert [row["records"] for row in mine] == [row["records"] for row in self.whole], name
        return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(mine, self.whole, strict=True))


def ends(started: subprocess.Popen[str], since: float) -> tuple[float, str]:
    """Seconds until a launcher and its processes were gone, and what they said."""
    said, _ = started.communicate(timeout=600)
    return time.monotonic() - since, said


def r5(place: Place, count: int, draw: random.Random) -> tuple[int, int, str]:
    """All ways from one number of processes to a second and a third, with SIGTERM between, replicated and sharded."""
    plans = [
        (how, plan)
        for how in ("ddp", "fsdp")
        for plan in product((1, 2, 3), repeat=3)
        if plan[0] != plan[1] and plan[1] != plan[2]
    ]
    worst = 0.0
    for how, plan in plans[:count]:
        shutil.rmtree(place.root / "r5", ignore_errors=True)
        for leg, processes in enumerate(plan):
            after = (leg + 1) * STEPS // 3 if leg < 2 else None
            options = ("--parallel", how, "--grad-accum-steps", draw.choice((1, 1 if processes == 3 else 2)))
            started = place.go("r5", processes, *options, after=after)
            if after is not None:
                started.terminate()
            _, said = ends(started, 0.0)
            assert started.returncode in (0, 143), said
        off = place.worst("r5")
        assert off < 1e-5, (how, plan, off)
        worst = max(worst, off)
    done = min(count, len(plans))
    return done, done, f"worst relative difference of a loss {worst:.1e}"


def disturbed(place: Place, count: int, draw: random.Random, name: str, signals: str) -> tuple[int, int, str]:
    longest = off = 0.0
    for trial in range(count):
        shutil.rmtree(place.root / name, ignore_errors=True)
        options = ("--parallel", ("ddp", "fsdp")[trial % 2], "--save-every", 5)
        while True:  # until it was caught in time
            started = place.go(name, 2, *options, after=draw.randrange(1, STEPS - 20))
            mine = workers(started.pid)
            if signals != "all":
                mine = mine[trial // 2 % 2 :][:1]
            since = time.monotonic()
            for process in mine if signals != "all" else [*mine, started.pid]:
                os.kill(process, signal.SIGKILL if signals == "kill" else signal.SIGTERM)
            seconds, said = ends(started, since)
            if len(rows(place.root / name)) < STEPS:
                break
            shutil.rmtree(place.root / name)
        assert seconds < GRACE and started.returncode != 0, (seconds, started.returncode, said)
        assert "Traceback" not in said, said
        if signals != "kill":
            assert f"Saved: step-{len(rows(place.root / name)):06d}" in said, said
        longest = max(longest, seconds)
        ends(place.go(name, 2, *options), 0.0)
        off = max(off, place.worst(name))
        assert off < 1e-5, off
    return count, count, f"all ended within {longest:.1f} s; worst relative difference of a loss {off:.1e}"


def r6(place: Place, count: int, draw: random.Random) -> tuple[int, int, str]:
    """SIGKILL to one of two processes: the other ends, not with success, and the same command goes on."""
    return disturbed(place, count, draw, "r6", "kill")


def two(place: Place, count: int, draw: random.Random) -> tuple[int, int, str]:
    """One process and two from beginning to end, with the threads that they have by default."""
    for name, processes in (("default-one", 1), ("two", 2)):
        started = begin(place.data, place.root / name, place.recipe, processes=processes, default_threads=True)
        _, said = ends(started, 0.0)
    place.whole = rows(place.root / "default-one")
    off = place.worst("two")
    return int(off < 1e-5), 1, f"worst relative difference of a loss {off:.1e} {said[-200:] if off > 1 else ''}"


def one(place: Place, count: int, draw: random.Random) -> tuple[int, int, str]:
    """SIGTERM to one of two processes: both save the same step and end."""
    return disturbed(place, count, draw, "one", "one")


def every(place: Place, count: int, draw: random.Random) -> tuple[int, int, str]:
    """SIGTERM to all processes and to what started them, as a cluster sends it."""
    return disturbed(place, count, draw, "all", "all")


CASES: dict[str, tuple[Callable[[Place, int, random.Random], tuple[int, int, str]], int]] = {
    "R5": (r5, 24), "R6": (r6, 20), "one": (one, 10), "two": (two, 1), "all": (every, 10),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for name in given.cases or CASES:
            case, count = CASES[name]
            begun = time.monotonic()
            good, tried, note = case(place, given.count or count, random.Random(given.seed))
            sys.stdout.write(f"{name} {good}/{tried} in {time.monotonic() - begun:.0f} s; {note}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
