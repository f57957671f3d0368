"""A run that is trained for longer: how it stood before, how it stands after, and which of the two is kept.

The best checkpoint of before is set aside while the run goes on; its files are linked, not copied. What it showed on
validation records is compared with what the new one shows on the same ones; where the new one is right less often, the
old one comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.files import link_files, link_target, point, publish_folder, read_json, remove_folder
from plait.core.objective import Objective
from plait.training.checkpointing import folder_name

ASIDE = "before"  # in a run's folder, while a further part of it is trained


@dataclass(frozen=True)
class Right:
    """The share of validation records that a classifier has right, and their number."""

    share: float
    records: int


@dataclass(frozen=True)
class Standing:
    """What the best checkpoint of a run showed on validation records.

    Attributes:
        step: Of the checkpoint.
        right: (source, target) -> what its classifiers have right; none of a run that recognises no labels.
        losses: Objective -> loss in nats.
    """

    step: int
    right: dict[tuple[str, str], Right]
    losses: dict[str, float]


def set_aside(run: Path) -> None:
    """Keep the best checkpoint of a run for `settle`, unless an earlier start of the same part has done that."""
    best = run / "checkpoints" / "best"
    if (run / ASIDE).exists() or not best.exists():
        return
    with publish_folder(run / ASIDE) as folder:
        link_files(best.resolve(), folder)


def forget(run: Path) -> None:
    """Drop what was set aside where going on was refused before it began: the run is as finished as it was."""
    if "finished" in read_json(run / "run.json") and (run / ASIDE).exists():
        remove_folder(run / ASIDE)


def settle(run: Path) -> list[str]:
    """Compare the best checkpoint with the one that was set aside, keep the better one, and return what to tell. No
    lines where none was set aside."""
    aside, best = run / ASIDE, run / "checkpoints" / "best"
    if not aside.exists():
        return []
    before, after = _standing(aside), _standing(best)
    lines = [_line(pair, one, after.right[pair]) for pair, one in _pairs(before, after).items()]
    if lines and _gain(before, after) < 0:
        _restore(run, before.step)
        return [*lines, "That is no better: the model of before is kept."]
    remove_folder(aside)
    if after.step <= before.step:
        return [*lines, f"No validation was better than before: the checkpoint of step {before.step:,} is kept."]
    if not lines:
        shown = ", ".join(
            f"{Objective.parse(name).short} {before.losses[name]:.3f} -> {loss:.3f}"
            for name, loss in after.losses.items()
            if name in before.losses
        )
        return [f"Validation loss, before -> after: {shown}."] if shown else []
    return lines if _gain(before, after) > 0 else [*lines, "That is as good as before, and no better."]


def _standing(checkpoint: Path) -> Standing:
    training = read_json(checkpoint / "config.json")["training"]
    entries: list[dict[str, Any]] = []
    if (file := checkpoint / "classifiers.json").is_file():
        entries = read_json(file)["classifiers"]
    right = {
        (one["source"], one["target"]): Right(one["measured"]["mixed"], one["records"])
        for one in entries
        if one["records"] and "mixed" in one["measured"]
    }
    return Standing(training["step"], right, training.get("validation", {}))


def _pairs(before: Standing, after: Standing) -> dict[tuple[str, str], Right]:
    """What was right before of the directions that both have, by as many records."""
    return {
        pair: one
        for pair, one in before.right.items()
        if pair in after.right and after.right[pair].records == one.records
    }


def _gain(before: Standing, after: Standing) -> float:
    """By how much the mean share of right answers rose."""
    pairs = _pairs(before, after)
    return sum(after.right[pair].share - one.share for pair, one in pairs.items())


def _line(pair: tuple[str, str], before: Right, after: Right) -> str:
    source, target = pair
    return (
        f"{target} from {source}, before -> after: {before.share:.1%} -> {after.share:.1%} of the same "
        f"{before.records:,} validation records right."
    )


def _restore(run: Path, step: int) -> None:
    """Make the checkpoint that was set aside the best one again, with the figures that were measured of it."""
    checkpoints = run / "checkpoints"
    name = folder_name(step)
    if (checkpoints / name).exists():
        remove_folder(run / ASIDE)
    else:
        (run / ASIDE).rename(checkpoints / name)
    if link_target(checkpoints / "best") != name:
        point(checkpoints / "best", name)
    earlier = sorted(run.glob("metrics-part-*.json"), key=lambda path: path.stat().st_mtime)
    if earlier and not (run / "metrics.json").exists():
        earlier[-1].rename(run / "metrics.json")
