"""The losses of one step over the global batch, whoever computes it: sums and counts, then one mean per objective.

A global batch may lie in several parts: one for each process and micro-batch. What a part adds to a likelihood is its
sum divided by the count of the whole; the contrast needs all embeddings at once, so they are gathered, its gradient
to each is taken there, and every part carries its own share of it back through its network (GradCache: Gao, Zhang,
Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). So neither the
number of processes nor that of micro-batches changes a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from plait.core.device import Device
from plait.core.objective import Objective
from plait.model.cross_entropy import SplitTable
from plait.model.multimodal import IGNORE, Multimodal, SequenceSpan
from plait.model.objectives import CrossEntropy, SampledSoftmax, TokenLoss
from plait.training.batches import Step
from plait.training.distributed import Group, Network
from plait.training.split import Split
from plait.training.streams import Streams


def token_losses(
    model: Multimodal,
    hidden: Tensor,
    targets: Tensor,
    restricted: bool = True,
    smoothing: float = 0.0,
    rows: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses of the next tokens of a batch, each type of them by itself.

    Args:
        model: The model.
        hidden: The backbone's output, (B, L, D).
        targets: The tokens to predict, (B, L); `IGNORE` where there is none.
        restricted: Whether the softmax of a target runs over the ids of its own type, which the span grammar allows
            there, or over the whole vocabulary.
        smoothing: Share of each target that is spread over what is possible there.
        rows: Those of the modality of rows, whose softmax is always its own; read from it where left out.

    Returns:
        Token type -> (sum of -log P in nats, number of targets).
    """
    keep = targets != IGNORE
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    states, target_ids = hidden[keep].to(dtype), targets[keep]
    output, row_modality = model.output_embedding, model.row_modality
    split = output.split_table() if output.text_rows is not None else None
    full_table = None if restricted or split is not None else output.table()
    losses = {}
    for token_type, (start, stop) in model.id_ranges.items():
        chosen = (target_ids >= start) & (target_ids < stop)
        if not chosen.any():
            continue
        loss: TokenLoss = CrossEntropy(smoothing)
        table: Tensor | SplitTable
        if row_modality is not None and token_type == row_modality.name:
            table, first = row_modality.rows() if rows is None else rows, start
            if row_modality.sampled and model.training:
                loss = SampledSoftmax(row_modality.counts, row_modality.sampled)
        elif split is not None:
            table, first = (split.part(start, stop), start) if restricted else (split, 0)
        elif full_table is not None:
            table, first = full_table, 0
        else:
            table, first = output.of_type(token_type), start
        losses[token_type] = loss(states[chosen], table, target_ids[chosen] - first), chosen.sum()
    return losses


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
            table = model.lookup(rows)
        for batch, records in zip(step.batches, step.span_records, strict=True):
            on_device = batch.to(device)
            with self.device.autocast():
                inputs = model.inputs(on_device, table)
                hidden = model.backbone(inputs)
                likelihood_sums = {}
                if likelihood:
                    likelihood_sums = token_losses(model, hidden, on_device.targets, restricted, smoothing, rows)
            for token_type, (total, _) in likelihood_sums.items():
                sums[token_type] = sums[token_type] + total if token_type in sums else total
            chosen = np.flatnonzero(records >= 0)
            if embed and len(chosen):
                spans = [batch.spans[i] for i in chosen]
                within = [SequenceSpan(span.modality, span.start, span.stop) for span in spans]
                embedded.append(model.pool(inputs, hidden, within, [span.row for span in spans]))
            if not likelihood_sums:
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
        idle += [
            table.free for table in (model.token_embedding, model.lm_head) if table and table.text_rows is not None
        ]
        return [p for p in idle if p.requires_grad]


@dataclass
class Pair:
    """Two modalities' embeddings of the same records."""

    first: np.ndarray  # (N,) places of the one among the embeddings of the global batch
    second: np.ndarray  # (N,) places of the other
    records: np.ndarray  # (N,) the records, ascending


