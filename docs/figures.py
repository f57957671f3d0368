"""Prints the tables of README.md and docs/benchmarks/quality.md from what commands left behind.

python docs/figures.py runs/demo runs/fashion
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SHOWN = {
    "recognition/{}/accuracy": "named right",
    "drawing/{}/judged_accuracy": "drawn right, by a judge of real data",
    "drawing/{}/judge_real": "the judge on real images",
    "drawing/{}/diversity": "diversity of what is drawn, real = 1",
    "drawing/{}/near_copies": "near copies of training images",
    "speaking/{}/judged_accuracy": "spoken right, by a judge of real data",
    "speaking/{}/judge_real": "the judge on real speech",
    "speaking/{}/diversity": "diversity of what is spoken, real = 1",
    "speaking/{}/near_copies": "near copies of training audio clips",
    "retrieval/{}/p_at_10": "right among the 10 nearest",
    "codec/{}/psnr": "codec, PSNR in dB",
}


def table(run: Path) -> str:
    metrics = json.loads((run / "metrics.json").read_text())
    lines = ["| | | | chance | baseline | n |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, metric in metrics.items():
        if "[" in name:
            continue  # of single classes
        task, direction, kind = name.split("/")
        label = SHOWN.get(f"{task}/{{}}/{kind}")
        if label:
            values = (metric[key] for key in ("value", "chance", "baseline"))
            value, chance, baseline = ("" if v is None else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}" for v in values)
            error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.3f}"
            shown = direction.replace("-", " → ")
            lines.append(f"| {shown} | {label} | {value}{error} | {chance} | {baseline} | {metric['n']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(f"{folder}\n\n{table(Path(folder))}\n")
