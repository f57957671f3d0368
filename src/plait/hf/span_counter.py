"""One block more that counts a span's codes, so that an export ends its spans where the grammar does.

New channels beside the old ones say what kind each token is, and no old block reads them. In the last block one head a
space looks at the opener and the codes after it alike: after n codes the opener's share is near 1 / (n + 1). The
feed-forward layer turns that share into what the grammar allows after n codes, exactly at each n, and writes it to
channels of which the head makes logits of whole groups; behind text it rules codes out. All weights are set, none is
trained. What is written is so small beside the old channels that those stay what they were: within a group no
probability changes.

This asks for RMS norms, rotary positions and normalised queries and keys (Qwen3), a head for each space and one more.
One span of each space is counted in a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from plait.inference.grammar import Span
from plait.modalities.base import Vocabulary
from plait.model.layers import RMSNorm
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import Block

SMALL = 1e-4  # what is written to new channels, beside the old ones
SHARP = 1e7  # of the steps that the feed-forward layer makes
LOSS = 25.0  # nats that a group loses where it is impossible, at least
FOCUS = 16.0  # nats for tokens that a head counts, and against all others


def _counted(spans: dict[str, Span]) -> dict[str, Span]:
    """Spans whose codes have to be counted."""
    return {name: span for name, span in spans.items() if span.limit is not None}


def channels_for(config: ModelConfig, spans: dict[str, Span], groups: int) -> int:
    """How many new channels counting takes; 0 where the architecture cannot, or the spans are too long for it."""
    backbone, counted = config.backbone, _counted(spans)
    able = backbone.norm == "rms" and backbone.position == "rotary" and backbone.qk_norm
    units = 1 + sum(span.limit + 2 for span in counted.values() if span.limit is not None)
    if not able or not counted or len(counted) + 1 > backbone.kv_heads or units > backbone.hidden:
        return 0
    # See `count_codes`; the end may cut a group in three.
    needed = 3 * len(counted) + 1 + len(counted) + 1 + groups + 2
    return -(-needed // backbone.heads) * backbone.heads


def widened(model: Multimodal, channels: int) -> Multimodal:
    """The backbone and the rows, codes made whole, with so many channels more, all zero, and then with one block more
    that adds nothing; what is predicted stays the same. No other part of the model is taken along."""
    old = model.config.backbone
    width = old.width + channels
    eps = old.norm_eps * old.width / width
    backbone = old.model_copy(update={"width": width, "layers": old.layers + (channels > 0), "norm_eps": eps})
    update = {"backbone": backbone, "tied": False, "modalities": {}, "embed_dim": 0}
    wide = Multimodal(model.config.model_copy(update=update)).to(model.token_embedding.free.device)
    wide.eval().requires_grad_(False)
    assert wide.lm_head is not None
    for rows, source in ((wide.token_embedding, model.token_embedding), (wide.lm_head, model.output_embedding)):
        for parameter in rows.parameters():
            parameter.zero_()
        rows.free[:, : old.width] = source.table()
    state = model.backbone.state_dict()
    for name, parameter in wide.backbone.named_parameters():
        parameter.zero_()
        if name in state:
            parameter[tuple(slice(0, size) for size in state[name].shape)] = state[name]
            if channels and name.endswith(("attention_norm.weight", "feed_norm.weight", "final_norm.weight")):
                parameter.mul_(math.sqrt(old.width / width))  # zeros make the mean square smaller
    return wide


def shares(frequency: float, longest: int) -> Tensor:
    """The opener's share of a head's look after 0 .. longest codes, (longest + 1,) fp64, falling: keys turn a little
    with their distance even in the slowest pair of dimensions, by `frequency` radians a position."""
    distance = torch.arange(longest + 1, dtype=torch.float64)
    look = (FOCUS * (frequency * distance).cos()).exp()
    return look / look.cumsum(0)


@dataclass(frozen=True)
class Channels:
    """Where the added channels begin: what opens each space, its codes, its closer, all else; the share of each space's
    opener in a head's look, the size of a share of one; what is written, a channel a group of ids."""

    spaces: list[str]  # the token types that are counted
    opens: int
    codes: int
    closes: int
    other: int
    share: int
    one: int
    written: int

    @classmethod
    def after(cls, old: int, spaces: list[str]) -> Channels:
        """The channels behind the `old` ones of the model before."""
        opens, codes, closes = (old + len(spaces) * k for k in (0, 1, 2))
        other = closes + len(spaces)
        share = other + 1
        one = share + len(spaces)
        return cls(spaces, opens, codes, closes, other, share, one, one + 1)


