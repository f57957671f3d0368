"""Codecs are trained first, alone, on reconstruction; then they are frozen."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from plait.core.rng import uniform
from plait.data.samples import Samples
from plait.modalities.base import MediaModality
from plait.training.optimizer import make_optimizer
from plait.training.schedule import learning_rate_at

CALIBRATION = 6  # steps that a time budget is measured by


def train_codec(
    modality: MediaModality,
    stores: list[Samples],
    *,
    steps: int | None,
    seconds: float,
    learning_rate: float,
    seed: int,
    record: Callable[[int], None],
    progress: Callable[[str, int, int, float], None],
) -> dict[str, float]:
    """Fit a codec on all samples of its modality; returns its number of steps and last mean loss.

    `steps` None means as many as fit in `seconds`, measured on throw-away steps; `decide` is told before the first.
    """
    codec = modality.codec
    places = [(store, i) for store in stores for i in range(len(store))]
    batch_size = min(96, len(places))
    optimizer = make_optimizer([codec], learning_rate, 0.0, (0.9, 0.99))
    codec.train()

    def one(step: int) -> float:
        chosen = np.argpartition(uniform(seed, step, np.arange(len(places))), batch_size - 1)[:batch_size]
        values, lengths = modality.batch([places[i][0][places[i][1]] for i in chosen])
        loss = codec.loss(values, lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    if steps is None:
        start = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
        one(0)
        clock = [time.perf_counter()]
        for step in range(CALIBRATION):
            one(step)
            clock.append(time.perf_counter())
        steps = max(int(seconds / np.median(np.diff(clock))), 20)
        codec.load_state_dict(start)
        optimizer = make_optimizer([codec], learning_rate, 0.0, (0.9, 0.99))
    record(steps)
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate, 0.04)
        recent.append(one(step))
        if step % 10 == 9 or step == steps - 1:
            progress(modality.name, step + 1, steps, float(np.mean(recent[-20:])))
    codec.eval().requires_grad_(False)
    return {"steps": steps, "loss": float(np.mean(recent[-20:]))}
