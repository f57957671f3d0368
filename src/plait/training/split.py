"""A split of a dataset in memory: its records, what of them was decoded and tokenised, and the files that keep it."""

from __future__ import annotations

import hashlib
from array import array as NumberArray
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_json
from plait.data.blocks import BlockFiles, Blocks, BlockTokens, plan_blocks
from plait.data.dataset import ConcatDataset, Dataset
from plait.data.samples import Samples, mapped
from plait.data.tokens import Ids, Tokens, open_tokens, write_tokens
from plait.modalities.base import MediaModality, Vocabulary
from plait.modalities.text import Text
from plait.training.conversation_store import (
    Conversations,
    conversation_facts,
    open_conversations,
    write_conversations,
)
from plait.training.conversations import ConversationEncoder
from plait.training.reuse import EarlierCache, reusing, set_aside, text_key
from plait.training.tokenising import TokeniseJob, TokeniseProcess

LAYOUT = 2  # of the files of a cache: one of another is made again


@dataclass
class Split:
    """The records of one split, ready to become sequences."""

    ids: Ids
    texts: dict[str, Tokens | BlockTokens]  # column -> token ids by record
    media: dict[str, Samples]  # column -> samples of the records that have one
    rows: dict[str, np.ndarray]  # column -> record -> row of its samples, -1 where absent
    codes: dict[str, Samples] = field(default_factory=dict)  # column -> codes, beside media
    chats: dict[str, Conversations] = field(default_factory=dict)  # column -> conversation by record
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # (records, text columns), 0 absent
    sources: np.ndarray | None = None  # record -> which of several datasets it is from
    notes: list[str] = field(default_factory=list)  # what is cut, for people
    blocks: Blocks | None = None  # of texts that are tokenised while training goes on; `texts` are then BlockTokens

    def __len__(self) -> int:
        return len(self.ids)

    def has(self, column: str, record: int) -> bool:
        """Whether a record has something in a column."""
        if column in self.chats:
            return bool(self.chats[column].rows[record] >= 0)
        return self.texts[column].has(record) if column in self.texts else bool(self.rows[column][record] >= 0)

    def present(self, column: str) -> np.ndarray:
        """(N,) which records have a part of a column."""
        if column in self.chats:
            return self.chats[column].present
        return self.texts[column].present if column in self.texts else self.rows[column] >= 0

    def sample(self, column: str, record: int) -> np.ndarray:
        return self.media[column][self.rows[column][record]]

    def block(self, number: int) -> Split:
        """The records of a block of texts that is there, as a split of their own."""
        assert self.blocks is not None
        ids = self.ids.values.take(pa.array(self.blocks.plan.records(number)))
        return Split(Ids(ids.chunks), dict(self.blocks[number]), {}, {})

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
    sources = dataset.source(indices) if isinstance(dataset, ConcatDataset) else None
    result = Split(cached.ids, dict(cached.texts), cached.media, cached.rows, keys=cached.keys, sources=sources)
    result.notes = _cut_clips(reading, cached)
    if vocabulary is not None:
        for column in dataset.manifest.chats:
            result.notes += _converse(result, reading, column, text, vocabulary, cache, context)
    result.notes += _cut_texts(result, list(dataset.columns), context)
    return result


@dataclass(frozen=True)
class BlockSettings:
    """How blocks are made.

    Attributes:
        size: Bytes of text in one.
        makes: Whether this process has them made; another one of the run does where it is false.
        threads: That tokenise.
        note: Called with what is to be told.
    """

    size: int
    makes: bool
    threads: int
    note: Callable[[str], None]