def count_codes(
    model: Multimodal, old: int, spans: dict[str, Span], groups: list[tuple[int, int]], examples: list[list[int]]
) -> None:
    """Set the last block of a widened model, whose first `old` channels are those of the model before. Of example
    sequences it is taken how large what is written becomes."""
    counted = _counted(spans)
    block, final = model.backbone.blocks[-1], model.backbone.final_norm
    assert isinstance(block, Block) and isinstance(final, RMSNorm) and model.lm_head is not None
    assert isinstance(block.attention_norm, RMSNorm) and isinstance(block.feed_norm, RMSNorm)
    for norm in (block.attention_norm, block.feed_norm, final):
        norm.weight[old:] = 1 / SMALL
    # After a span nothing but the end is possible: it goes apart from the text around it.
    end = model.vocabulary.end
    cuts = [
        (max(a, start), min(b, stop)) for start, stop in groups for a, b in ((0, end), (end, end + 1), (end + 1, stop))
    ]
    groups = [(start, stop) for start, stop in cuts if start < stop]
    channels = Channels.after(old, list(counted))
    kinds = _channel_of_each_id(model.vocabulary, channels)
    width = model.config.backbone.width
    model.token_embedding.free[:, old:] = SMALL * one_hot(kinds - old, width - old)
    _set_attention(model, block, channels)
    _set_feed_forward(model, block, channels, counted, groups)
    _set_head(model, channels, kinds, groups, examples)


def _channel_of_each_id(vocabulary: Vocabulary, channels: Channels) -> Tensor:
    """(ids,) the channel that says what an id is."""
    kinds = torch.full((vocabulary.size,), channels.other)
    for number, token_type in enumerate(channels.spaces):
        start, stop = vocabulary.id_ranges[token_type]
        kinds[start : stop - (token_type in vocabulary.closers)] = channels.codes + number
        if token_type in vocabulary.closers:
            kinds[vocabulary.closer(token_type)] = channels.closes + number
        for column, modality in vocabulary.columns.items():
            if modality == token_type:
                kinds[vocabulary.opener(column)] = channels.opens + number
    return kinds


