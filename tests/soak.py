"""Faults and how a run survives them: each case prints its count, `R1 50/50`. See docs/explanation/reliability.md.

    python tests/soak.py                     # all cases in full: make soak
    python tests/soak.py R1 R8 --count 5     # some, shorter
    python tests/soak.py --short             # a few of most, as in make test

Runs are children forked from one process that has loaded everything, so that a kill costs no start. They are killed,
stopped, starved of disk and lied to about the time; then the same command goes on, and what it leaves must equal, to
the bit, what a run leaves that nothing happened to: every loss, the record ids of every step, weights, optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from faults import BATCH, EPOCH, EVERY, STEPS, VALIDATIONS, Place, fork, plait, steps_done, until
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.samples import Samples
from plait.model import checkpoint as checkpoints
from plait.training.log import Log
from soak_saves import r2, r4

# --- cases ------------------------------------------------------------------------------------------------------


def r1(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """SIGKILL at any time: one in eight while the run prepares, the others at any step."""
    good = after = 0
    for trial in range(count):
        run = place.root / "r1"
        place.clear("r1")
        child = place.start("r1")
        early = trial % 8 == 7
        moment = draw.randrange(1, STEPS)
        if not early and not until(lambda run=run, moment=moment: steps_done(run) >= moment, child):
            raise RuntimeError(child.said.read_text())
        time.sleep(draw.uniform(0, place.seconds / 5 if early else 2 * place.seconds / STEPS))
        child.kill()
        saved, wrong = checkpoints.newest_whole(run / "checkpoints")
        begun = place.finish("r1")
        after += saved > 0
        assert begun >= saved, f"went on from {begun} though {saved} was saved"
        assert not wrong, wrong
        good += 1
    return good, f"{after} of the kills after a save; none went on from before the last save"


def r3(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """Five kills within one epoch, one at its exact end; data prepared by 0, 1 and 2 workers."""
    good = 0
    for trial in range(count):
        place.clear("r3")
        epoch = draw.randrange(STEPS // EPOCH - 1)
        moments = sorted(draw.sample(range(1, EPOCH), 4))
        for step in [*(epoch * EPOCH + m for m in moments), (epoch + 1) * EPOCH]:
            said = place.said("r3")
            child = fork(dying(place.train("r3", trial % 3), place.root / "r3", step), said)
            assert child.wait() == -signal.SIGKILL, said.read_text()
        place.finish("r3", trial % 3)
        rows = [json.loads(line) for line in (place.root / "r3" / "records.jsonl").read_text().splitlines()]
        ids = [name for row in rows[epoch * EPOCH : (epoch + 1) * EPOCH] for name in row["records"]]
        assert len(ids) == len(set(ids)) == EPOCH * BATCH, "a record was missed or seen twice"
        good += 1
    return good, "each record once an epoch, in the same order"


def dying(work: Callable[[], None], run: Path, step: int) -> Callable[[], None]:
    """Work whose process kills itself the moment that a step has been written down."""

    def doomed() -> None:
        write = Log.write_records

        def deadly(self: Log, number: int, loss: float, ids: list[str]) -> None:
            write(self, number, loss, ids)
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

        Log.write_records = deadly  # type: ignore[method-assign]
        work()

    return doomed


def r7(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """SIGTERM while it prepares, in its first batch, in a step, in validation, in a save: out within 30 s."""
    good, slowest = 0, 0.0
    validation = STEPS // VALIDATIONS
    for trial in range(count):
        run = place.root / "r7"
        place.clear("r7")
        child = place.start("r7")
        moment = draw.randrange(2, STEPS - 1)
        moments: list[Callable[[], object]] = [
            lambda run=run: (run / "tokenizer.json").exists(),
            lambda run=run: (run / "records.jsonl").exists(),
            lambda run=run, moment=moment: steps_done(run) >= moment,
            lambda run=run, n=draw.randrange(1, VALIDATIONS): steps_done(run) >= n * validation,
            lambda run=run, moment=moment: steps_done(run) >= moment and any(run.glob("checkpoints/.step-*.tmp")),
        ]
        if until(moments[trial % len(moments)], child):
            os.kill(child.pid, signal.SIGTERM)
        begun = time.monotonic()
        code = child.wait(40)
        slowest = max(slowest, time.monotonic() - begun)
        done, text = steps_done(run), child.said.read_text()
        if code:  # else it had just ended
            assert code == 143 and "Stopped by SIGTERM" in text and "Traceback" not in text, (code, text)
            assert checkpoints.newest_whole(run / "checkpoints")[0] == done, "not saved where it stopped"
        assert place.finish("r7") == (done if code else 0)
        good += 1
    return good, f"slowest exit {slowest:.1f} s, code 143, nothing lost"


def r8(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """A full disk: the path is named, what was saved stays whole, and with room the run goes on to the same end."""
    if os.geteuid() or not shutil.which("mount"):
        return 0, "skipped: needs root, to mount a small file system"
    used = sum(f.stat().st_size for f in (place.root / "whole").rglob("*") if f.is_file() and not f.is_symlink())
    good, named = 0, []
    for trial in range(count):
        disk = place.root / "disk"
        disk.mkdir(exist_ok=True)
        room = int(used * (0.15 + 0.8 * trial / max(count - 1, 1)))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
        try:
            child = fork(place.train("disk/run"), place.root / "r8.txt")
            code, text = child.wait(), child.said.read_text()
            child.said.unlink()
            assert code == 1 and f"{disk}/run" in text and "Traceback" not in text, (code, text)
            path = re.search(rf"{disk}/run/?([^\s:]*)", text)
            named.append(re.sub(r"step-\d+", "step-N", path[1] if path else "?"))
            saved, wrong = checkpoints.newest_whole(disk / "run" / "checkpoints")
            assert not wrong, wrong
            subprocess.run(["mount", "-o", f"remount,size={3 * used}", disk], check=True)
            place.said("disk/run").unlink(missing_ok=True)
            assert place.finish("disk/run") == saved
            good += 1
        finally:
            subprocess.run(["umount", disk], check=True)
    return good, "named: " + ", ".join(sorted(set(named)))


def r9(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """One bit changed, or the end cut off, in any file of a checkpoint, a manifest or a shard of a data set."""
    work = place.root / "r9"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(place.root / "whole" / "checkpoints", work / "checkpoints", symlinks=True)
    shutil.copytree(place.root / "data0", work / "data")
    steps = checkpoints.series(work / "checkpoints")
    newest, older = list(steps)[:2]
    files = [file for file in steps[newest].rglob("*") if file.is_file()]
    files += [work / "data" / "manifest.json", *(work / "data").glob("*.parquet")]
    good = 0
    for trial in range(count):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        at = draw.randrange(len(whole) - 1)  # the last byte may be a line's end, which means nothing
        broken = whole[:at]
        if draw.random() < 0.75:
            broken += bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        file.write_bytes(broken)
        if file.is_relative_to(work / "data"):
            try:
                Dataset.open(work / "data", verify=True)
            except PlaitError as error:
                good += file.name in str(error)
        else:
            found, wrong = checkpoints.newest_whole(work / "checkpoints")
            good += found == older and any(str(steps[newest]) in line for line in wrong)
        file.write_bytes(whole)
    assert checkpoints.newest_whole(work / "checkpoints") == (newest, [])
    return good, f"in {len(files)} files; each named, the newest whole checkpoint taken"


def r16(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """A second writer on a run's folder is refused, and told of the first."""
    place.clear("r16")
    first = fork(plait("train", place.root / "data0", "-o", place.root / "r16", "--minutes", 60), place.said("r16"))
    until(lambda: (place.root / "r16" / "run.json").exists(), first)
    good = 0
    for trial in range(count):
        said = place.root / f"second{trial}.txt"
        code = fork(place.train("r16"), said).wait()
        good += code == 1 and f"process {first.pid}" in said.read_text()
    first.kill()
    return good, "the first one's process named"


