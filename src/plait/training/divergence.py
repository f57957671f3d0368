"""When a run diverges: which records are to blame, and how that is told."""

from __future__ import annotations

import math

from plait.core.errors import DivergedError
from plait.training.batches import Sampler
from plait.training.checkpointing import Position
from plait.training.distributed import Group, Network
from plait.training.losses import step_losses
from plait.training.split import Split

SHOWN = 32  # records that a message names


def not_finite(network: Network, sampler: Sampler, step: int) -> DivergedError:
    """The error of a step whose loss or gradient is not finite. Every process looks at all of the step's records, one
    by one, for those that are to blame."""
    epochs, items = sampler.members(step)
    network.loss_module.eval()
    bad = []
    for epoch, item in zip(epochs, items, strict=True):
        losses, _ = step_losses(network, [sampler.build(epoch[None], item[None])], sampler.split, Group())
        if not all(math.isfinite(loss) for loss in losses.values()):
            bad.append(int(item[0]))
    alone = 0 < len(bad) < len(items)
    names = _names(sampler.split, bad if alone else [int(record) for record in items[:, 0]])
    blame = f"because of record {names}" if alone else f"with records {names}"
    remedy = "look at what it holds" if alone else "lower training.learning_rate, or look at these records"
    return DivergedError(f"The loss is not finite at step {step + 1} {blame}. The last checkpoint is kept; {remedy}.")


def check_stable(position: Position, loss: float, records: list[int], split: Split) -> None:
    """Raise DivergedError where the mean loss of ten steps is far above that of the first ten."""
    if position.first is None:
        position.first = loss
    if loss > 2 * position.first + 2:
        raise DivergedError(
            f"The loss exploded: {loss:.3g} at step {position.step}, {position.first:.3g} at the start (records "
            f"{_names(split, records)}). The checkpoints are kept; lower training.learning_rate."
        )


def _names(split: Split, records: list[int]) -> str:
    ids = [split.ids[record] for record in dict.fromkeys(records)]
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
