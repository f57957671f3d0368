"""Which records make up step s, and the sequences they become. Order is a function of (seed, step), not a state.

A record with media is visited once for each medium: the medium is read and one of the record's other parts written,
and one of the other parts is read and the medium written. A record of texts alone is one text read and another
written; a single text is language modelling, in windows of the context's length.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from plait.core.errors import DivergedError
from plait.core.files import read_json, write_json
from plait.core.rng import key_of, uniform
from plait.data.dataset import Dataset, Joined
from plait.data.samples import Samples
from plait.data.tokens import Ids, Tokens, open_tokens, write_tokens
from plait.modalities.base import MediaModality, Vocabulary
from plait.modalities.text import Text
from plait.model.multimodal import Batch, Sequence, collate
from plait.training.conversations import Said, Scribe, sequences

# What a draw is for; the last key of `uniform`, so that no two decisions share a number.
ORDER, TARGET, SOURCE, DROP, AUGMENT, OFFSET = range(6)

PASS = 600  # tokens that take as long as what one more pass costs before it computes anything


@dataclass
class Split:
    """The records of one split, ready to become sequences."""

    ids: Ids
    texts: dict[str, Tokens]  # column -> token ids by record
    media: dict[str, Samples]  # column -> samples of the records that have one
    rows: dict[str, np.ndarray]  # column -> record -> row of its samples, -1 where absent
    codes: dict[str, Samples] = field(default_factory=dict)  # column -> codes, beside media
    chats: dict[str, list[list[Said] | None]] = field(default_factory=dict)  # column -> conversation by record
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # (records, text columns), 0 absent
    sources: np.ndarray | None = None  # record -> which of several datasets it is from
    notes: list[str] = field(default_factory=list)  # what is cut, for people

    def __len__(self) -> int:
        return len(self.ids)

    def has(self, column: str, record: int) -> bool:
        if column in self.chats:
            return bool(self.chats[column][record])
        return bool((self.texts[column].rows if column in self.texts else self.rows[column])[record] >= 0)

    def present(self, column: str) -> np.ndarray:
        """(N,) which records have a part of a column."""
        if column in self.chats:
            return np.array([bool(turns) for turns in self.chats[column]], bool)
        return (self.texts[column].rows if column in self.texts else self.rows[column]) >= 0

    def sample(self, column: str, record: int) -> np.ndarray:
        return self.media[column][self.rows[column][record]]

    def positives(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(len(a), len(b)), True where two records are one or share an equal text in some column."""
        first, second = self.keys[a][:, None], self.keys[b][None]
        same = ((first == second) & (first != 0)).any(-1) if self.keys.shape[1] else np.zeros((len(a), len(b)), bool)
        return same | (a[:, None] == b[None])


