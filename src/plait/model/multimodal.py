"""The whole model: encoders, one vocabulary, one backbone, one embedding space; and the sequences it sees.

Shapes: B batch, L sequence length, D width, V vocabulary, N samples of one modality, E width of the space.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from plait.kernels.linear import PackedLinear, pack_linear_layers
from plait.modalities.base import MediaModality, RowModality, Vocabulary, role_of
from plait.modalities.fsq import FSQ
from plait.modalities.registry import MODALITIES, SETTINGS
from plait.model.cross_entropy import SplitTable
from plait.model.objectives import PAIR_LOSSES, PairLoss
from plait.model.transformer import Transformer, TransformerConfig

IGNORE = -100  # no target here


class ModelConfig(BaseModel):
    """Everything that fixes the network, so that a checkpoint can be built again from its `config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: TransformerConfig
    vocabulary: Vocabulary
    embed_dim: int = 128  # width of the embedding space; 0 for a model without one
    contrastive: str = "softmax"  # the loss that makes the space, of PAIR_LOSSES
    pools_inputs: bool = False  # embeddings of media are pooled from what enters the backbone, too
    tied: bool = False  # one table of rows for reading and for predicting
    modalities: dict[str, dict[str, object]] = {}  # the settings of each modality present, text aside
    read_only: list[str] = []  # modalities, and columns, that are never written


# --- sequences --------------------------------------------------------------------------------------------------


class Medium(NamedTuple):
    """A medium that a sequence reads."""

    start: int  # of its positions
    modality: str
    sample: np.ndarray
    tokens: int  # positions that it takes


class SequenceSpan(NamedTuple):
    """Positions of a sequence that embed one part of a record: a text or a medium."""

    modality: str
    start: int
    stop: int


class BatchSpan(NamedTuple):
    """A span of a batch, in its row."""

    row: int
    modality: str
    start: int
    stop: int


@dataclass
class Sequence:
    """A context and a target as the backbone sees them, built left to right.

    `ids` has a place for each position; where media is read, the ids are padding and `media` says what lies there.
    `targets[i]` is the id to predict from position i, or IGNORE. `spans` are the places that pooling may use.
    """

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    spans: list[SequenceSpan] = field(default_factory=list)

    def read_ids(self, ids: ListOf[int], span: str | None = None) -> Sequence:
        """Append context ids; with `span`, they form one that may be pooled."""
        if span and ids:
            self.spans.append(SequenceSpan(span, len(self.ids), len(self.ids) + len(ids)))
        self.ids.extend(ids)
        self.targets.extend([IGNORE] * len(ids))
        return self

    def read_media(self, modality: MediaModality, opener: int, sample: np.ndarray, pad: int) -> Sequence:
        """Append a medium that goes in through its encoder, after the opener of its column."""
        count = modality.token_count(len(sample))
        self.read_ids([opener])
        self.media.append(Medium(len(self.ids), modality.name, sample, count))
        return self.read_ids([pad] * count, modality.name)

    def write(self, ids: ListOf[int]) -> Sequence:
        """Append ids that are to be predicted. The sequence must not be empty."""
        if ids:
            self.targets[-1] = ids[0]
            self.ids.extend(ids)
            self.targets.extend([*ids[1:], IGNORE])
        return self

    def extend(self, other: Sequence) -> Sequence:
        """Append another sequence."""
        at = len(self.ids)
        self.ids.extend(other.ids)
        self.targets.extend(other.targets)
        self.media.extend(medium._replace(start=medium.start + at) for medium in other.media)
        self.spans.extend(SequenceSpan(name, start + at, stop + at) for name, start, stop in other.spans)
        return self

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class MediaBatch:
    """The samples of one modality in a batch, and where their embeddings go."""

    values: Tensor  # (N, ...)
    lengths: Tensor  # (N,)
    take: Tensor  # (K,) places in the flattened (N * tokens) embeddings
    put: Tensor  # (K,) places in the flattened (B * L) sequence
    rows: Tensor  # (N,) the sequence each sample belongs to


@dataclass
class Batch:
    """Sequences padded to one length."""

    tokens: Tensor  # (B, L)
    targets: Tensor  # (B, L), IGNORE where there is none
    lengths: Tensor  # (B,)
    media: dict[str, MediaBatch]
    spans: list[BatchSpan]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == "cpu":
            return self
        media = {
            name: MediaBatch(*(getattr(part, f).to(device, non_blocking=True) for f in MediaBatch.__dataclass_fields__))
            for name, part in self.media.items()
        }
        tokens, targets, lengths = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.lengths))
        return Batch(tokens, targets, lengths, media, self.spans)


def bucket_length(length: int) -> int:
    """The next length of a grid with eight steps to each doubling: training then meets few shapes, for each of which
    oneDNN compiles its kernels anew."""
    step = max(2 ** ((length - 1).bit_length() - 4), 1)
    return -(-length // step) * step


def collate(
    sequences: ListOf[Sequence], modalities: dict[str, MediaModality], pad: int, few_shapes: bool = False
) -> Batch:
    """Pad sequences on the right into one batch on the CPU. With `few_shapes` somewhat further, to a `roomy` length,
    and likewise with more samples of each modality, which nothing reads."""
    longest = max(len(s) for s in sequences)
    longest = bucket_length(longest) if few_shapes else longest
    tokens = np.full((len(sequences), longest), pad, np.int64)
    targets = np.full((len(sequences), longest), IGNORE, np.int64)
    by_modality: dict[str, list[tuple[int, int, np.ndarray, int]]] = {}
    spans = []
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence.ids
        targets[row, : len(sequence)] = sequence.targets
        for start, name, sample, count in sequence.media:
            by_modality.setdefault(name, []).append((row, start, sample, count))
        spans += [BatchSpan(row, *span) for span in sequence.spans]
    media = {}
    for name, samples in by_modality.items():
        padded = [sample for _, _, sample, _ in samples]
        padded += [padded[-1]] * (bucket_length(len(padded)) - len(padded) if few_shapes else 0)
        values, lengths = modalities[name].batch(padded)
        stride = max(count for *_, count in samples)
        take = [np.arange(count) + i * stride for i, (*_, count) in enumerate(samples)]
        put = [np.arange(count) + row * longest + start for row, start, _, count in samples]
        media[name] = MediaBatch(
            values,
            lengths,
            torch.from_numpy(np.concatenate(take)),
            torch.from_numpy(np.concatenate(put)),
            torch.tensor([row for row, *_ in samples]),
        )
    sizes = torch.tensor([len(s) for s in sequences])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), sizes, media, spans)


# --- the model --------------------------------------------------------------------------------------------------


class TokenEmbedding(nn.Module):
    """One row a token, (V, D). A code's row is a free row plus one row for each of its FSQ digits, so that codes
    that decode alike start alike."""

    optimizer_groups: ClassVar = {"*": "no_decay"}  # a row belongs to one token alone

    text_rows: Tensor | None  # (text, D) of text ids, where they are frozen apart and `free` holds the others alone

    def __init__(self, vocabulary: Vocabulary, width: int, std: float) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("text_rows", None)
        self.packed: PackedLinear | None = None  # all rows, where they are kept for use alone
        self.free = nn.Parameter(torch.randn(vocabulary.size, width).mul_(std))
        self.digits = nn.ParameterDict()
        for modality, levels in vocabulary.levels.items():
            quantizer = FSQ(levels)
            digits = quantizer.digits(torch.arange(quantizer.size)) + torch.tensor([0, *np.cumsum(levels)[:-1]])
            start = vocabulary.id_ranges[modality][0]
            with torch.no_grad():
                self.free[start : start + quantizer.size] *= 0.5
            self.digits[modality] = nn.Parameter(torch.randn(sum(levels), width) * std / len(levels) ** 0.5)
            self.register_buffer(f"places_{modality}", digits, persistent=False)  # (codes, digits)

    def of_type(self, name: str) -> Tensor:
        """The rows of one space, (stop - start, D)."""
        start, stop = self.vocabulary.id_ranges[name]
        if self.packed is not None:
            return self.packed.rows(torch.arange(start, stop))
        if self.text_rows is not None:
            return self.split_table().dense()[start:stop]
        rows = self.free if stop - start == len(self.free) else self.free[start:stop]
        if name not in self.digits:
            return rows
        structured = F.embedding_bag(getattr(self, f"places_{name}"), self.digits[name], mode="sum")
        return rows + F.pad(structured, (0, 0, 0, len(rows) - len(structured)))

    def table(self) -> Tensor:
        """All rows, (V, D)."""
        if self.packed is not None:
            return self.packed.dense()
        if self.text_rows is not None:
            return self.split_table().dense()
        parts = [self.of_type(name) for name in self.vocabulary.id_ranges]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def freeze_text(self) -> None:
        """Hold the rows of text ids apart, frozen, in the precision that they have, so that what is learned of the
        others takes their memory alone."""
        text, old = self.vocabulary.text, self.free.detach()
        self.text_rows = old[:text]
        self.free = nn.Parameter(old[text:].float().clone())

    def join_text(self) -> None:
        """All rows in one table again, frozen, in fp32."""
        if self.text_rows is not None:
            rows = torch.cat((self.text_rows.float(), self.free.detach()))
            self.text_rows = None
            self.free = nn.Parameter(rows, requires_grad=False)

    def split_table(self) -> SplitTable:
        """The rows where those of text are frozen apart."""
        assert self.text_rows is not None
        text = self.vocabulary.text
        parts = []
        for name, (start, stop) in self.vocabulary.id_ranges.items():
            rows = self.free[max(start - text, 0) : stop - text]
            if name in self.digits:
                structured = F.embedding_bag(getattr(self, f"places_{name}"), self.digits[name], mode="sum")
                rows = rows + F.pad(structured, (0, 0, 0, len(rows) - len(structured)))
            parts.append(rows)
        return SplitTable(self.text_rows, torch.cat(parts) if len(parts) > 1 else parts[0])

    @torch.no_grad()
    def pack(self, storage: str) -> None:
        """Keep the rows packed, in less memory, for use alone; see `kernels.linear`."""
        if self.packed is not None:
            return
        self.packed = PackedLinear(self.table(), None, storage)
        self.free = nn.Parameter(self.free.new_empty(0, self.free.shape[1]), requires_grad=False)
        self.digits = nn.ParameterDict()


def embed_tokens(ids: Tensor, table: Tensor | PackedLinear | SplitTable) -> Tensor:
    """Rows (..., D) of a table for ids (...)."""
    if not isinstance(table, Tensor):
        return table.rows(ids.flatten()).view(*ids.shape, -1)
    return F.embedding(ids, table)


class Multimodal(nn.Module):
    """Reads text, images and audio, predicts text and codes, and embeds them in one space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = config.vocabulary
        width = config.backbone.width
        self.modalities = nn.ModuleDict(
            {
                name: MODALITIES[name](SETTINGS[name].model_validate(settings), width)
                for name, settings in config.modalities.items()
            }
        )
        self.token_embedding = TokenEmbedding(config.vocabulary, width, 0.02 if config.tied else 0.5)
        self.lm_head = None if config.tied else TokenEmbedding(config.vocabulary, width, 0.02)
        self.backbone = Transformer(config.backbone)
        if config.embed_dim:
            self.project = nn.Linear(width, config.embed_dim, bias=False)
            for name, value in self.pair_loss.scalars.items():
                self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float32)))

    @property
    def pair_loss(self) -> PairLoss:
        """What makes embeddings of one record agree."""
        return PAIR_LOSSES[self.config.contrastive]

    @property
    def pair_scalars(self) -> dict[str, nn.Parameter]:
        """The scalars of `pair_loss`, by name; none in a model without an embedding space."""
        names = self.pair_loss.scalars if self.config.embed_dim else ()
        return {name: getattr(self, name) for name in names}

    @property
    def output_embedding(self) -> TokenEmbedding:
        """The table by which tokens are predicted: the head, or that of the inputs where it is tied."""
        return self.token_embedding if self.lm_head is None else self.lm_head

    @property
    def media(self) -> dict[str, MediaModality]:
        """The modalities that go in through an encoder and out through a codec, by name."""
        return {name: part for name, part in self.modalities.items() if role_of(part) == "media"}  # type: ignore[misc]

    @property
    def row_modality(self) -> RowModality | None:
        """The modality whose things have a row each, beyond the vocabulary, if the model has one."""
        parts = [part for part in self.modalities.values() if role_of(part) == "rows"]
        return parts[0] if parts else None  # type: ignore[return-value]

    @property
    def id_ranges(self) -> dict[str, tuple[int, int]]:
        """Token type -> (first id, one past the last): those of the vocabulary, and beyond it the modality of rows."""
        if (beyond := self.row_modality) is None:
            return self.vocabulary.id_ranges
        size = self.vocabulary.size
        return {**self.vocabulary.id_ranges, beyond.name: (size, size + len(beyond))}

    def lookup(self, rows: Tensor | None = None) -> Tensor | SplitTable:
        """`reading`, without a copy of rows that are frozen apart."""
        split = self.token_embedding.text_rows is not None
        return self.token_embedding.split_table() if split else self.reading(rows)

    def reading(self, rows: Tensor | None = None) -> Tensor:
        """The rows of all ids that are read, (V, D); `rows` are those beyond the vocabulary where they are at hand."""
        table = self.token_embedding.table()
        if (beyond := self.row_modality) is None:
            return table
        return torch.cat((table, beyond.rows() if rows is None else rows))

    def pack(self, storage: str) -> None:
        """Keep the weights of the backbone and the vocabulary packed, once and in less memory: for use on a processor,
        not for training."""
        self.requires_grad_(False)
        pack_linear_layers(self.backbone, storage)
        self.token_embedding.pack(storage)
        if self.lm_head is not None:
            self.lm_head.pack(storage)

    def inputs(self, batch: Batch, table: Tensor | PackedLinear | SplitTable | None = None) -> Tensor:
        """Token rows, with encoded media in their places: (B, L, D). `table` is `reading()` where it is at hand."""
        x = embed_tokens(batch.tokens, self.lookup() if table is None else table)
        flat = x.flatten(0, 1)
        for name, media in batch.media.items():
            encoded = self.media[name].encoder(media.values, media.lengths).flatten(0, 1)
            flat = flat.index_copy(0, media.put, encoded[media.take].to(flat.dtype))
        return flat.view_as(x)

    def forward(self, batch: Batch, table: Tensor | SplitTable | None = None) -> Tensor:
        """Hidden states (B, L, D), causal; what lies beyond a sequence's end means nothing. `table` as in `inputs`."""
        return self.backbone(self.inputs(batch, table))

    def logits(self, hidden: Tensor, token_type: str | None = None) -> Tensor:
        """(..., D) to logits over one space, or over the whole vocabulary: (..., V)."""
        rows = self.output_embedding.table() if token_type is None else self.output_embedding.of_type(token_type)
        return hidden @ rows.to(hidden.dtype).t()

    def pool(
        self, inputs: Tensor, hidden: Tensor, spans: ListOf[SequenceSpan], rows: ListOf[int] | None = None
    ) -> Tensor:
        """The embeddings of spans (modality, start, stop), each in its row or in the one of its place: the mean of
        hidden states (B, L, D), and for media of the backbone's inputs (B, L, D) beside them, projected, of unit
        length; (S, E).

        From hidden states alone a new model's photos all look the same to the contrast, which then makes the texts
        equal too, and stays there.
        """
        device = hidden.device
        row = torch.arange(len(spans), device=device) if rows is None else torch.tensor(rows, device=device)
        starts = torch.tensor([span.start for span in spans], device=device)
        stops = torch.tensor([span.stop for span in spans], device=device)
        places = torch.arange(hidden.shape[1], device=device)
        inside = (places >= starts[:, None]) & (places < stops[:, None])
        weight = inside.float() / (stops - starts)[:, None]
        mean = torch.bmm(weight[:, None], hidden[row].float())[:, 0]
        if self.config.pools_inputs:
            encoded = torch.tensor([span.modality in self.modalities for span in spans], device=device)
            normed = F.rms_norm(inputs.float(), inputs.shape[-1:])
            mean = mean + torch.bmm((weight * encoded[:, None])[:, None], normed[row])[:, 0]
        return F.normalize(self.project(mean).float(), dim=-1)

    def parameter_count(self) -> dict[str, int]:
        """Parameters by part."""
        parts: dict[str, nn.Module] = {"backbone": self.backbone, "token embedding": self.token_embedding}
        if self.lm_head is not None:
            parts["lm head"] = self.lm_head
        if self.row_modality is not None:
            parts[f"{self.row_modality.name}s"] = self.modalities[self.row_modality.name]
        for name, modality in self.media.items():
            parts |= {f"{name} encoder": modality.encoder, f"{name} codec": modality.codec}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
