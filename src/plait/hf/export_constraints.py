"""Before an export: a model that keeps its spans well formed without our grammar.

In training the softmax runs over one space nearly always, so how much a space's logits lie above another's is hardly
learnt. Adding one number to all logits of a space changes no probability within it, and which space comes next becomes
a classifier of its own. A vector a space in the predicting rows, linear in the hidden states, is fitted here, without
data, on sequences that the model writes under the grammar. It tells spaces apart, but miscounts; so where the
architecture lets it, the model gets one block more that counts codes (`counting.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plait.hf.span_counter import channels_for, count_codes, widened
from plait.inference.engine import Engine
from plait.inference.grammar import Span
from plait.inference.requests import Request
from plait.inference.sampling import Sampling
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Multimodal, Sequence, collate

POSITIONS = 2**16  # that are written to fit on, at most
PROMPTS = 16  # texts that spans are written after
MIN_P = 0.02  # what is left out where they are written, as it will be
GAP = 8.0  # nats between the likeliest id that is possible and the likeliest that is not, which is asked for
PUSH = 0.3  # what a missing nat costs, squared, beside the likelihood
DECAY = 1e-4  # of the vectors
EXAMPLES = 200  # sequences to see sizes in


def add_export_constraints(checkpoint: Checkpoint, engine: Engine) -> Checkpoint:
    """The backbone with rows for reading and predicting, codes made whole, whose spaces and closing tokens lie apart;
    the one given stays as it is. A model of text alone is given back."""
    model = checkpoint.model
    if not model.vocabulary.levels:
        return checkpoint
    groups = _groups(model)
    with torch.no_grad():
        samples = _written(checkpoint, engine)
        shift = _fit(_places(model, groups, samples))
        channels = channels_for(model.config, engine.spans, len(groups))
        settled = widened(model, channels)
        assert settled.lm_head is not None
        for (start, stop), vector in zip(groups, shift, strict=True):
            settled.lm_head.free[start:stop, : len(vector)] += vector
        if channels:
            examples = [one.ids for one in samples[:: max(len(samples) // EXAMPLES, 1)]]
            count_codes(settled, model.config.backbone.width, engine.spans, groups, examples)
    return replace(checkpoint, model=settled)


def _groups(model: Multimodal) -> list[tuple[int, int]]:
    """The ranges of ids that move together: spaces, of which closing tokens are apart. All ids lie in one of them, in
    their order; the first is text."""
    vocabulary = model.vocabulary
    groups = []
    for name, (start, stop) in vocabulary.id_ranges.items():
        if name in vocabulary.closers:
            groups += [(start, stop - 1), (stop - 1, stop)]
        else:
            groups.append((start, stop))
    return groups


# --- what the model writes --------------------------------------------------------------------------------------


@dataclass
class _Written:
    """Ids, and for each of them where in the vocabulary the next one may lie: ids that start a group."""

    ids: list[int]
    next: list[tuple[int, ...]]


def _written(checkpoint: Checkpoint, engine: Engine, seed: int = 0) -> list[_Written]:
    """Sequences of the model's own, as training would have them: after some texts, spans of every column and text that
    goes on; the shortest first."""
    model, vocabulary = checkpoint.model, checkpoint.model.vocabulary
    columns = [
        (c, token_type)
        for c, token_type in vocabulary.columns.items()
        if not {c, token_type} & {*model.config.read_only}
    ]
    texts = [label for labels in checkpoint.labels.values() for label in labels]
    prompts = [checkpoint.text.encode(text) for text in texts[:: max(len(texts) // PROMPTS, 1)][:PROMPTS]]
    if not prompts and (opener := next((vocabulary.opener(c) for c, s in columns if s == "text"), None)) is not None:
        completions = engine.run([_request([opener], "text", PROMPTS, 0, engine.max_length // 4)])[0].samples
        prompts = [written.ids for written in completions if written.ids]
    sequences = []
    for column, token_type in [*columns, (None, "text")]:
        span = engine.spans[token_type]
        before = [vocabulary.opener(column)] if column else []
        room = engine.max_length // 2 if span.limit is None else None
        long = span.limit or min(engine.max_length // 2, 64)
        per_request = max(POSITIONS // ((len(columns) + 1) * (len(prompts) + 1) * long), 1)
        requests = [
            _request([*ids, *before], token_type, per_request, seed * (PROMPTS + 1) + number, room)
            for number, ids in enumerate([[], *prompts])
            if (ids or before) and len(ids) + 1 + (span.limit or 1) <= engine.max_length
        ]
        for request, result in zip(requests, engine.run(requests), strict=True):
            for written in result.samples:
                sequence = _sequence(request.context.ids, written.ids, span, model, written.finish == "end")
                sequences.append(_Written(sequence.ids[: engine.max_length], sequence.next[: engine.max_length]))
    return sorted(sequences, key=lambda written: len(written.ids))


def _request(ids: list[int], token_type: str, n: int, seed: int, room: int | None) -> Request:
    return Request(Sequence().read_ids(ids), token_type, Sampling(min_p=MIN_P), n, seed=seed, max_new_tokens=room)


def _sequence(context: list[int], ids: list[int], span: Span, model: Multimodal, ended: bool) -> _Written:
    """A context and a span after it, with the end where there is one."""
    vocabulary = model.vocabulary
    text: tuple[int, ...] = (0,)
    if span.token_type == "text":
        return _Written([*context, *ids], [text] * (len(context) + len(ids)))
    codes = (span.start,)
    closer = vocabulary.closer(span.token_type) if span.token_type in vocabulary.closers else None
    following = []
    for count in range(len(ids) + 1):
        full = count == span.limit
        if closer is None:
            following.append(text if full else codes)
        else:
            following.append((closer,) if full else (*codes, closer) if span.may_end(count) and count else codes)
    if closer is not None and ended:
        ids, following = [*ids, closer], [*following, text]
    return _Written([*context, *ids], [*[text] * (len(context) - 1), *following])


# --- the classifier ---------------------------------------------------------------------------------------------


@dataclass
class _Places:
    """What decides the group of the next id, at N places: hidden states (N, D), and of each of G groups (N, G) the log
    of its ids' summed chances and of the likeliest one's (both up to a constant), and whether it is possible."""

    hidden: Tensor
    mass: Tensor
    top: Tensor
    possible: Tensor

    def gap(self, added: Tensor) -> Tensor:
        """Log of how likely the likeliest impossible id is, relative to the likeliest possible one, with logits (N, G)
        added to those of the groups: (N,)."""
        top, lowest = self.top + added, torch.finfo(added.dtype).min
        worst, best = (top.masked_fill(excluded, lowest).amax(-1) for excluded in (self.possible, ~self.possible))
        return worst - best


def _places(model: Multimodal, groups: list[tuple[int, int]], sequences: list[_Written]) -> _Places:
    device = next(model.parameters()).device
    starts = torch.tensor([start for start, _ in groups])
    states, masses, tops, possible = [], [], [], []
    head = model.output_embedding.table()
    for at in range(0, len(sequences), 32):
        part = sequences[at : at + 32]
        batch = collate([Sequence().read_ids(written.ids) for written in part], {}, model.vocabulary.pad)
        hidden = model(batch.to(device))
        rows = torch.cat([row[: len(written.ids)] for row, written in zip(hidden, part, strict=True)])
        logits = rows @ head.t()
        states.append(rows)
        masses.append(torch.stack([logits[:, a:b].logsumexp(-1) for a, b in groups], -1))
        tops.append(torch.stack([logits[:, a:b].amax(-1) for a, b in groups], -1))
        following = [torch.tensor(next) for written in part for next in written.next]
        possible.append(torch.stack([torch.isin(starts, next) for next in following]).to(device))
    return _Places(torch.cat(states), torch.cat(masses), torch.cat(tops), torch.cat(possible))


@torch.enable_grad()
def _fit(places: _Places) -> Tensor:
    """One vector a group, (G, D), whose product with a hidden state is added to the group's logits: the classifier that
    is likeliest under the model's own chances of what is possible, and leaves a gap to all that is not."""
    target = places.mass.masked_fill(~places.possible, torch.finfo(places.mass.dtype).min).softmax(-1)
    shape = places.mass.shape[1], places.hidden.shape[1]
    shift = torch.zeros(shape, device=places.hidden.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        added = places.hidden @ shift.t()
        missing = (places.gap(added) + GAP).relu().square().mean()
        unlike = -(target * (places.mass + added).log_softmax(-1)).sum(-1).mean()
        loss = unlike + PUSH * missing + DECAY * shift.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return shift.detach()