def load_split(
    dataset: Dataset,
    split: str,
    text: Text,
    media: dict[str, MediaModality],
    cache: Path,
    context: int,
    progress: Callable[[str, int, int], None] | None = None,
    limit: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Split:
    """Decode, fit and tokenise the records of a split; samples go to memory-mapped files under `cache`, and are only
    mapped where an earlier call has finished there. The `vocabulary` is what conversations are written in.

    What will not fit the longest clip or the context is counted in `notes`.
    """
    indices = dataset.indices(split)[:limit]
    plain = [c for c, kind in dataset.columns.items() if kind == "text" and c not in dataset.manifest.chats]
    if vocabulary is None:  # conversations are read as the texts that they are
        plain += dataset.manifest.chats
    reading = _Reading(dataset, split, indices, media, plain, progress)
    cached = _cached(reading, text, cache)
    sources = dataset.source(indices) if isinstance(dataset, Joined) else None
    ids = Ids(list(dataset.cells("id", indices)))
    result = Split(ids, cached.texts, cached.media, cached.rows, keys=cached.keys, sources=sources)
    result.notes = _cut_clips(reading, cached)
    if vocabulary is not None:
        for column in dataset.manifest.chats:
            values = [value for array in dataset.cells(column, indices) for value in array.to_pylist()]
            result.notes += _converse(result, column, values, text, vocabulary, media, context)
    result.notes += _cut_texts(result, list(dataset.columns), context)
    return result


@dataclass
class _Reading:
    """The records of a split on their way from a dataset into a cache.

    Attributes:
        indices: Their places in the dataset (N,).
        media: Modality by name.
        plain: Columns of texts.
        progress: Called now and then with what is done, or None.
    """

    dataset: Dataset
    split: str
    indices: np.ndarray
    media: dict[str, MediaModality]
    plain: list[str]
    progress: Callable[[str, int, int], None] | None

    @property
    def media_columns(self) -> list[str]:
        """The columns that become samples."""
        return [column for column, kind in self.dataset.columns.items() if kind in self.media]

    def report(self, column: str, done: int) -> None:
        """Say how far a column is."""
        if self.progress:
            self.progress(f"{self.split}: {column}", done, len(self.indices))

    def samples(self, column: str, rows: np.ndarray, cut: dict[str, int]) -> Iterator[np.ndarray]:
        """The samples of a column; fills in the row of each record (N,), and counts those that were cut."""
        modality = self.media[self.dataset.columns[column]]
        present = 0
        for record, row in enumerate(self.dataset.iterate(self.indices, [column])):
            if record % 500 == 0:
                self.report(column, record)
            if column in row.parts:
                rows[record] = present
                present += 1
                windows = modality.windows(row.parts[column])
                cut[column] += len(windows) > 1
                yield windows[0]

    def texts(self, column: str, keys: np.ndarray) -> Iterator[pa.Array]:
        """The texts of a column; fills in the key of each record's (N,), 0 where it has none."""
        done = 0
        for values in self.dataset.cells(column, self.indices):
            keys[done : done + len(values)] = [0 if v is None else key_of(v) | 1 for v in values.to_pylist()]
            done += len(values)
            self.report(column, done)
            yield values


@dataclass
class _Cached:
    """What the cache of a split holds; `cut` counts by column the samples that are longer than one may be."""

    media: dict[str, Samples]
    rows: dict[str, np.ndarray]
    texts: dict[str, Tokens]
    keys: np.ndarray
    cut: dict[str, int]


def _cached(reading: _Reading, text: Text, cache: Path) -> _Cached:
    """The cache of a split under `cache`, written first where there is none of these data and settings."""
    whole = cache / f"{reading.split}.json"
    made_of = _made_of(reading.dataset, reading.indices, text, reading.media)
    known = read_json(whole) if whole.exists() else {}
    if known.get("made_of") == made_of:
        return _open_cache(reading, cache, known["cut"])
    cache.mkdir(parents=True, exist_ok=True)
    whole.unlink(missing_ok=True)
    made = _write_cache(reading, text, cache)
    write_json(whole, {"cut": made.cut, "made_of": made_of})
    return made


def _open_cache(reading: _Reading, cache: Path, cut: dict[str, int]) -> _Cached:
    split, columns = reading.split, reading.media_columns
    return _Cached(
        media={column: Samples.open(cache / f"{split}-{column}") for column in columns},
        rows={column: np.load(cache / f"{split}-{column}-rows.npy") for column in columns},
        texts={column: open_tokens(cache / f"{split}-{column}-tokens") for column in reading.plain},
        keys=np.load(cache / f"{split}-keys.npy"),
        cut=cut,
    )


def _write_cache(reading: _Reading, text: Text, cache: Path) -> _Cached:
    split, count = reading.split, len(reading.indices)
    keys = np.zeros((count, len(reading.plain)), np.int64)
    made = _Cached({}, {}, {}, keys, dict.fromkeys(reading.media_columns, 0))
    for column in reading.media_columns:
        rows = made.rows[column] = np.full(count, -1)
        made.media[column] = Samples.write(cache / f"{split}-{column}", reading.samples(column, rows, made.cut))
        np.save(cache / f"{split}-{column}-rows.npy", rows)
    for place, column in enumerate(reading.plain):
        texts = reading.texts(column, keys[:, place])
        made.texts[column] = write_tokens(cache / f"{split}-{column}-tokens", texts, text.encode_batch, text.size)
    np.save(cache / f"{split}-keys.npy", keys)
    return made


def _cut_clips(reading: _Reading, cached: _Cached) -> list[str]:
    """A line for each column of which samples were cut."""
    columns = reading.dataset.columns
    return [
        f"{column}: {count:,} of {len(cached.media[column]):,} are longer than the longest clip, "
        f"{getattr(reading.media[columns[column]].settings, 'seconds', '?')} s; training takes their beginning"
        for column, count in cached.cut.items()
        if count
    ]


def _cut_texts(split: Split, columns: list[str], context: int) -> list[str]:
    """A line for each column of texts that are too long: one alone in its record is read in windows, beside other parts
    it gets half the context."""
    notes = []
    several = np.sum([split.present(column) for column in columns], axis=0) > 1
    for column, tokens in split.texts.items():
        beside = tokens.present & several
        count = int((tokens.lengths[beside] > context // 2 - 2).sum())
        if count:
            notes.append(
                f"{column}: {count:,} of {int(beside.sum()):,} texts are longer than {context // 2 - 2} tokens, about "
                "half the context; where they do not fit, training takes their beginning"
            )
    return notes


def _made_of(dataset: Dataset, indices: np.ndarray, text: Text, media: dict[str, MediaModality]) -> str:
    """A hash of all that the cache of a split depends on: the data, the tokenizer and how media are fitted."""
    digest = hashlib.sha256("".join(shard.sha256 for shard in dataset.manifest.shards).encode())
    digest.update(np.ascontiguousarray(indices).tobytes())
    digest.update(text.tokenizer.to_str().encode())
    for name, modality in media.items():
        digest.update(f"{name}:{modality.settings.model_dump_json()}".encode())
    return digest.hexdigest()


def _converse(
    split: Split, column: str, values: list[str | None], text: Text, vocabulary: Vocabulary,
    media: dict[str, MediaModality], context: int,
) -> list[str]:  # fmt: skip
    """Put a column's conversations into a split; returns what is cut, for people."""

    def size(record: int, part: str) -> int:
        modality, length = media[vocabulary.columns[part]], len(split.sample(part, record))
        return max(modality.token_count(length), modality.code_count(length)) + 2

    scribe = Scribe(text, vocabulary, context, size)
    found = [None if value is None else scribe.conversation(i, value) for i, value in enumerate(values)]
    split.chats[column] = found
    dropped = sum(turns is not None and not any(turn.written for turn in turns) for turns in found)
    told = {
        f"do not fit {context} tokens: their oldest turns are left out": scribe.shortened,
        "have no turn of the assistant's that fits, and are not learned": dropped,
    }
    return [f"{column}: {count:,} of {len(values):,} conversations {what}" for what, count in told.items() if count]


def add_codes(
    split: Split, columns: dict[str, str], media: dict[str, MediaModality], cache: Path, name: str, anew: bool
) -> None:
    """Encode the media of these columns once with the frozen codecs; codes that are there already serve again unless
    `anew`."""
    for column, samples in split.media.items():
        if column not in columns:
            continue
        path = cache / f"{name}-{column}-codes"
        if not anew and path.with_name(path.name + ".json").exists():
            split.codes[column] = Samples.open(path)
            continue
        modality = media[columns[column]]

        def codes(samples: Samples = samples, modality: MediaModality = modality) -> Iterator[np.ndarray]:
            for start in range(0, len(samples), 256):
                chunk = [samples[i] for i in range(start, min(start + 256, len(samples)))]
                with torch.inference_mode():
                    encoded = modality.codec.encode(*modality.batch(chunk)).numpy()
                for row, sample in zip(encoded, chunk, strict=True):
                    yield row[: modality.code_count(len(sample))].astype(np.int32)

        split.codes[column] = Samples.write(path, codes())


def room_needed(split: Split, columns: dict[str, str], media: dict[str, MediaModality]) -> int:
    """The shortest context that holds each medium beside a few words, and any two columns of media that one record
    may have."""
    read, written = {}, {}
    for column, samples in split.media.items():
        modality, length = media[columns[column]], int(samples.lengths.max(initial=1))
        read[column], written[column] = modality.token_count(length), modality.code_count(length)
    alone = [max(read[c], written[c]) + 8 for c in read]
    return max([*alone, *(read[a] + written[b] + 4 for a in read for b in read if a != b)], default=0)


Media = dict[tuple[str, int], np.ndarray]  # (column, record) -> a sample, or its codes


@dataclass
class Step:
    """The batches of one step, or of a part of one, of like lengths each, and which records' parts their spans are."""

    batches: list[Batch]
    span_records: list[np.ndarray]  # a batch -> a span -> record, -1 where it takes no part in the contrast
    records: np.ndarray  # the records visited
    first: int | None = None  # batches of the first of two threads, which has half of the work; None: it is not cut

    def halves(self) -> list[Step]:
        """What each of two threads computes; the step itself where it was not cut for two."""
        if self.first is None:
            return [self]
        parts = slice(self.first), slice(self.first, None)
        return [Step(self.batches[part], self.span_records[part], self.records) for part in parts]


class Sampler:
    """Steps as a function of their number."""

    def __init__(
        self,
        split: Split,
        vocabulary: Vocabulary,
        media: dict[str, MediaModality],
        batch_size: int,
        context: int,
        seed: int,
        cond_dropout: float,
        augment: bool,
        augment_targets: bool = False,
        unwritten: frozenset[str] = frozenset(),  # modalities and columns that are read only
        worth: float = PASS,  # of a batch more, in tokens of padding
        shares: ListOf[float] = (),  # of a batch, for each dataset but the first, which has the rest
    ) -> None:
        self.worth = worth
        self.media_work: dict[str, float] | None = None  # to cut steps for two threads: see `cut_in_two`
        self.split, self.vocabulary, self.media = split, vocabulary, media
        self.context, self.seed, self.cond_dropout = context, seed, cond_dropout
        self.augment, self.augment_targets = augment, augment_targets
        self.columns = {
            c: m for c, m in vocabulary.columns.items() if c in split.texts or c in split.media or c in split.chats
        }
        self.media_columns = [c for c, m in self.columns.items() if m != "text"]
        self.unwritten = {c for c, m in self.columns.items() if not unwritten.isdisjoint({c, m})}
        self.items = self._items()
        self.groups = self._groups(batch_size, shares)
        self.batch_size = sum(count for _, count in self.groups)
        self.steps_per_epoch = self._steps_per_epoch(0)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def _items(self) -> np.ndarray:
        """(items, 2): record and window. Only a record of one text has more than one window."""
        columns = [c for c in self.columns if c in self.split.chats or c in self.split.texts or c in self.split.rows]
        count = len(self.split)
        parts, useful = np.zeros(count, np.int32), np.zeros(count, bool)
        for column in columns:
            present = self.split.present(column)
            parts += present
            if column not in self.unwritten or column in self.split.media:
                useful |= present
        windows = useful.astype(np.int64)
        for column, tokens in self.split.texts.items():
            if column in self.columns:
                alone = useful & tokens.present & (parts == 1)
                windows[alone] = np.maximum(tokens.lengths[alone] // self.context, 1)
        records = np.repeat(np.arange(count), windows)
        first = np.cumsum(windows) - windows
        return np.stack([records, np.arange(len(records)) - np.repeat(first, windows)], 1)

    def _groups(self, batch_size: int, shares: ListOf[float]) -> list[tuple[np.ndarray, int]]:
        """For each dataset that has any: its items, by number, and how many of them a step takes."""
        if not shares or self.split.sources is None:
            return [(np.arange(len(self.items)), min(batch_size, len(self.items)))]
        counts = [max(round(batch_size * share), 1) for share in shares]
        of = self.split.sources[self.items[:, 0]]
        found = [np.flatnonzero(of == which) for which in range(len(counts) + 1)]
        wanted = [max(batch_size - sum(counts), 1), *counts]
        return [(mine, min(count, len(mine))) for mine, count in zip(found, wanted, strict=True) if len(mine)]

    def _steps_per_epoch(self, group: int) -> int:
        items, count = self.groups[group]
        return max(len(items) // max(count, 1), 1)

    def order(self, epoch: int, group: int = 0) -> np.ndarray:
        """The items of a dataset's epoch in their order; the remainder of the last batch waits for another epoch's."""
        kept = self._orders.get(group)
        if kept is None or kept[0] != epoch:
            items = self.groups[group][0]
            kept = epoch, items[np.argsort(uniform(self.seed, epoch, items, ORDER), kind="stable")]
            self._orders[group] = kept
        return kept[1]

    def members(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs (N,), items (N, 2)) of a step. Each dataset has epochs of its own."""
        epochs, chosen = [], []
        for group, (_, count) in enumerate(self.groups):
            epoch, place = divmod(step, self._steps_per_epoch(group))
            chosen.append(self.order(epoch, group)[place * count : (place + 1) * count])
            epochs.append(np.full(count, epoch))
        return np.concatenate(epochs), self.items[np.concatenate(chosen)]

    def step(self, step: int, part: int = 0, parts: int = 1) -> Step:
        """The batches of a step, or of one of the parts into which its items are cut, as equal as may be."""
        epochs, items = self.members(step)
        return self.build(np.array_split(epochs, parts)[part], np.array_split(items, parts)[part])

    def build(self, epochs: np.ndarray, items: np.ndarray) -> Step:
        """The batches that items (N, 2) of epochs (N,) become; with nothing to read or write, one padding token."""
        records = items[:, 0]
        draws = {use: uniform(self.seed, epochs, records, items[:, 1], use) for use in (TARGET, SOURCE, DROP, OFFSET)}
        samples, codes = self._media(epochs, records)
        made: list[tuple[Sequence, int]] = []
        for place, (record, window) in enumerate(items):
            present = [c for c in self.columns if self.split.has(c, record)]
            mine = {use: float(values[place]) for use, values in draws.items()}
            for sequence, contrasts in self._sequences(int(record), int(window), present, mine, samples, codes):
                made.append((sequence, int(record) if contrasts else -1))
        if not made:
            made.append((Sequence().read_ids([self.vocabulary.pad]), -1))
        made.sort(key=lambda pair: len(pair[0]))
        batches, span_records = [], []
        middle = self._middle([sequence for sequence, _ in made])
        lengths = [len(sequence) for sequence, _ in made]
        left, right = (cut_by_length(part, self.worth) for part in (lengths[:middle], lengths[middle:]))
        cuts = [*left, *([middle] if middle else []), *(middle + cut for cut in right)]
        for start, stop in zip([0, *cuts], [*cuts, len(made)], strict=True):
            group = made[start:stop]
            batches.append(collate([s for s, _ in group], self.media, self.vocabulary.pad, few_shapes=True))
            span_records.append(np.array([record for s, record in group for _ in s.spans], np.int64))
        return Step(batches, span_records, records, len(left) + 1 if middle else None)

    def _middle(self, sequences: list[Sequence]) -> int:
        """Where sequences of rising length are cut for two threads; 0 where they are not."""
        if self.media_work is None or len(sequences) < 2:
            return 0
        work = [sum(self.media_work[name] * len(sample) for _, name, sample, _ in one.media) for one in sequences]
        return cut_in_two([len(one) for one in sequences], work)

    def _media(self, epochs: np.ndarray, records: np.ndarray) -> tuple[Media, Media]:
        """The samples that this step reads and the codes that it writes, by (column, record), augmented as (seed,
        epoch, record) says."""
        found: Media = {}
        codes: Media = {}
        for column in self.media_columns:
            modality = self.media[self.columns[column]]
            there = self.split.rows[column][records] >= 0
            mine, when = records[there], epochs[there]
            if not len(mine):
                continue
            raw = [self.split.sample(column, r) for r in mine]
            bad = [self.split.ids[r] for r, x in zip(mine, raw, strict=True) if not np.isfinite(x).all()]
            if bad:
                raise DivergedError(
                    f"{column} of record {', '.join(bad)} holds what is not a finite number. "
                    "Delete the run's cache, which is then made again, or look at this record."
                )
            rows = self.split.rows[column][mine]
            written = [self.split.codes[column][row] for row in rows] if column in self.split.codes else []
            if self.augment:
                drawn = uniform(self.seed, when[:, None], mine[:, None], AUGMENT, np.arange(8))
                draw = torch.from_numpy(drawn).float()
                if self.augment_targets and column in self.split.codes:
                    values, lengths = modality.augment(*self._padded(column, raw), draw, hide=False)
                    with torch.inference_mode():
                        encoded = modality.codec.encode(values, lengths).numpy()
                    counts = [modality.code_count(int(length)) for length in lengths]
                    written = [row[:count] for row, count in zip(encoded, counts, strict=True)]
                values, lengths = modality.augment(*self._padded(column, raw), draw)
                sizes = lengths.tolist() if modality.variable_length else [None] * len(raw)
                raw = [value[:size] for value, size in zip(values.numpy(), sizes, strict=True)]
            found.update({(column, int(r)): sample for r, sample in zip(mine, raw, strict=True)})
            codes.update({(column, int(r)): row for r, row in zip(mine, written, strict=False)})
        return found, codes

    def _padded(self, column: str, raw: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples as one batch as long as the column's longest: what becomes of one is then the same, to the bit,
        whatever it is batched with; a rounding that differs may be another code."""
        samples = self.split.media[column]
        values, lengths = self.media[self.columns[column]].batch([*raw, samples[int(samples.lengths.argmax())]])
        return values[:-1], lengths[:-1]

    def _sequences(
        self, record: int, window: int, present: list[str], draws: dict[int, float], samples: Media, codes: Media
    ) -> Iterator[tuple[Sequence, bool]]:
        """The sequences of one visit, each with whether its spans take part in the contrastive loss. A record with a
        conversation is nothing else."""
        if chat := next((c for c in present if c in self.split.chats), None):
            turns = self.split.chats[chat][record] or []
            alone = draws[DROP] < self.cond_dropout
            given = {c: samples[c, record] for c in self.media_columns if (c, record) in samples}
            drawn = {c: codes[c, record] for c in given if (c, record) in codes}
            for sequence in sequences(turns, self.vocabulary, self.media, given, drawn, alone):
                yield sequence, False
            return
        media = [c for c in present if c in self.split.media]
        if not media:
            if len(present) == 1:
                yield self._window(record, window, present[0], draws[OFFSET]), False
                return
            targets = [c for c in present if c not in self.unwritten]
            target = targets[int(draws[TARGET] * len(targets))]
            others = [c for c in present if c != target]
            source = others[int(draws[SOURCE] * len(others))]
            yield self._pair(record, source, target, samples, codes), False
            return
        for column in media:
            others = [c for c in present if c != column]
            targets = [c for c in others if c not in self.unwritten]
            if targets:
                target = targets[int(draws[TARGET] * len(targets))]
                yield self._pair(record, column, target, samples, codes), True
            if column not in self.unwritten:
                dropped = not others or draws[DROP] < self.cond_dropout
                condition = None if dropped else others[int(draws[SOURCE] * len(others))]
                yield self._pair(record, condition, column, samples, codes), not dropped
            elif texts := [c for c in others if c in self.split.texts]:  # read alone, for the contrast
                source = texts[int(draws[SOURCE] * len(texts))]
                yield Sequence().read_ids((self.split.texts[source][record] or [])[: self.context], "text"), True

    def _pair(self, record: int, source: str | None, target: str, samples: Media, codes: Media) -> Sequence:
        """Read one part of a record and write another."""
        sequence = Sequence()
        vocabulary = self.vocabulary
        if source is not None and source in self.split.texts:
            # Codes that are to be written are never cut; a text that is read gives way.
            most = self.context // 2
            if target in self.split.media:
                most = min(most, max(self.context - len(codes[target, record]) - 3, 1))
            sequence.read_ids((self.split.texts[source][record] or [])[:most], "text")
        elif source is not None:
            modality = self.media[self.columns[source]]
            sequence.read_media(modality, vocabulary.opener(source), samples[source, record], vocabulary.pad)
        sequence.read_ids([vocabulary.opener(target)])
        room = self.context - len(sequence)
        if target in self.split.texts:
            return sequence.write([*(self.split.texts[target][record] or [])[: room - 1], vocabulary.end])
        modality = self.media[self.columns[target]]
        start = vocabulary.id_ranges[modality.name][0]
        written = (codes[target, record] + start).tolist()
        closer = [vocabulary.closer(modality.name)] if modality.variable_length else []
        return sequence.write([*written, *closer, vocabulary.end][:room])

    def _window(self, record: int, window: int, column: str, draw: float) -> Sequence:
        """One window of a text for language modelling, shifted by a new offset in each epoch."""
        ids = [self.vocabulary.opener(column), *(self.split.texts[column][record] or []), self.vocabulary.end]
        size = self.context + 1
        windows = max((len(ids) - 2) // self.context, 1)
        slack = len(ids) - windows * self.context - 1
        start = window * self.context + int(draw * (slack + 1)) * (slack > 0)
        chunk = ids[start : start + size]
        return Sequence().read_ids(chunk[:1]).write(chunk[1:])


def cut_by_length(lengths: list[int], worth: float = PASS, grain: int | None = None) -> list[int]:
    """Where to cut sequences of rising length into batches: at the place that saves most padding, again and again,
    as long as a cut saves more tokens than the pass it adds is worth. The places are multiples of a `grain`, a quarter
    of the sequences by itself: the kernels of oneDNN are compiled for each new shape, which takes longer than they do.
    """
    grain = grain or max(len(lengths) // 4, 1)
    places = range(grain, len(lengths), grain)
    if not places:
        return []
    saved = [at * (lengths[-1] - lengths[at - 1]) for at in places]
    best = int(np.argmax(saved))
    if saved[best] <= worth:
        return []
    at = places[best]
    left, right = (cut_by_length(part, worth, grain) for part in (lengths[:at], lengths[at:]))
    return [*left, at, *(at + cut for cut in right)]


def cut_in_two(lengths: list[int], more: list[float]) -> int:
    """Where to cut sequences of rising length so that two threads take equally long: a part takes as its sequences do
    when each is filled up to its longest, and what `more` says, in tokens, for the media of each."""
    sums = np.cumsum(more)
    counts = np.arange(1, len(lengths))
    left = counts * np.array(lengths[:-1]) + sums[:-1]
    right = (len(lengths) - counts) * lengths[-1] + sums[-1] - sums[:-1]
    return int(np.argmin(np.maximum(left, right))) + 1


def lm_windows(ids: list[int], opener: int, end: int | None, context: int) -> list[Sequence]:
    """A text as windows that predict each of its tokens, and its end where there is one, exactly once. Each window but
    the first begins with half a context that the one before has predicted: so no token is predicted from less."""
    whole = [opener, *ids, *([] if end is None else [end])]
    sequences: list[Sequence] = []
    done = 1
    while done < len(whole):
        start = max(done - context // 2, 0) if sequences else 0
        stop = start + context + 1
        sequences.append(Sequence().read_ids(whole[start:done]).write(whole[done:stop]))
        done = stop
    return sequences


class BatchPrefetcher:
    """What `make` makes of a step's number, made in a thread while the step before computes. Always in that thread,
    whether a run goes on or not, so that rounding is the same. `waited` is the seconds that asking has taken."""

    def __init__(self, make: Callable[[int], list[Step]]) -> None:
        self.make, self.waited = make, 0.0
        torch.get_num_threads()  # settles this thread's number, before another thread sets its own to one
        self.pool = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,))
        self.next: tuple[int, Future[list[Step]]] | None = None

    def __call__(self, number: int) -> list[Step]:
        begun = time.perf_counter()
        ready = self.next[1] if self.next and self.next[0] == number else self.pool.submit(self.make, number)
        made = ready.result()
        self.next = number + 1, self.pool.submit(self.make, number + 1)
        self.waited += time.perf_counter() - begun
        return made

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
