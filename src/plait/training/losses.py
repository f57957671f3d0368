"""The losses of one step over the global batch, whoever computes it: sums and counts, then one mean per objective.

A global batch may lie in several parts: one for each process and micro-batch. What a part adds to a likelihood is its
sum divided by the count of the whole; the contrast needs all embeddings at once, so they are gathered, its gradient
to each is taken there, and every part carries its own share of it back through its network (GradCache: Gao, Zhang,
Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). So neither the
number of processes nor that of micro-batches changes a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.device import Device
from plait.model.multimodal import IGNORE, Multimodal
from plait.model.objectives import contrastive, likelihoods
from plait.training.batches import Split, Step
from plait.training.distributed import Group, Network


@dataclass
class Output:
    """What the forward passes of one part give."""

    sums: dict[str, Tensor]  # space -> sum of -log P in nats
    embeddings: Tensor | None  # (S, E) of the spans that take part in the contrast, in their order
    zero_anchor: Tensor  # zero, with a path to every parameter that the part has no other use for


class LossModule(nn.Module):
    """The forward passes of one part, as one module: what DistributedDataParallel sees of a model."""

    def __init__(self, model: Multimodal, device: Device) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(
        self, step: Step, restricted: bool, embed: bool, likelihood: bool = True, smoothing: float = 0.0
    ) -> Output:
        model, device = self.model, self.device.torch
        sums: dict[str, Tensor] = {}
        embedded: list[Tensor] = []
        zero_anchor = torch.zeros((), device=device)
        with self.device.autocast():  # once, for what is read and what is predicted
            rows = model.row_modality.rows() if model.row_modality is not None else None
            table = model.reading(rows)
        for batch, records in zip(step.batches, step.span_records, strict=True):
            on_device = batch.to(device)
            with self.device.autocast():
                inputs = model.inputs(on_device, table)
                hidden = model.backbone(inputs)
                found = {}
                if likelihood:
                    found = likelihoods(model, hidden, on_device.targets, restricted, smoothing, rows)
            for token_type, (total, _) in found.items():
                sums[token_type] = sums[token_type] + total if token_type in sums else total
            chosen = np.flatnonzero(records >= 0)
            if embed and len(chosen):
                places, spans = zip(*((row, span) for row, *span in (batch.spans[i] for i in chosen)), strict=True)
                embedded.append(model.pool(inputs, hidden, spans, places))
            if not found:
                zero_anchor = zero_anchor + 0 * hidden.sum()
        for parameter in self._idle(step, set(sums), restricted, bool(embedded)):
            zero_anchor = zero_anchor + 0 * parameter.sum()
        return Output(sums, torch.cat(embedded) if embedded else None, zero_anchor)

    def _idle(self, step: Step, id_ranges: set[str], restricted: bool, embedded: bool) -> list[Tensor]:
        """Parameters that the part does not use. They take part with weight zero: all processes then wait for the
        same gradients, and a step does the same to a parameter wherever the modality that uses it lies."""
        model = self.model
        read = {name for batch in step.batches for name in batch.media}
        idle: list[Tensor] = []
        for name, modality in model.media.items():
            if name not in read:
                idle += modality.encoder.parameters()
        if model.lm_head is not None:
            if not id_ranges:
                idle += model.lm_head.parameters()
            elif restricted:
                idle += [p for name, p in model.lm_head.digits.items() if name not in id_ranges]
        if model.config.embed_dim and not embedded:
            idle.append(model.project.weight)
        return [p for p in idle if p.requires_grad]


def step_losses(
    network: Network,
    parts: list[Step],
    split: Split,
    group: Group,
    restricted: bool = True,
    weights: Mapping[str, float] | None = None,
    key: int = 0,
    smoothing: float = 0.0,
) -> tuple[dict[str, float], int]:
    """Objective -> its loss over the global batch, each likelihood a mean per token; and the tokens of it.

    `parts` are this process's micro-batches. With `weights`, the gradient of the weighted objective is left in the
    parameters of every process; more than one part then means one more forward pass each where there is a contrast.
    Dropout is a function of `key`, so that it is the same when a part is computed twice.
    """
    loss_module: LossModule = network.loss_module
    model = loss_module.model
    id_ranges = list(model.id_ranges)
    spans = [_spans(part, list(model.media)) for part in parts]
    counts = np.sum([_target_counts(part, model) for part in parts], 0)
    seen = sum(int(batch.lengths.sum()) for part in parts for batch in part.batches)
    mine = np.concatenate(spans)
    headers = group.gather(torch.tensor([[len(mine), seen, *counts]]))
    sizes = headers[:, 0].tolist()
    seen, *totals = (int(n) for n in headers[:, 1:].sum(0))
    count = dict(zip(id_ranges, totals, strict=True))
    pairs = _pairs(group.gather(torch.from_numpy(mine), sizes).numpy(), ["text", *model.media])
    if not model.config.embed_dim:
        pairs = {}
    learning = weights is not None

    def run(index: int, likelihood: bool = True, last: bool = True) -> Output:
        torch.manual_seed(key + index)
        return network(parts[index], restricted, bool(pairs), likelihood, smoothing, last=last)

    with torch.set_grad_enabled(learning):
        single = run(0) if len(parts) == 1 else None
    losses: dict[str, float] = {}
    grads: list[Tensor] = []  # of the contrast to the embeddings of each part
    grad_logit_scale = torch.zeros(())  # of the contrast to the temperature
    if pairs:
        with torch.no_grad():
            outputs = [single] if single else [run(i, likelihood=False) for i in range(len(parts))]
        given = [output.embeddings.detach() for output in outputs if output.embeddings is not None]
        width = model.config.embed_dim
        own = torch.cat(given) if given else torch.zeros(0, width, device=loss_module.device.torch)
        everyone = group.gather(own, sizes).requires_grad_(learning)
        temperature = model.logit_scale.detach().clone().requires_grad_(learning)
        contrasts = {}
        for name, (i, j, records) in pairs.items():
            positives = torch.from_numpy(split.positives(records, records)).to(everyone.device)
            a, b = (everyone[torch.from_numpy(places)] for places in (i, j))
            contrasts[name] = contrastive(a, b, positives, temperature)
        losses = {name: float(value.detach()) for name, value in contrasts.items()}
        if weights is not None:
            objective = torch.stack([weight_of(name, weights) * value for name, value in contrasts.items()]).sum()
            grad, grad_logit_scale = torch.autograd.grad(objective, [everyone, temperature])
            start = sum(sizes[: group.rank])
            grads = list(grad[start : start + len(mine)].split([len(part) for part in spans]))
    sums = dict.fromkeys(id_ranges, 0.0)
    for index in range(len(parts)):
        last = index == len(parts) - 1
        with torch.set_grad_enabled(learning):
            output = single or run(index, last=last)
        for token_type, value in output.sums.items():
            sums[token_type] += float(value.detach())
        if weights is None:
            continue
        share = output.zero_anchor
        for token_type, value in output.sums.items():
            share = share + weight_of(token_type, weights) * value / count[token_type]
        if output.embeddings is not None:
            share = share + (output.embeddings * grads[index]).sum()
        if model.config.embed_dim:
            share = share + model.logit_scale * (grad_logit_scale / (group.size * len(parts)))
        network.backward(share, last)
    total = group.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    means = {
        token_type: value / count[token_type]
        for token_type, value in zip(id_ranges, total, strict=True)
        if count[token_type]
    }
    return {**means, **losses}, seen


def _spans(part: Step, media: list[str]) -> np.ndarray:
    """(S, 2): the modality (0 is text) and the record of each span that takes part in the contrast."""
    place = {name: i for i, name in enumerate(["text", *media])}
    rows = [
        (place[span[1]], record)
        for batch, records in zip(part.batches, part.span_records, strict=True)
        for span, record in zip(batch.spans, records, strict=True)
        if record >= 0
    ]
    return np.array(rows, np.int64).reshape(-1, 2)


def _target_counts(part: Step, model: Multimodal) -> np.ndarray:
    """How many targets lie in each space."""
    stops = [stop for _, stop in model.id_ranges.values()]
    targets = np.concatenate([batch.targets.numpy().ravel() for batch in part.batches])
    places = np.searchsorted(stops, targets[targets != IGNORE], side="right")
    return np.bincount(places, minlength=len(stops))


def _pairs(spans: np.ndarray, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For two modalities at a time, where their embeddings of the same records lie, and those records, in their
    order; nothing where fewer than two are shared."""
    found = {}
    for a, b in combinations(range(len(names)), 2):
        first, second = (np.flatnonzero(spans[:, 0] == modality) for modality in (a, b))
        shared, i, j = np.intersect1d(spans[first, 1], spans[second, 1], return_indices=True)
        if len(shared) > 1:
            found["contrastive:" + "-".join(sorted((names[a], names[b])))] = first[i], second[j], shared
    return found


def weight_of(name: str, weights: Mapping[str, float]) -> float:
    kind = name.partition(":")[0]  # of a pair, or of the codes of items, which have a space each
    return weights.get(kind, 0.5 if kind == "contrastive" else 1.0)


def weighted(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The objective that training minimises; infinite where nothing was measured."""
    return sum(loss * weight_of(name, weights) for name, loss in losses.items()) if losses else math.inf
