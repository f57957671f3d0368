"""How the loss of an encoder that learns labels fell: kept beside its weights, shown in the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from plait.core.files import read_json, write_json

FOLDER = "recognisers"  # in a run's folder: `image.safetensors`, `image.json`; of later parts `image-1.json`


@dataclass
class EncoderCurve:
    """Mean losses in nats (N,), and the steps (N,) that they stand at."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        """Take in the loss at a step."""
        self.steps.append(step)
        self.losses.append(round(loss, 5))

    def write(self, path: Path) -> None:
        """Write a file that `read_curves` reads."""
        write_json(path, {"steps": self.steps, "losses": self.losses})


def read_curves(run: Path) -> dict[str, EncoderCurve]:
    """Encoder -> its losses over all parts of a run; none of a run whose encoders learnt no labels."""
    curves: dict[str, EncoderCurve] = {}
    for path in sorted((run / FOLDER).glob("*.json"), key=_part):
        one, facts = curves.setdefault(path.stem.partition("-")[0], EncoderCurve()), read_json(path)
        one.steps += facts["steps"]
        one.losses += facts["losses"]
    return curves


def _part(path: Path) -> int:
    return int(path.stem.partition("-")[2] or 0)
