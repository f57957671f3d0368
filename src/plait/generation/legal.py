"""Before an export: a model that keeps its spans well formed without our grammar.

In training the softmax runs over one space nearly always, so how much a space's logits lie above another's is hardly
learnt. Adding one vector to all predicting rows of a space moves its logits together: no probability within the space
changes, and which space comes next becomes a linear classifier of the hidden state. It is fitted here, without data, on
sequences that the model writes under the grammar.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.generation.engine import Engine, Request
from plait.generation.sampling import Sampling
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Multimodal, Sequence, collate

POSITIONS = 16_384  # that are written to fit on, about
PROMPTS = 16  # texts that spans are written after
DECAY = 1e-5


def settle(checkpoint: Checkpoint, engine: Engine) -> Checkpoint:
    """The same model with a head whose spaces, and whose closing tokens, lie apart; the one given stays as it is.

    A tied model gets a head of its own. A model of text alone is given back.
    """
    model = checkpoint.model
    if not model.vocabulary.levels:
        return checkpoint
    fitting = _written(checkpoint, engine)
    settled = Multimodal(model.config.model_copy(update={"tied": False}))
    tensors = model.state_dict()
    head = {f"head.{name}": tensor for name, tensor in model.predicting.state_dict().items()}
    settled.load_state_dict({**tensors, **head})
    settled.to(engine.device.torch).eval()
    assert settled.head is not None
    groups = _groups(model)
    shift = _fit(settled, groups, fitting)
    with torch.no_grad():
        for (start, stop), vector in zip(groups, shift, strict=True):
            settled.head.free[start:stop] += vector
    return replace(checkpoint, model=settled)


def _groups(model: Multimodal) -> list[tuple[int, int]]:
    """The ranges of ids that move together: spaces, of which closing tokens are apart. All ids lie in one of them, in
    their order; the first is text."""
    vocabulary = model.vocabulary
    found = []
    for name, (start, stop) in vocabulary.spaces.items():
        if name in vocabulary.closers:
            found += [(start, stop - 1), (stop - 1, stop)]
        else:
            found.append((start, stop))
    return found


def _written(checkpoint: Checkpoint, engine: Engine) -> list[tuple[list[int], list[int]]]:
    """Sequences of the model's own, (context, what follows it), each as training would have it."""
    model, vocabulary = checkpoint.model, checkpoint.model.vocabulary
    columns = [(c, space) for c, space in vocabulary.columns.items() if not {c, space} & {*model.config.read_only}]
    texts = [label for labels in checkpoint.labels.values() for label in labels]
    prompts = [checkpoint.text.encode(text) for text in texts[:: max(len(texts) // PROMPTS, 1)][:PROMPTS]]
    if not prompts and (opener := next((vocabulary.opener(c) for c, s in columns if s == "text"), None)) is not None:
        made = engine.run([_request([], opener, "text", PROMPTS, 0, engine.max_length // 4)])[0].samples
        prompts = [written.ids for written in made if written.ids]
    found = []
    for column, space in columns:
        span, opener = engine.spans[space], vocabulary.opener(column)
        room = engine.max_length // 2 if span.limit is None else None
        long = span.limit or min(engine.max_length // 2, 64)
        each = max(POSITIONS // (len(columns) * (len(prompts) + 1) * long), 1)
        requests = [
            _request(ids, opener, space, each, seed, room)
            for seed, ids in enumerate([[], *prompts])
            if len(ids) + 1 + (span.limit or 1) <= engine.max_length
        ]
        for request, result in zip(requests, engine.run(requests), strict=True):
            for written in result.samples:
                ended = written.finish == "end"
                closer = [vocabulary.closer(space)] if ended and space in vocabulary.closers else []
                end = [vocabulary.end] if ended else []
                room_left = engine.max_length + 1 - len(request.context)
                found.append((request.context.ids, [*written.ids, *closer, *end][:room_left]))
    return [(context, ids) for context, ids in found if ids]


def _request(ids: list[int], opener: int, space: str, n: int, seed: int, room: int | None) -> Request:
    context = Sequence().read_ids([*ids, opener])
    return Request(context, space, Sampling(), n, seed=seed, max_new_tokens=room)


def _fit(model: Multimodal, groups: list[tuple[int, int]], sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """One vector a group, (G, D): the maximum-likelihood classifier of the next id's group, on top of the model's own
    logits."""
    device = next(model.parameters()).device
    stops = torch.tensor([stop for _, stop in groups], device=device)
    states, masses, wanted = [], [], []
    sequences = sorted(sequences, key=lambda pair: len(pair[0]) + len(pair[1]))
    with torch.no_grad():
        head = model.predicting.table()
        for at in range(0, len(sequences), 32):
            part = sequences[at : at + 32]
            batch = collate([Sequence().read_ids(c + ids[:-1]) for c, ids in part], {}, model.vocabulary.pad)
            hidden = model(batch.to(device))
            for row, (context, ids) in zip(hidden, part, strict=True):
                # Within a prompt, text goes on.
                following = torch.tensor([*[0] * (len(context) - 1), *ids], device=device)
                row = row[: len(following)]
                states.append(row)
                masses.append(torch.stack([(row @ head[a:b].t()).logsumexp(-1) for a, b in groups], -1))
                wanted.append(torch.bucketize(following, stops, right=True))
    x, mass, target = torch.cat(states), torch.cat(masses), torch.cat(wanted)
    shift = torch.zeros(len(groups), x.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(mass + x @ shift.t(), target) + DECAY * shift.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return shift.detach()
