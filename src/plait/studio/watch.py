"""What a model could do at several times of its training, as the run wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.modalities.media import sniff
from plait.studio.progress import rows
from plait.studio.workspace import safe_path

FOLDER, FILE = "samples", "samples.jsonl"
TIMES = 4  # that stand side by side, the last one among them


@dataclass(frozen=True)
class Watched:
    """What one part of a training does with the same inputs at several times.

    Attributes:
        stage: "encoder", "codec" or "model".
        name: The modality of an encoder or codec.
        steps: When, in steps of the part.
        shares: Of held-out records that were named right at each time, None where that was not measured.
        rows: One for each input: the sample that it is asked by, and the sample of each time.
        error: What went wrong in making the last sample.
    """

    stage: str
    name: str
    steps: list[int]
    shares: list[float | None]
    rows: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    error: str = ""


def read_watched(run: Path) -> list[Watched]:
    """What a run wrote about its parts, the newest part first."""
    parts: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows(run / FOLDER / FILE, {"stage", "name", "step"}):
        parts.setdefault((row["stage"], row["name"]), {})[int(row["step"])] = row
    watched = [_watched(run, stage, name, by_step) for (stage, name), by_step in parts.items()]
    return watched[::-1]


def _watched(run: Path, stage: str, name: str, by_step: dict[int, dict[str, Any]]) -> Watched:
    with_samples = [by_step[step] for step in sorted(by_step) if by_step[step].get("samples")]
    error = str(by_step[max(by_step)].get("error", ""))
    if not with_samples:
        return Watched(stage, name, [], [], [], error)
    times = sorted({round(i * (len(with_samples) - 1) / max(TIMES - 1, 1)) for i in range(TIMES)})
    chosen = [with_samples[i] for i in times]
    count = min(len(row["samples"]) for row in chosen)
    rows = []
    for place in range(count):
        prompt = chosen[-1]["samples"][place]
        kind = _kind(run / FOLDER / prompt["asked_file"]) if prompt["asked_file"] else "text"
        rows.append(({**prompt, "asked_kind": kind}, [row["samples"][place] for row in chosen]))
    return Watched(stage, name, [row["step"] for row in chosen], [row.get("share") for row in chosen], rows, error)


def sample_file(run: Path, name: str) -> Path:
    """A medium that a run wrote. Raises PlaitError where there is none of that name."""
    path = safe_path(run / FOLDER, name)
    if not path.is_file() or path.name == FILE:
        raise PlaitError("There is no such sample.")
    return path


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            sniffed = sniff(file.read(64))
    except OSError:
        sniffed = None
    return sniffed[0] if sniffed else "text"
