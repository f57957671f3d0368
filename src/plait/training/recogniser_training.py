"""Encoders of media with labels are trained on the labels directly, before the backbone: what a network of this size
learns soonest and best. Then they are frozen.

What is known to help with few data: shifts, mirrors and erased parts (by the modality's settings), smoothed labels, a
learning rate that rises quickly and falls to zero, weight decay, an average of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from plait.core.device import Device
from plait.core.rng import uniform
from plait.data.samples import Samples
from plait.modalities.base import AUGMENT_DRAWS, MediaModality
from plait.modalities.recogniser import Recogniser
from plait.training.optimizer import make_optimizer
from plait.training.schedule import learning_rate_at

CALIBRATION = 6  # steps that a time budget is measured by
PEAK, DECAY, SMOOTHING, WARMUP = 4e-3, 0.05, 0.1, 0.15
BATCH, SMALL_BATCH, FEW = 64, 32, 600  # records in a step, and records below which it is the smaller one
EPOCHS = 400  # more passes than that teach nothing new
AVERAGED, AVERAGE_DECAY = 4, 0.98  # steps between two states that the average takes in, and how it forgets
ORDER, AUGMENT = 301, 302  # keys of `uniform`


@dataclass
class Labelled:
    """Samples of one column, and for each column of labels the class of each sample, -1 where it has none."""

    samples: Samples
    classes: dict[str, np.ndarray]


def train_recogniser(
    modality: MediaModality,
    data: Labelled,
    *,
    device: Device,
    steps: int | None,
    seconds: float,
    seed: int,
    record: Callable[[int], None],
    progress: Callable[[str, int, int, float], None],
    done: int = 0,
) -> dict[str, float]:
    """Train trunk and heads; returns the number of steps in all and the last mean loss in nats.

    `steps` None means as many as fit in `seconds`, measured on throw-away steps; `record` is told before the first.
    Where so many steps were `done` before, these go on behind them, by a schedule of their own.
    """
    encoder = modality.encoder
    assert isinstance(encoder, Recogniser)
    encoder.to(device.torch).learn(True)
    usable = np.flatnonzero(np.any([classes >= 0 for classes in data.classes.values()], axis=0))
    batch = min(SMALL_BATCH if len(usable) < FEW else BATCH, len(usable))
    targets = {column: torch.from_numpy(classes) for column, classes in data.classes.items()}
    if device.torch.type == "cpu":  # in which convolutions are twice as fast
        for parameter in encoder.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer([encoder], PEAK, DECAY, (0.9, 0.98))

    def one(step: int) -> float:
        rows = usable[_rows(seed, step, batch, len(usable))]
        values, lengths = modality.batch([data.samples[i] for i in rows])
        uniforms = torch.from_numpy(uniform(seed, AUGMENT, step, rows[:, None], np.arange(AUGMENT_DRAWS)))
        values, lengths = modality.augment(values, lengths, uniforms)
        if modality.variable_length:
            values = values[:, : int(lengths.max())]
        losses = _losses(encoder.logits(values.to(device.torch), lengths.to(device.torch)), targets, rows)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 5.0)
        optimizer.step()
        return float(loss.detach())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        if steps is None:
            start = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
            one(0)
            clock = [time.perf_counter()]
            for step in range(CALIBRATION):
                one(step)
                clock.append(time.perf_counter())
            possible = max(int(seconds / np.median(np.diff(clock))), 20)
            steps = max(min(possible, EPOCHS * -(-len(usable) // batch) - done), 1)
            encoder.load_state_dict(start)
            optimizer = make_optimizer([encoder], PEAK, DECAY, (0.9, 0.98))
        record(steps)
        torch.manual_seed(seed)
        recent: list[float] = []
        average = RecogniserAverage(encoder)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, steps, PEAK, WARMUP)
            recent.append(one(done + step))
            average.update(step)
            if step % 10 == 9 or step == steps - 1:
                progress(modality.name, step + 1, steps, float(np.mean(recent[-20:])))
    average.take()
    encoder.learn(False)
    return {"steps": done + steps, "loss": float(np.mean(recent[-20:]))}


class RecogniserAverage:
    """An exponential moving average of an encoder's weights and batch statistics, which takes their place at the end.
    Every `AVERAGED`-th step counts; early on it is short, so that it forgets where it began."""

    def __init__(self, encoder: Recogniser) -> None:
        self.encoder = encoder
        self.tensors = {name: tensor.clone() for name, tensor in self._floats()}

    def _floats(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name, tensor in self.encoder.state_dict().items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the state after a step."""
        if step % AVERAGED:
            return
        count = step // AVERAGED
        decay = min(AVERAGE_DECAY, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self.tensors.values()), [tensor for _, tensor in self._floats()], 1 - decay)

    @torch.no_grad()
    def take(self) -> None:
        """Give the encoder the average."""
        for name, tensor in self._floats():
            tensor.copy_(self.tensors[name])


@dataclass(frozen=True)
class HeldOut:
    """What heads say of labels that they did not learn from: (N,) whether each is right."""

    right: np.ndarray

    @property
    def share(self) -> float:
        """The share that is right; 0 of none."""
        return float(self.right.mean()) if len(self.right) else 0.0

    def is_worse_than(self, other: HeldOut) -> bool:
        """Whether the share that is right is lower by more than the standard error of the paired difference.
        Likelihoods would say that of any network that learns more by heart, though it is right as often."""
        difference = self.right.astype(float) - other.right
        if len(difference) < 2:
            return False
        return float(difference.mean()) < -float(difference.std(ddof=1)) / len(difference) ** 0.5


@torch.no_grad()
def held_out_labels(modality: MediaModality, data: Labelled, device: Device) -> HeldOut:
    """What the heads of a recogniser say of samples that it did not learn from."""
    encoder = modality.encoder
    assert isinstance(encoder, Recogniser)
    encoder.to(device.torch).eval()
    right: list[np.ndarray] = []
    for column in encoder.columns:
        rows = np.flatnonzero(data.classes[column] >= 0)
        for chunk in (rows[at : at + BATCH] for at in range(0, len(rows), BATCH)):
            logits = _logits(modality, data, chunk, device)[column]
            right.append(logits.argmax(1).numpy() == data.classes[column][chunk])
    return HeldOut(np.concatenate(right) if right else np.zeros(0, bool))


def _logits(modality: MediaModality, data: Labelled, rows: np.ndarray, device: Device) -> dict[str, torch.Tensor]:
    """Column -> logits (N, classes) of samples, on the CPU."""
    values, lengths = modality.batch([data.samples[i] for i in rows])
    if modality.variable_length:
        values = values[:, : int(lengths.max())]
    assert isinstance(modality.encoder, Recogniser)
    found = modality.encoder.logits(values.to(device.torch), lengths.to(device.torch))
    return {column: logits.float().cpu() for column, logits in found.items()}


def _losses(
    logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], rows: np.ndarray
) -> list[torch.Tensor]:
    """The mean loss of each column of labels that some of these records have."""
    losses = []
    for column, values in logits.items():
        labels = targets[column][rows].to(values.device)
        if (labels >= 0).any():
            losses.append(F.cross_entropy(values.float(), labels, ignore_index=-1, label_smoothing=SMOOTHING))
    return losses


def _rows(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """The records of a step: epochs are permutations, and one that ends inside a step goes on in the next."""
    places = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(places // count):
        here = places // count == epoch
        order = np.argsort(uniform(seed, ORDER, int(epoch), np.arange(count)), kind="stable")
        rows[here] = order[places[here] % count]
    return rows
