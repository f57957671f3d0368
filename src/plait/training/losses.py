"""The losses of one step, over batches of unlike lengths: sums and counts, then one mean per objective."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from plait.model.multimodal import Multimodal
from plait.model.objectives import contrastive, likelihoods
from plait.runtime import Device
from plait.training.batches import Split, Step


def step_losses(
    model: Multimodal, step: Step, split: Split, device: Device, restricted: bool = True
) -> tuple[dict[str, Tensor], int]:
    """Objective -> its loss over all batches of a step, each likelihood a mean per token; and the tokens seen."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    pooled: dict[str, list[Tensor]] = {}
    owners: dict[str, list[np.ndarray]] = {}
    seen = 0
    for batch, records in zip(step.batches, step.span_records, strict=True):
        seen += int(batch.lengths.sum())
        on_device = batch.to(device.torch)
        with device.autocast():
            hidden = model(on_device)
            for space, (total, count) in likelihoods(model, hidden, on_device.targets, restricted).items():
                sums[space] = sums[space] + total if space in sums else total
                counts[space] = counts[space] + count if space in counts else count
        chosen = np.flatnonzero(records >= 0)
        if model.config.space and len(chosen):
            spans = [batch.spans[i] for i in chosen]
            rows, starts, stops = (torch.tensor([s[k] for s in spans], device=device.torch) for k in (0, 2, 3))
            embedded = model.pool(hidden, rows, starts, stops)
            names = np.array([s[1] for s in spans])
            for name in dict.fromkeys(names):
                mine = np.flatnonzero(names == name)
                pooled.setdefault(name, []).append(embedded[torch.from_numpy(mine)])
                owners.setdefault(name, []).append(records[chosen[mine]])
    losses = {space: sums[space] / counts[space] for space in sums}
    spaces = list(pooled)
    for i, a in enumerate(spaces):
        for b in spaces[i + 1 :]:
            shared = _paired(pooled[a], owners[a], pooled[b], owners[b])
            if shared is not None:
                first, second, records = shared
                positives = torch.from_numpy(split.positives(records, records)).to(device.torch)
                name = "contrastive:" + "-".join(sorted((a, b)))
                losses[name] = contrastive(first, second, positives, model.log_temperature)
    return losses, seen


def _paired(
    a: list[Tensor], a_records: list[np.ndarray], b: list[Tensor], b_records: list[np.ndarray]
) -> tuple[Tensor, Tensor, np.ndarray] | None:
    """The embeddings of two modalities of the same records, side by side; None where fewer than two are shared."""
    shared, i, j = np.intersect1d(np.concatenate(a_records), np.concatenate(b_records), return_indices=True)
    if len(shared) < 2:
        return None
    return torch.cat(a)[torch.from_numpy(i)], torch.cat(b)[torch.from_numpy(j)], shared


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The objective that training minimises."""
    parts = [
        loss * (weights.get("contrastive", 0.5) if name.startswith("contrastive") else weights.get(name, 1.0))
        for name, loss in losses.items()
    ]
    return torch.stack(parts).sum()


def weighted_floats(losses: dict[str, float], weights: dict[str, float]) -> float:
    """`weighted` for numbers that were already measured; infinite where there are none."""
    if not losses:
        return math.inf
    return float(weighted({name: torch.tensor(value) for name, value in losses.items()}, weights))
