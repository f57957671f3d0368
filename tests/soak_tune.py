"""A study whose default learning rate is 30 times too high, killed again and again: no trial lost or doubled, the
default mended. Prints what it counted, and ends with code 1 where something does not hold.

python tests/soak_tune.py FOLDER [--trials 20] [--steps 60] [--kills 2] [--processes 2] [--speech]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from plait.core.config import SIZES, load_recipe
from plait.data.demo_data import write_demo, write_images

RATE = 30 * SIZES["tiny"].learning_rate


def make_data(folder: Path, speech: bool) -> Path:
    """The demo's images and names, on request with its voices."""
    data = folder / "data"
    if not (data / "manifest.json").is_file():
        if speech:
            write_demo(folder / "files", print)
        else:
            rows = list(write_images(folder / "files"))
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "files" / "metadata.jsonl").write_text(lines, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "plait", "prepare", folder / "files", "-o", data], check=True)
    return data


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def workers(process: int) -> list[int]:
    return [child for child in children(process) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def run(command: list[str], stop_after: int | None, draw: random.Random, worker_too: bool) -> tuple[int, list[str]]:
    """Start the study; kill it a while after so many trials came to their end. Returns its code and those trials."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    ended = []
    for line in process.stderr:
        print("   ", line.rstrip(), flush=True)
        number, _, rest = line.partition(": ")
        if number.isdecimal() and rest.startswith(("complete", "pruned", "failed")):
            ended.append(number)
            if worker_too and len(ended) == 1 and (alive := workers(process.pid)):
                print("    -- a worker is killed", flush=True)
                os.kill(draw.choice(alive), signal.SIGKILL)
            if stop_after is not None and len(ended) >= stop_after:
                time.sleep(draw.uniform(0, 4))
                print("    -- the study is killed", flush=True)
                process.kill()  # the one process; its workers must end by themselves
                break
    process.stderr.close()
    return process.wait(), ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("trials", 20), ("steps", 60), ("kills", 2), ("processes", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--speech", action="store_true")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    data, study = make_data(given.folder, given.speech), given.folder / "study"
    recipe = given.folder / "recipe.yaml"
    recipe.write_text(f"training: {{learning_rate: {RATE}, codec_steps: {given.steps}}}\n")
    command = [
        sys.executable, "-m", "plait", "tune", str(data), "-o", str(study), "--recipe", str(recipe),
        "--trials", str(given.trials), "--steps", str(given.steps), "--processes", str(given.processes),
    ]  # fmt: skip
    told: list[str] = []
    begun = time.monotonic()
    for kill in range(given.kills + 1):
        last = kill == given.kills
        code, ended = run(command, None if last else given.trials // (given.kills + 2), draw, worker_too=kill == 1)
        told += ended if not last else [n for n in ended if int(n) < given.trials]
        if last and code:
            sys.exit(f"The study ended with code {code}.")
    facts = json.loads((study / "study.json").read_text(encoding="utf-8"))
    numbers = [row["number"] for row in facts["trials"]]
    states = facts["counts"]
    best, verdict = facts["best"], facts["verdict"]
    checks = {
        f"{given.kills} kills of the study and 1 of a worker; {sum(states.values())} of {given.trials} trials came to "
        f"their end ({states})": sum(states.values()) == given.trials,
        "none lost or doubled": numbers == list(range(given.trials)),
        "none failed": states["failed"] == 0,
        "trial 0 is the default": facts["trials"][0]["params"]["learning_rate"] == RATE,
        f"learning rate {RATE:g} mended: {best['params']['learning_rate']:.4g}": best["params"]["learning_rate"]
        < RATE / 3,
        verdict["text"]: None in verdict["default"] or max(verdict["best"]) < min(verdict["default"]),
        "best.yaml is a recipe": load_recipe(study / "best.yaml").training.learning_rate
        == best["params"]["learning_rate"],
    }
    for name, holds in checks.items():
        print("holds" if holds else "FAILS", name)
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