def _set_attention(model: Multimodal, block: Block, channels: Channels) -> None:
    """A head for each space, and one for all, whose look at the opener becomes a share. Query and key lie in the
    slowest pair of dimensions, the value in the first."""
    config, spaces, opens = model.config.backbone, len(channels.spaces), channels.opens
    width, heads, kv_heads = config.head_width, config.heads, config.kv_heads
    slowest = width // 2 - 1
    block.q_norm.weight[slowest] = FOCUS / math.sqrt(width)  # of products of length sqrt(width), divided by it
    block.k_norm.weight[slowest] = 1
    every = torch.arange(opens, channels.share)
    for number in range(spaces + 1):
        query = number * (heads // kv_heads) * width
        key, value = ((heads + shift + number) * width for shift in (0, kv_heads))
        block.qkv.weight[query + slowest, every] = 1
        block.qkv.weight[key + slowest, every] = -1
        if number < spaces:
            block.qkv.weight[key + slowest, [opens + number, channels.codes + number]] = 1
            block.qkv.weight[value, opens + number] = 1
            block.attention_out.weight[channels.share + number, query] = SMALL
        else:
            block.qkv.weight[key + slowest, opens : opens + spaces] = 1
            block.qkv.weight[value, opens : opens + spaces] = 1
            block.attention_out.weight[channels.one, query] = SMALL


def _set_feed_forward(
    model: Multimodal, block: Block, channels: Channels, counted: dict[str, Span], groups: list[tuple[int, int]]
) -> None:
    """Units that turn shares into what each group loses after as many codes, (start, stop) of ids a group."""
    vocabulary, hidden, end = model.vocabulary, model.config.backbone.hidden, model.vocabulary.end
    one, loss_channels = channels.one, slice(channels.written, channels.written + len(groups))
    unit = 0
    for number, (token_type, span) in enumerate(counted.items()):
        assert span.limit is not None
        knots = shares(float(model.backbone.frequencies[-1]), span.limit)
        # A unit is one, or how far the share is below what it is after n codes; their sums meet any value at each n.
        # Taken from below, where shares lie close together, they stay small, and rounding with them.
        basis = torch.cat((torch.ones(len(knots), 1), (knots[None, :-1] - knots[:, None]).relu()), 1)
        losses = _losses(span, vocabulary.closer(token_type) if token_type in vocabulary.closers else None, end, groups)
        sums = torch.linalg.solve(basis, losses.double())
        units = slice(unit, unit + len(knots))
        gate, up = block.feed_in.weight[:hidden][units], block.feed_in.weight[hidden:][units]
        gate[0, one] = SHARP
        gate[1:, channels.share + number] = -SHARP
        gate[1:, one] = (SHARP * knots[:-1]).float()
        up[:, [channels.opens + number, channels.codes + number]] = 1
        block.feed_out.weight[loss_channels, units] = (-sums.t() * SMALL / SHARP).float()
        unit += len(knots)
        closed = torch.tensor([float(start != end) for start, _ in groups])
        block.feed_in.weight[unit, one] = SHARP
        block.feed_in.weight[hidden + unit, channels.closes + number] = 1
        block.feed_out.weight[loss_channels, unit] = -closed * SMALL / SHARP
        unit += 1
    # Behind text, codes and closers are impossible; that needs no opener in sight, so the size is the token's own.
    codes_only = torch.tensor([float(start >= vocabulary.id_ranges["text"][1]) for start, _ in groups])
    block.feed_in.weight[unit, channels.other] = SHARP
    block.feed_in.weight[hidden + unit, channels.other] = 1
    block.feed_out.weight[loss_channels, unit] = -codes_only * SMALL / SHARP


def _set_head(
    model: Multimodal, channels: Channels, kinds: Tensor, groups: list[tuple[int, int]], examples: list[list[int]]
) -> None:
    """What is written is the larger the smaller the old channels are: of the examples, a loss is taken at its least."""
    assert model.lm_head is not None
    loss_channel, device = channels.written, model.lm_head.free.device
    least = math.inf
    for ids in examples:
        inside = torch.isin(kinds[torch.tensor(ids)], torch.arange(channels.opens, channels.other + 1))
        hidden = model.backbone(model.token_embedding.free[torch.tensor(ids, device=device)][None])[0]
        lost = -hidden[inside.to(hidden.device), loss_channel : loss_channel + len(groups)].amin(
            -1
        )  # where some are lost
        if len(lost):
            least = min(least, float(lost[lost > lost.amax() / 8].amin()))
    for number, (start, stop) in enumerate(groups):
        model.lm_head.free[start:stop, loss_channel + number] = LOSS / least if least < math.inf else 0


def _losses(span: Span, closer: int | None, end: int, groups: list[tuple[int, int]]) -> Tensor:
    """What each group loses after 0 .. limit codes, (limit + 1, G): 1 where it is impossible."""
    assert span.limit is not None
    losses = torch.ones(span.limit + 1, len(groups))
    starts = [start for start, _ in groups]
    codes, last = starts.index(span.start), starts.index(end if closer is None else closer)
    for n in range(span.limit + 1):
        full = n == span.limit
        losses[n, codes] = full
        losses[n, last] = not (full or (closer is not None and n > 0 and span.may_end(n)))
    return losses
