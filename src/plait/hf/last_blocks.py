"""The last blocks of a pretrained encoder, trained for labels: what the blocks before them give of each input is made
once and kept, so that a step costs the last ones alone.

Batch norms keep the statistics that they came with. Shapes: N records, V views of each, F features, C labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.interruption import pause_point
from plait.core.rng import uniform
from plait.training.schedule import learning_rate_at

SHARE = 3 / 8  # of the blocks, which are trained
PEAK, HEAD_PEAK = 1e-3, 5e-3  # learning rates of the last block and of the labels' layer
BLOCK_DECAY = 0.8  # of the learning rate, from a block to the one before it
DECAY = 0.05
DROPOUT = 0.2  # of the features
SMOOTHING = 0.1
WARMUP = 0.2  # share of the steps
BATCH = 32
EPOCHS = 8
STEPS = 1000  # at most
RNG_STREAM = 361  # of the random numbers of `uniform`, and the next two

Progress = Callable[[str, int, int], None]


class _ReachedError(Exception):
    """What goes into the first of the last blocks was seen."""


class _Skipped(nn.Module):
    """In the place of a block whose work is known."""

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        return x


class LastBlocks:
    """A network cut in two before its last blocks.

    Attributes:
        trained: The parameters behind the cut, by their names in the network.
    """

    def __init__(self, network: nn.Module, sample: Tensor) -> None:
        """`sample` is what the network reads of an image, (1, 3, H, W). Raises ValueError where it cannot be cut."""
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        if not lists:
            raise ValueError("the network has no blocks")
        self.network, self.blocks = network, max(lists, key=len)
        self.first = len(self.blocks) - math.ceil(SHARE * len(self.blocks))
        self.sample = torch.zeros_like(sample)
        names = dict(network.named_parameters())
        for parameter in names.values():
            parameter.requires_grad_(True)
        two = torch.cat((sample, 1 - sample))  # since `after` is asked about more images than its sample has
        try:
            out = self.after(self.before(two))
            with torch.no_grad():
                whole: Tensor = network(pixel_values=two).last_hidden_state
            chain = out.shape == whole.shape and torch.allclose(whole, out.detach(), rtol=1e-3, atol=1e-4)
        except (RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the network does not run in two halves: {error}") from error
        if not chain:
            raise ValueError("the network's blocks are no chain")
        grads = torch.autograd.grad(out.sum(), list(names.values()), allow_unused=True)
        self.trained: dict[str, nn.Parameter] = {}
        for (name, parameter), grad in zip(names.items(), grads, strict=True):
            parameter.requires_grad_(grad is not None)
            if grad is not None:
                self.trained[name] = parameter

    @torch.no_grad()
    def before(self, pixels: Tensor) -> Tensor:
        """What goes into the first of the last blocks, (N, ...), of pixels (N, 3, H, W)."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen.append(args[0] if args else options["hidden_states"])
            raise _ReachedError

        handle = self.blocks[self.first].register_forward_pre_hook(see, with_kwargs=True)
        try:
            self.network(pixel_values=pixels)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return seen[0].clone()

    def after(self, states: Tensor) -> Tensor:
        """The last hidden states of what `before` gave, (N, ...)."""
        states = states.float()
        if states.ndim == 4:
            states = states.contiguous(memory_format=torch.channels_last)

        def put(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (states, *args[1:]), options
            return args, {**options, "hidden_states": states}

        handle = self.blocks[self.first].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with self._skipping():
                out: Tensor = self.network(pixel_values=self.sample).last_hidden_state
        finally:
            handle.remove()
        return out

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        earlier = list(self.blocks[: self.first])
        for place in range(self.first):
            self.blocks[place] = _Skipped()
        try:
            yield
        finally:
            for place, block in enumerate(earlier):
                self.blocks[place] = block

    def depth(self, name: str) -> int:
        """How many blocks there are behind the one that a trained parameter is in; 0 of what is behind them all."""
        prefix = next(path for path, module in self.network.named_modules() if module is self.blocks)
        within = re.match(re.escape(prefix) + r"\.(\d+)\.", name)
        return len(self.blocks) - 1 - int(within[1]) if within else 0


@dataclass
class States:
    """What the first blocks gave of records, (V, N, ...), and the class of each, (N,)."""

    views: Tensor
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)