@dataclass
class StepLayout:
    """What a global batch holds, known to every process before anything is computed."""

    spans: list[np.ndarray]  # of each own part, as `_spans` gives them
    sizes: list[int]  # spans of each process
    counts: dict[str, int]  # token type -> targets
    tokens: int
    pairs: dict[str, Pair]  # objective -> what agrees


@dataclass
class ContrastResult:
    """The contrastive losses of a global batch, and their gradient to what this process computed."""

    losses: dict[str, float]
    grads: list[Tensor]  # of the embeddings of each own part
    scalar_grads: dict[str, Tensor]  # of the loss's scalars


def step_losses(
    network: Network,
    parts: list[Step],
    split: Split,
    group: Group,
    restricted: bool = True,
    weights: Mapping[str, float] | None = None,
    key: int = 0,
    smoothing: float = 0.0,
    streams: Streams | None = None,
) -> tuple[dict[str, float], int]:
    """The losses of a global batch and, with `weights`, their gradients.

    Args:
        network: The model as the processes share it.
        parts: This process's micro-batches.
        split: Whose records they are.
        group: The processes of the run.
        restricted: Whether the softmax of a target runs over the ids that the grammar allows there, or over all.
        weights: Of the objectives. The gradient of their weighted sum is left in the parameters of every process; more
            than one part then means one more forward pass each where there is a contrast. None: no gradients.
        key: What dropout is a function of, so that it is the same when a part is computed twice.
        smoothing: Share of each target that is spread over what is possible there.
        streams: Threads that compute the halves of a part at the same time, where it was cut in two.

    Returns:
        Objective -> its loss over the global batch, each likelihood a mean per token in nats; and the tokens of it.
    """
    model: Multimodal = network.loss_module.model
    streams = streams or Streams()
    halves = [streams.halves(part) for part in parts]
    layout = _layout([half for part in halves for half in part], model, group)
    learning = weights is not None

    def forward(index: int, likelihood: bool = True, last: bool = True) -> list[Output]:
        """Of the halves of a part."""
        torch.manual_seed(key + index)
        return streams.map(
            lambda half: network(halves[index][half], restricted, bool(layout.pairs), likelihood, smoothing, last=last),
            len(halves[index]),
        )

    with torch.set_grad_enabled(learning):
        only = forward(0) if len(parts) == 1 else None
    contrast = ContrastResult({}, [], {})
    if layout.pairs:
        with torch.no_grad():
            outputs = only or [out for index in range(len(parts)) for out in forward(index, likelihood=False)]
        embeddings = [output.embeddings.detach() for output in outputs if output.embeddings is not None]
        contrast = _contrast(network, layout, embeddings, split, group, weights)
    sums = dict.fromkeys(layout.counts, 0.0)
    done = 0  # halves
    for index in range(len(parts)):
        last = index == len(parts) - 1
        with torch.set_grad_enabled(learning):
            outputs = only or forward(index, last=last)
        for output in outputs:
            for token_type, value in output.sums.items():
                sums[token_type] += float(value.detach())
        if weights is not None:
            shares = []
            for number, output in enumerate(outputs):
                grad = contrast.grads[done + number] if contrast.grads else None
                share = _objective_share(output, layout, weights, grad)
                if not number:  # of the loss's scalars, once a part
                    for name, scalar in model.pair_scalars.items():
                        scalar_grad = contrast.scalar_grads.get(name, torch.zeros(()))
                        share = share + scalar * (scalar_grad / (group.size * len(parts)))
                shares.append(share)
            streams.map(partial(_backward, network, shares, last), len(shares))
        done += len(outputs)
    totals = group.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    means = {
        token_type: total / count
        for (token_type, count), total in zip(layout.counts.items(), totals, strict=True)
        if count
    }
    return {**means, **contrast.losses}, layout.tokens


def _backward(network: Network, shares: list[Tensor], last: bool, number: int) -> None:
    """The gradients of a half's share of the objective."""
    network.backward(shares[number], last)