def load_blocks(dataset: Dataset, split: str, text: Text, cache: Path, context: int, blocks: BlockSettings) -> Split:
    """A split of texts alone, which are tokenised in blocks while training goes on; only the first is waited for."""
    indices = dataset.indices(split)
    columns = list(dataset.columns)
    plan = plan_blocks(dataset, split, columns, blocks.size)
    made_of = hashlib.sha256(f"{_made_of(dataset, indices, text, {})} {plan.count} blocks".encode()).hexdigest()
    cache_file, ids_file = cache / f"{split}.json", cache / f"{split}-ids.arrow"
    known = read_json(cache_file) if cache_file.exists() else {}
    if known.get("made_of") != made_of:
        cache.mkdir(parents=True, exist_ok=True)
        set_aside(cache, split)
        Ids.write(ids_file, dataset.cells("id", indices))
        facts = {"tokenizer": _tokenizer_key(text), "texts": columns, "media": {}, "blocks": plan.count}
        write_json(cache_file, {"cut": {}, "made_of": made_of, **facts})
    job = TokeniseJob(
        dataset=str(dataset.path),
        split=split,
        columns=columns,
        cache=str(cache),
        tokenizer=text.tokenizer.to_str(),
        tokenizer_key=_tokenizer_key(text),
        made_of=made_of,
        block_bytes=blocks.size,
    )
    maker = TokeniseProcess(job, blocks.threads, blocks.note) if blocks.makes else None
    made = Blocks(plan, BlockFiles(cache, split, columns, made_of), maker)
    texts: dict[str, Tokens | BlockTokens] = {column: BlockTokens(made, column) for column in columns}
    result = Split(Ids.open(ids_file), texts, {}, {}, keys=np.zeros((len(indices), 0), np.int64), blocks=made)
    blocks.note(f"{split} is tokenised in {plan.count} blocks; training begins once the first is there")
    made.wait(0)
    notes = _cut_texts(result.block(0), columns, context)
    result.notes = [f"{note} (in the first of {plan.count} blocks)" for note in notes]
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

    def settings(self, column: str) -> str:
        """How a column's media are fitted."""
        kind = self.dataset.columns[column]
        return f"{kind}:{self.media[kind].settings.model_dump_json()}"

    def samples(self, column: str, rows: np.ndarray, made: _Made, earlier: EarlierCache) -> Iterator[np.ndarray]:
        """The samples of a column, those of an earlier cache from there; fills in the row of each record (N,), and
        the key of each sample's file and whether it was cut."""
        modality = self.media[self.dataset.columns[column]]
        known = earlier.samples(column, self.settings(column))
        present = 0
        for record, row in enumerate(self.dataset.iterate(self.indices, [column])):
            if record % 500 == 0:
                self.report(column, record)
            if column in row.parts:
                rows[record] = present
                present += 1
                value = row.parts[column]
                key = int.from_bytes(hashlib.sha256(value if isinstance(value, bytes) else value.encode()).digest()[:8])
                made.keys.append(key >> 1)
                place = known[1].row(key >> 1) if known else -1
                if known and place >= 0:
                    made.cut.append(bool(known[2][place]))
                    yield known[0][place]
                    continue
                windows = modality.windows(value)
                made.cut.append(len(windows) > 1)
                yield windows[0]
        self.report(column, len(self.indices))

    def counted(self, column: str, cells: Iterable[pa.Array]) -> Iterator[pa.Array]:
        """The cells of a column, of which it is said how far they are."""
        done = 0
        for values in cells:
            yield values
            done += len(values)
            self.report(column, done)

    def texts(self, column: str, keys: np.ndarray) -> Iterator[pa.Array]:
        """The texts of a column; fills in the key of each record's (N,), 0 where it has none."""
        done = 0
        for values in self.dataset.cells(column, self.indices):
            keys[done : done + len(values)] = [0 if v is None else text_key(v) for v in values.to_pylist()]
            done += len(values)
            self.report(column, done)
            yield values


@dataclass
class _Made:
    """Of each sample that was made the key of its file, and whether it was cut."""

    keys: NumberArray[int] = field(default_factory=lambda: NumberArray("q"))
    cut: NumberArray[int] = field(default_factory=lambda: NumberArray("b"))


@dataclass
class _Cached:
    """What the cache of a split holds; `cut` counts by column the samples that are longer than one may be."""

    ids: Ids
    media: dict[str, Samples]
    rows: dict[str, np.ndarray]
    texts: dict[str, Tokens]
    keys: np.ndarray
    cut: dict[str, int]


def _cached(reading: _Reading, text: Text, cache: Path) -> _Cached:
    """The cache of a split under `cache`, written first where there is none of these data and settings."""
    cache_file = cache / f"{reading.split}.json"
    made_of = _made_of(reading.dataset, reading.indices, text, reading.media)
    known = read_json(cache_file) if cache_file.exists() else {}
    if known.get("made_of") == made_of:
        return _open_cache(reading, cache, known["cut"])
    cache.mkdir(parents=True, exist_ok=True)
    set_aside(cache, reading.split)
    earlier = EarlierCache(cache, reading.split)
    cut = _write_cache(reading, text, cache, earlier, made_of)
    media = {column: reading.settings(column) for column in reading.media_columns}
    facts = {"tokenizer": _tokenizer_key(text), "texts": reading.plain, "media": media}
    write_json(cache_file, {"cut": cut, "made_of": made_of, **facts})
    earlier.close()
    return _open_cache(reading, cache, cut)