def steps_of(records: int) -> int:
    """Steps that the last blocks are trained for."""
    return min(max(EPOCHS * records // BATCH, 1), STEPS)


def train_last(
    last: LastBlocks,
    pooled: Callable[[Tensor], Tensor],
    train: States,
    labels: int,
    seed: int,
    seconds_left: Callable[[], float],
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Train the blocks and a layer over their pooled states; weights (F, C) and bias (C,) of that layer.

    Args:
        last: The cut network.
        pooled: Features (N, F) of last hidden states.
        train: What is learnt.
        labels: C.
        seed: Of the order, the views and the dropout.
        seconds_left: How long training may go on; the schedule is shortened to that after its first steps.
        progress: Told of each step.
    """
    device = train.views.device
    with torch.inference_mode():
        width = pooled(last.after(train.views[0, :1])).shape[1]
    layer = nn.Linear(width, labels, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = _optimizer(last, layer)
    classes = torch.from_numpy(train.classes).to(device)
    batch, steps, step, begun = min(BATCH, len(train)), steps_of(len(train)), 0, seconds_left()
    while step < steps:
        pause_point()
        if step == 3:  # the first ones tell how long one takes
            steps = _fitting(steps, step, begun, seconds_left())
        rate = learning_rate_at(step, steps, 1.0, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        places, views = _drawn(len(train), len(train.views), batch, seed, step)
        features = pooled(last.after(train.views[views, places]))
        features = features * _dropout(batch, width, seed, step).to(device)
        loss = nn.functional.cross_entropy(layer(features), classes[places], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        progress("last blocks", step, steps)
    return layer.weight.detach().t(), layer.bias.detach()


def _fitting(steps: int, done: int, begun: float, left: float) -> int:
    """Of so many steps those that there is time for: `done` of them took from `begun` to `left` seconds."""
    if math.isinf(left):
        return steps
    each = max((begun - left) / done, 1e-6)
    return max(min(steps, done + int(left / each)), done + 1)


def _optimizer(last: LastBlocks, layer: nn.Linear) -> torch.optim.AdamW:
    groups = [{"params": list(layer.parameters()), "peak": HEAD_PEAK, "weight_decay": DECAY}]
    for name, parameter in last.trained.items():
        decay = DECAY if parameter.ndim > 1 else 0.0
        peak = PEAK * BLOCK_DECAY ** last.depth(name)
        groups.append({"params": [parameter], "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=1e-9)


def _drawn(records: int, views: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Which records a step has and which view of each, (B,): each epoch has an order of its own."""
    epoch, at = divmod(step, max(records // batch, 1))
    order = np.argsort(uniform(seed, RNG_STREAM, epoch, np.arange(records)), kind="stable")
    places = order[at * batch : (at + 1) * batch]
    chosen = (uniform(seed, RNG_STREAM + 1, step, np.arange(len(places))) * views).astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(places)), torch.from_numpy(chosen)


def _dropout(batch: int, width: int, seed: int, step: int) -> Tensor:
    """By what a step's features are multiplied, (B, F): 0 where one is dropped, more than 1 where it is kept."""
    drawn = uniform(seed, RNG_STREAM + 2, step, np.arange(batch)[:, None], np.arange(width))
    return torch.from_numpy(((drawn >= DROPOUT) / (1 - DROPOUT)).astype(np.float32))


def features_of(last: LastBlocks, pooled: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> np.ndarray:
    """Pooled features of states (V, N, ...) by the trained blocks, (N, V F)."""
    made = []
    with torch.inference_mode():
        for states in views:
            parts = []
            for start in range(0, len(states), BATCH):
                pause_point()
                parts.append(pooled(last.after(states[start : start + BATCH])).cpu())
            made.append(torch.cat(parts))
    return torch.cat(made, 1).numpy()