def _layout(parts: list[Step], model: Multimodal, group: Group) -> StepLayout:
    """What the parts of all processes hold."""
    spans = [_spans(part, list(model.media)) for part in parts]
    own_spans = np.concatenate(spans)
    own_counts = np.sum([_target_counts(part, model) for part in parts], 0)
    own_tokens = sum(int(batch.lengths.sum()) for part in parts for batch in part.batches)
    headers = group.gather(torch.tensor([[len(own_spans), own_tokens, *own_counts]]))
    sizes = headers[:, 0].tolist()
    tokens, *counts = (int(number) for number in headers[:, 1:].sum(0))
    pairs = _pairs(group.gather(torch.from_numpy(own_spans), sizes).numpy(), ["text", *model.media])
    return StepLayout(
        spans=spans,
        sizes=sizes,
        counts=dict(zip(model.id_ranges, counts, strict=True)),
        tokens=tokens,
        pairs=pairs if model.config.embed_dim else {},
    )


def _contrast(
    network: Network,
    layout: StepLayout,
    embeddings: list[Tensor],
    split: Split,
    group: Group,
    weights: Mapping[str, float] | None,
) -> ContrastResult:
    """The contrastive losses over the embeddings of all processes; `embeddings` are those of the own parts."""
    model: Multimodal = network.loss_module.model
    learning = weights is not None
    width, device = model.config.embed_dim, network.loss_module.device.torch
    own = torch.cat(embeddings) if embeddings else torch.zeros(0, width, device=device)
    everyone = group.gather(own, layout.sizes).requires_grad_(learning)
    scalars = {name: value.detach().clone().requires_grad_(learning) for name, value in model.pair_scalars.items()}
    losses = {}
    for name, pair in layout.pairs.items():
        positives = torch.from_numpy(split.positives(pair.records, pair.records)).to(everyone.device)
        a, b = (everyone[torch.from_numpy(places)] for places in (pair.first, pair.second))
        losses[name] = model.pair_loss(a, b, positives, scalars)
    values = {name: float(value.detach()) for name, value in losses.items()}
    if weights is None:
        return ContrastResult(values, [], {})
    objective = torch.stack([Objective.parse(name).weight(weights) * value for name, value in losses.items()]).sum()
    grad, *scalar_grads = torch.autograd.grad(objective, [everyone, *scalars.values()])
    start = sum(layout.sizes[: group.rank])
    own_grad = grad[start : start + len(own)]
    grads = list(own_grad.split([len(spans) for spans in layout.spans]))
    return ContrastResult(values, grads, dict(zip(scalars, scalar_grads, strict=True)))


def _objective_share(
    output: Output, layout: StepLayout, weights: Mapping[str, float], embedding_grads: Tensor | None
) -> Tensor:
    """What a part adds to the weighted objective of the global batch, as a scalar with the right gradient."""
    share = output.zero_anchor
    for token_type, value in output.sums.items():
        share = share + Objective.parse(token_type).weight(weights) * value / layout.counts[token_type]
    if output.embeddings is not None and embedding_grads is not None:
        share = share + (output.embeddings * embedding_grads).sum()
    return share


def _spans(part: Step, media: list[str]) -> np.ndarray:
    """(S, 2): the modality (0 is text) and the record of each span that takes part in the contrast."""
    place = {name: i for i, name in enumerate(["text", *media])}
    rows = [
        (place[span.modality], record)
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


def _pairs(spans: np.ndarray, names: list[str]) -> dict[str, Pair]:
    """For two modalities at a time, where their embeddings of the same records lie, and those records, in their
    order; nothing where fewer than two are shared."""
    pairs = {}
    for a, b in combinations(range(len(names)), 2):
        first, second = (np.flatnonzero(spans[:, 0] == modality) for modality in (a, b))
        shared, i, j = np.intersect1d(spans[first, 1], spans[second, 1], return_indices=True)
        if len(shared) > 1:
            pairs[str(Objective.of_pair(names[a], names[b]))] = Pair(first[i], second[j], shared)
    return pairs
