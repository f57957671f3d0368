"""A plain CNN that knows only real training data: the judge of what a model makes, and the baseline of recognition."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core.rng import uniform
from plait.modalities.base import AUGMENT_DRAWS

Augment = Callable[
    [np.ndarray, Tensor], Tensor
]  # indices of samples, uniforms (N, AUGMENT_DRAWS) -> features (N, C, H, W)
BATCH = 64
GRID = 4  # places of the last stage that are told apart, a side
HIDDEN = 64  # width of the features
PATIENT = 40.0  # seconds from which the larger network pays
SMALL = 2**19  # numbers in a batch below which threads wait for each other longer than they work
FEWEST = 300  # steps; a judge of fewer says little, whatever the clock


class _Network(nn.Module):
    """Stages of convolutions; means and maxima of the last, on a grid of 4 x 4, become the features.

    Below a width of 32 each stage has one convolution: what seconds can train.
    """

    def __init__(self, channels: int, side: int, classes: int, width: int) -> None:
        super().__init__()
        self.shape = {"channels": channels, "side": side, "classes": classes, "width": width}
        layers: list[nn.Module] = []
        before, large = channels, side > 40
        for stage, after in enumerate((width, 2 * width, 2 * width)):
            if stage == 0 and large:  # halved at once: most of the work lies in the first places
                layers += [nn.Conv2d(before, after, 5, 2, padding=2)]
            else:
                layers += [nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.GroupNorm(8, after), nn.ReLU()]
            if stage and width >= 32:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
            if stage < 2:
                layers += [nn.MaxPool2d(2, ceil_mode=True)]
            before = after
        self.layers = nn.Sequential(*layers)
        self.hidden = nn.Linear(2 * before * GRID**2, HIDDEN)
        self.out = nn.Linear(HIDDEN, classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        pooled = torch.cat((F.adaptive_avg_pool2d(x, GRID), F.adaptive_max_pool2d(x, GRID)), 1)
        return F.relu(self.hidden(pooled.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.features(x), 0.2, self.training))


@dataclass
class ReferenceClassifier:
    """A fitted classifier and how it was fitted: steps and seconds are for the report."""

    network: _Network
    mean: float
    scale: float
    classes: int
    steps: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """All but the weights; see `blank_classifier`."""
        own = {name: getattr(self, name) for name in ("mean", "scale", "classes", "steps", "seconds")}
        return {**own, "network": self.network.shape}

    @torch.no_grad()
    def __call__(self, features: Tensor, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, C, H, W) to probabilities (N, classes) and what the last layer reads (N, 64)."""
        self.network.eval()
        device = next(self.network.parameters()).device
        probabilities, hidden = [], []
        for start in range(0, len(features), chunk):
            x = (features[start : start + chunk].to(device) - self.mean) / self.scale
            seen = self.network.features(x)
            hidden.append(seen.cpu().numpy())
            probabilities.append(self.network.out(seen).softmax(-1).cpu().numpy())
        if not hidden:
            return np.zeros((0, self.classes), np.float32), np.zeros((0, HIDDEN), np.float32)
        return np.concatenate(probabilities), np.concatenate(hidden)


def blank_classifier(facts: dict[str, Any]) -> ReferenceClassifier:
    """A classifier of the `facts` of another one, without its weights."""
    with torch.random.fork_rng(devices=[]):
        network = _Network(**facts["network"]).eval()
    return ReferenceClassifier(network, **{name: value for name, value in facts.items() if name != "network"})


def _shifted(features: Tensor) -> Augment:
    """Shifts of up to a sixteenth of the sides, the edge repeated."""
    height, width = features.shape[-2:]
    up, left = max(height // 16, 1), max(width // 16, 1)

    def augment(rows: np.ndarray, uniforms: Tensor) -> Tensor:
        padded = F.pad(features[rows], (left, left, up, up), mode="replicate")
        down = (uniforms[:, 0] * (2 * up + 1)).long()[:, None] + torch.arange(height)
        right = (uniforms[:, 1] * (2 * left + 1)).long()[:, None] + torch.arange(width)
        places = torch.arange(len(rows))[:, None, None]
        return padded.movedim(1, -1)[places, down[:, :, None], right[:, None, :]].movedim(-1, 1)

    return augment


def fit_classifier(
    features: Tensor,
    labels: np.ndarray,
    classes: int,
    *,
    seconds: float = 10.0,
    steps: int | None = None,
    seed: int = 0,
    width: int | None = None,
    augment: Augment | None = None,
    device: torch.device | None = None,
) -> ReferenceClassifier:
    """Fit a CNN on features (N, C, H, W) and integer labels (N,) below `classes`.

    The same seed, width and `steps` give the same classifier. Without `steps`, five timed ones choose how many fit
    into `seconds` of wall time, at least 300 and at most 20 passes; the number is kept in the result. `width` is 16,
    or 32 (and 60 passes) from 40 seconds on. `augment` makes features anew from the samples' indices, and `features`
    may then be those of a few samples, to set the scale; without it, samples are shifted a little.
    """
    width = width or (32 if seconds >= PATIENT else 16)
    began, n = time.perf_counter(), len(labels)
    device = device or torch.device("cpu")
    augment = augment or _shifted(features)
    small = width < 32 and min(BATCH, n) * features[0].numel() < SMALL
    mean, scale = float(features.mean()), max(float(features.std()), 1e-3)
    targets = torch.from_numpy(np.asarray(labels, np.int64))

    def build() -> tuple[_Network, torch.optim.AdamW]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network(features.shape[1], min(features.shape[-2:]), classes, width)
        network.to(device)
        if device.type == "cpu":
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return network, torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)

    batch = min(BATCH, n)

    def step(network: _Network, optimizer: torch.optim.AdamW, number: int) -> None:
        rows = _rows(seed, number, batch, n)
        uniforms = torch.from_numpy(uniform(seed, 3, number, rows[:, None], np.arange(AUGMENT_DRAWS)))
        x = (augment(rows, uniforms).to(device) - mean) / scale
        loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), targets[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with torch.random.fork_rng(devices=[]), _threads(1 if small else None):
        if steps is None:
            network, optimizer = build()
            step(network, optimizer, 0)  # the first one is slower
            took = []
            for number in range(1, 6):
                start = time.perf_counter()
                step(network, optimizer, number)
                took.append(time.perf_counter() - start)
            # The fastest step is what the machine can do; the others met other work.
            left = (seconds - (time.perf_counter() - began)) / (1.15 * min(took))
            epochs = 20 if width < 32 else 60
            steps = max(min(int(left), epochs * -(-n // batch)) // 10 * 10, FEWEST)
        network, optimizer = build()
        network.train()
        torch.manual_seed(seed)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
        for number in range(steps):
            step(network, optimizer, number)
            schedule.step()
    network.eval()
    return ReferenceClassifier(network, mean, scale, classes, steps, time.perf_counter() - began)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(seed: int, number: int, batch: int, n: int) -> np.ndarray:
    """The samples of a step: epochs are permutations, and one that ends inside a step goes on in the next."""
    places = np.arange(number * batch, (number + 1) * batch)
    rows = np.empty(batch, int)
    for epoch in np.unique(places // n):
        here = places // n == epoch
        rows[here] = _order(seed, int(epoch), n)[places[here] % n]
    return rows


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(uniform(seed, 5, epoch, np.arange(n)), kind="stable")