def r18(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """A clock that jumps by a day, and files whose times are equal or in disorder: steps order, not times."""
    good = 0
    for trial in range(count):
        place.clear("r18")
        child = fork(jumping(place.train("r18"), draw.choice([-86400, 86400])), place.said("r18"))
        moment = draw.randrange(3 * EVERY, STEPS - EVERY)
        assert until(lambda moment=moment: steps_done(place.root / "r18") >= moment, child)
        child.kill()
        now = time.time()
        saved = checkpoints.series(place.root / "r18" / "checkpoints")
        for age, path in enumerate(saved.values()):
            for file in (*path.rglob("*"), path):
                os.utime(file, (now, now + (0 if trial % 2 else 86400 * age)))
        assert place.finish("r18") == max(saved)
        good += 1
    return good, "went on from the newest step, to the same end"


def jumping(work: Callable[[], None], seconds: float) -> Callable[[], None]:
    """Work in which the clock of the day jumps between two readings."""

    def shifted() -> None:
        real, calls = time.time, [0]

        def clock() -> float:
            calls[0] += 1
            return real() + (seconds if calls[0] % 2 else 0)

        time.time = clock
        work()

    return shifted


def r20(place: Place, count: int, draw: random.Random) -> tuple[int, str]:
    """What an audio clip became turns into NaN on the disk while the run trains: it stops and names step and record."""
    good = 0
    for trial in range(count):
        place.clear("r20")
        run = place.root / "r20"
        child = fork(poisoned(place, "r20", EPOCH + trial), place.said("r20"))
        code, text = child.wait(), child.said.read_text()
        match = re.search(r"At step (\d+), audio of record (\S+) holds what is not a finite number", text)
        assert code == 1 and match and "Traceback" not in text, (code, text)
        row = json.loads((place.root / "whole" / "records.jsonl").read_text().splitlines()[int(match[1]) - 1])
        assert match[2] in row["records"] and steps_done(run) == int(match[1]) - 1, text
        saved, wrong = checkpoints.newest_whole(run / "checkpoints")
        assert saved >= int(match[1]) - 1 - EVERY and not wrong
        shutil.rmtree(run / "cache")
        assert place.finish("r20") == saved
        good += 1
    return good, "step and record named, the checkpoint kept, and with the audio mended the same end"


def poisoned(place: Place, name: str, step: int) -> Callable[[], None]:
    """Work that spoils one sample on the disk after a step; the run has that file mapped into its memory."""

    def spoil() -> None:
        write = Log.write_records

        def deadly(self: Log, number: int, loss: float, ids: list[str]) -> None:
            write(self, number, loss, ids)
            if number == step:
                path = place.root / name / "cache" / "train-audio"
                samples = Samples.open(path)
                raw = np.memmap(path.with_name(path.name + ".raw"), samples.flat.dtype, "r+")
                width = samples.flat[0].size
                raw[samples.offsets[7] * width : samples.offsets[8] * width] = np.nan
                raw.flush()

        Log.write_records = deadly  # type: ignore[method-assign]
        place.train(name)()

    return spoil


def main() -> None:
    cases = {
        "R1": (r1, 50, 2), "R2": (r2, 0, 6), "R3": (r3, 20, 0), "R4": (r4, 100, 5), "R7": (r7, 20, 1),
        "R8": (r8, 10, 1), "R9": (r9, 500, 40), "R16": (r16, 20, 0), "R18": (r18, 10, 0), "R20": (r20, 1, 1),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(cases))
    parser.add_argument("--count", type=int, help="so many of each")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.cases) - cases.keys():
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(cases)}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = False
    with tempfile.TemporaryDirectory(prefix="plait-soak-") as folder:
        place = Place(Path(folder) / "place")
        for name in options.cases or cases:
            case, full, short = cases[name]
            if options.short and not short:
                continue
            count = options.count or (short if options.short else full)
            begun = time.monotonic()
            try:
                good, note = case(place, count, random.Random(options.seed))
                count = count or int(note.split()[0])
            except Exception as error:
                good, note = -1, f"{type(error).__name__}: {str(error)[-2000:]}"
            skipped = note.startswith("skipped")
            failed |= good != count and not skipped
            state = "skipped" if skipped else "FAILED" if good < 0 else f"{good}/{count}"
            print(f"{name} {state}  {note.removeprefix('skipped: ')}  ({time.monotonic() - begun:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