def _tokenizer_key(text: Text) -> str:
    return hashlib.sha256(text.tokenizer.to_str().encode()).hexdigest()


def _open_cache(reading: _Reading, cache: Path, cut: dict[str, int]) -> _Cached:
    split, columns = reading.split, reading.media_columns
    try:
        return _Cached(
            ids=Ids.open(cache / f"{split}-ids.arrow"),
            media={column: Samples.open(cache / f"{split}-{column}") for column in columns},
            rows={column: mapped(cache / f"{split}-{column}-rows.npy") for column in columns},
            texts={column: open_tokens(cache / f"{split}-{column}-tokens") for column in reading.plain},
            keys=mapped(cache / f"{split}-keys.npy"),
            cut=cut,
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PlaitError(f"{cache} is damaged ({error}). Delete it; it is made again.") from error


def _write_cache(reading: _Reading, text: Text, cache: Path, earlier: EarlierCache, made_of: str) -> dict[str, int]:
    """Read a split's data and write them; returns how many samples of each column were cut. Texts that a start of the
    same data has tokenised before it was stopped are not tokenised again."""
    split, count = reading.split, len(reading.indices)
    keys = np.zeros((count, len(reading.plain)), np.int64)
    cut = {}
    for column in reading.media_columns:
        rows, made = np.full(count, -1), _Made()
        Samples.write(cache / f"{split}-{column}", reading.samples(column, rows, made, earlier))
        cut[column] = sum(made.cut)
        values = {"rows": rows, "keys": np.array(made.keys, np.int64), "cut": np.array(made.cut, bool)}
        for what, array in values.items():
            np.save(cache / f"{split}-{column}-{what}.npy", array)
    for place, column in enumerate(reading.plain):
        texts = reading.texts(column, keys[:, place])
        encode = reusing(text.encode_batch, earlier.tokens(column, _tokenizer_key(text)))
        write_tokens(cache / f"{split}-{column}-tokens", texts, encode, text.size, made_of)
    np.save(cache / f"{split}-keys.npy", keys)
    Ids.write(cache / f"{split}-ids.arrow", reading.dataset.cells("id", reading.indices))
    return cut


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
    digest = hashlib.sha256(f"layout {LAYOUT}".encode())
    digest.update("".join(shard.sha256 for shard in dataset.manifest.shards).encode())
    digest.update(np.ascontiguousarray(indices).tobytes())
    digest.update(text.tokenizer.to_str().encode())
    for name, modality in media.items():
        digest.update(f"{name}:{modality.settings.model_dump_json()}".encode())
    return digest.hexdigest()


def _converse(
    split: Split, reading: _Reading, column: str, text: Text, vocabulary: Vocabulary, cache: Path, context: int
) -> list[str]:
    """Put a column's conversations into a split, tokenised once; returns what is cut, for people."""

    def size(record: int, part: str) -> int:
        modality, length = reading.media[vocabulary.columns[part]], len(split.sample(part, record))
        return max(modality.token_count(length), modality.code_count(length)) + 2

    path = cache / f"{reading.split}-{column}-turns"
    digest = hashlib.sha256(_made_of(reading.dataset, reading.indices, text, reading.media).encode())
    digest.update(f"{context} {text.chat_template} {text.settings} {vocabulary.model_dump_json()}".encode())
    facts = conversation_facts(path)
    if facts is None or facts.made_of != digest.hexdigest():
        encoder = ConversationEncoder(text, vocabulary, context, size)
        cells = reading.dataset.cells(column, reading.indices)
        write_conversations(path, reading.counted(column, cells), encoder, digest.hexdigest())
        facts = conversation_facts(path)
        assert facts is not None
    split.chats[column] = open_conversations(path, facts)
    lengths = {
        f"do not fit {context} tokens: their oldest turns are left out": facts.shortened,
        "have no turn of the assistant's that fits, and are not learned": facts.unwritten,
    }
    records = f"{facts.records:,}"
    return [f"{column}: {count:,} of {records} conversations {what}" for what, count in lengths.items() if count]


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
