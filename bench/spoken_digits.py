"""Recorded spoken digits: every speaker left out in turn, and the official split (recordings 0 to 4 are the test).

    python bench/spoken_digits.py DATA/fsdd/fsdd_5speakers_wav.zip -o runs/spoken_digits

Each split becomes an ordinary folder with `metadata.csv` and goes through prepare, train and evaluate with
the recipe `spoken_digits`. Prints accuracy on the speaker that the run never heard, and their mean.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import zipfile
from pathlib import Path

import torch

from plait.core.config import load_recipe
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.evaluation.tasks import evaluate
from plait.inference.model import load
from plait.training.trainer import train

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_split(wavs: dict[str, bytes], folder: Path, speaker: str | None) -> None:
    """The recordings as files with a table; `speaker` is the test, or the official split's where None."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "digit", "split"])
        for name, data in sorted(wavs.items()):
            found = re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", name)
            if not found:
                raise SystemExit(f"{name} is not named DIGIT_SPEAKER_INDEX.wav")
            held_out = found[2] == speaker if speaker else int(found[3]) < 5
            (folder / name).write_bytes(data)
            table.writerow([name, NAMES[int(found[1])], "test" if held_out else "train"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the zip of wav files")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/spoken_digits"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="these speakers, or 'official'")
    options = parser.parse_args()
    with zipfile.ZipFile(options.source) as archive:
        wavs = {Path(n).name: archive.read(n) for n in archive.namelist() if n.endswith(".wav")}
    speakers = sorted({name.split("_")[1] for name in wavs})
    budget = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
    training = {**budget, "seed": options.seed}
    recipe = load_recipe("spoken_digits", {"training": training})
    figures = {}
    for held_out in options.only or [*speakers, "official"]:
        run = options.out / held_out
        if not (run / "data" / "manifest.json").exists():
            write_split(wavs, run / "files", None if held_out == "official" else held_out)
            prepare(run / "files", run / "data")
        torch.manual_seed(options.seed)
        dataset = Dataset.open(run / "data")
        train(dataset, run / "run", recipe, lambda progress: None)
        metrics, _ = evaluate(load(run / "run"), dataset, reference_seconds=10)
        figure = metrics["recognition/audio-digit/accuracy"]
        figures[held_out] = figure
        print(f"{held_out:10} {figure['value']:.4f} ± {figure['stderr']:.4f}  (n {figure['n']}, chance .1, "
              f"small CNN given 10 s {figure['baseline']:.4f})", flush=True)  # fmt: skip
    left_out = [figures[s]["value"] for s in speakers if s in figures]
    if left_out:
        print(f"mean of {len(left_out)} speakers left out: {sum(left_out) / len(left_out):.4f}")
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
