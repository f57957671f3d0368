"""Which records make up step s, and the sequences they become. Order is a function of (seed, step), not a state.

A record with media is visited once for each medium: the medium is read and one of the record's other parts written,
and one of the other parts is read and the medium written. A record of texts alone is one text read and another
written; a single text is language modelling, in windows of the context's length.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from plait.core.errors import DivergedError
from plait.core.rng import uniform
from plait.data.blocks import Blocks
from plait.modalities.base import AUGMENT_DRAWS, MediaModality, Vocabulary
from plait.model.multimodal import Batch, Sequence, bucket_length, collate
from plait.training.conversations import sequences
from plait.training.split import (
    Split,
)

# What a draw is for; the last key of `uniform`, so that no two decisions share a number.
ORDER, TARGET, SOURCE, DROP, AUGMENT, OFFSET = range(6)

ORDER_BLOCK = 1 << 16  # items whose places in an epoch are drawn at once
PASS = 600  # tokens that take as long as what one more pass costs before it computes anything


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
        parts = range(self.first), range(self.first, len(self.batches))
        return [self._of(part) for part in parts]

    def passes(self, max_tokens: int | None) -> list[Step]:
        """What is computed one after the other, so that no more than `max_tokens` with padding are in memory at a time:
        steps of some of the batches each. A batch is never cut here."""
        sizes = [batch.tokens.numel() for batch in self.batches]
        if max_tokens is None or sum(sizes) <= max_tokens:
            return [self]
        if self.first is None:
            return [self._of(part) for part in _filled(range(len(sizes)), sizes, max_tokens)]
        left = _filled(range(self.first), sizes, max_tokens // 2)
        right = _filled(range(self.first, len(sizes)), sizes, max_tokens // 2)
        count = max(len(left), len(right))
        pairs = zip(left + [[]] * (count - len(left)), right + [[]] * (count - len(right)), strict=True)
        return [self._of([*a, *b], len(a) if a and b else None) for a, b in pairs]

    def _of(self, numbers: Iterable[int], first: int | None = None) -> Step:
        """A step of these batches."""
        chosen = list(numbers)
        return Step([self.batches[n] for n in chosen], [self.span_records[n] for n in chosen], self.records, first)


def _filled(numbers: Iterable[int], sizes: ListOf[int], most: int) -> list[list[int]]:
    """Numbers in their order, in lists whose sizes come to `most` together, or which hold one alone."""
    lists: list[list[int]] = []
    filled = 0
    for number in numbers:
        if not lists or filled + sizes[number] > most:
            lists.append([])
            filled = 0
        lists[-1].append(number)
        filled += sizes[number]
    return lists


class Items:
    """What a step may take, by number: a record, and a window of it. A few bytes an item."""

    def __init__(self, windows: np.ndarray) -> None:
        """`windows` (N,) says how many windows each record has, 0 for one that is not taken."""
        kind = np.int32 if max(len(windows), int(windows.sum())) < 2**31 else np.int64
        self.records = np.repeat(np.arange(len(windows), dtype=kind), windows)
        self.windows: np.ndarray | None = None  # None: the first and only one of each
        if windows.max(initial=0) > 1:
            first = np.cumsum(windows, dtype=kind) - windows
            self.windows = np.arange(len(self.records), dtype=kind) - np.repeat(first.astype(kind), windows)

    def __len__(self) -> int:
        return len(self.records)

    def extended(self, more: Items, records: np.ndarray) -> Items:
        """These items and `more`, whose records are the so-manieth of `records` (N,)."""
        both = Items(np.zeros(0, np.int32))
        both.records = np.concatenate((self.records, records[more.records].astype(np.int64)))
        if self.windows is not None or more.windows is not None:
            windows = [np.zeros(len(i), np.int32) if i.windows is None else i.windows for i in (self, more)]
            both.windows = np.concatenate(windows)
        return both

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """(N, 2): record and window of items (N,)."""
        windows = np.zeros(len(numbers), np.int64) if self.windows is None else self.windows[numbers]
        return np.stack([self.records[numbers].astype(np.int64), windows], 1)


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
        contrast: bool = True,  # whether embeddings are compared: without, nothing is read for their sake
    ) -> None:
        self.worth, self.contrast = worth, contrast
        self.media_work: dict[str, float] | None = None  # to cut steps for two threads: see `cut_in_two`
        self.max_tokens: int | None = None  # of a batch, with padding; one sequence is never cut
        self.split, self.vocabulary, self.media = split, vocabulary, media
        self.context, self.seed, self.cond_dropout = context, seed, cond_dropout
        self.augment, self.augment_targets = augment, augment_targets
        self.columns = {
            c: m for c, m in vocabulary.columns.items() if c in split.texts or c in split.media or c in split.chats
        }
        self.media_columns = [c for c, m in self.columns.items() if m != "text"]
        self.unwritten = {c for c, m in self.columns.items() if not unwritten.isdisjoint({c, m})}
        self._block_lock, self._block_ends = threading.Lock(), list[int]()  # items up to the end of each block
        if split.blocks is None:
            self.items = self._items()
        else:
            self.items, self._first_epoch = Items(np.zeros(0, np.int32)), np.zeros(0, np.int64)
            self.groups = [(np.zeros(0, np.int32), batch_size)]
            self._read_blocks(batch_size)
        self.groups = self._groups(batch_size, shares)
        self.batch_size = sum(count for _, count in self.groups)
        self.steps_per_epoch = self._steps_per_epoch(0)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def _items(self) -> Items:
        """What there is to take of the whole split."""
        return self._items_of(self.split)

    def _items_of(self, split: Split) -> Items:
        """Only a record of one text has more than one window."""
        columns = [c for c in self.columns if c in split.chats or c in split.texts or c in split.rows]
        count = len(split)
        parts, useful = np.zeros(count, np.uint8), np.zeros(count, bool)
        for column in columns:
            present = split.present(column)
            parts += present
            if column not in self.unwritten or column in split.media:
                useful |= present
        windows = useful.astype(np.int32)
        for column, tokens in split.texts.items():
            if column in self.columns:
                alone = useful & tokens.present & (parts == 1)
                windows[alone] = np.maximum(tokens.lengths[alone] // self.context, 1)
        return Items(windows)

    @property
    def _all_read(self) -> bool:
        """Whether the items of all blocks are known."""
        return self.split.blocks is None or len(self._block_ends) == len(self.split.blocks)

    def _read_blocks(self, items: int, wait: bool = True) -> bool:
        """Read on in the blocks until so many items of the first epoch are known, or all. Returns whether that is so:
        without `wait` only what is there is read."""
        blocks = self.split.blocks
        while blocks is not None and not self._all_read and len(self._first_epoch) < items:
            block = len(self._block_ends)
            if wait:
                blocks.wait(block)  # without the lock, which others take without waiting
            elif not blocks.is_there(block):
                return False
            with self._block_lock:
                if block == len(self._block_ends):  # no other thread has read it meanwhile
                    self._read_block(blocks, block)
        return True

    def _read_block(self, blocks: Blocks, block: int) -> None:
        """Add the items of a block that is there. What other threads look at without the lock is set last."""
        first = len(self.items)
        items = self.items.extended(self._items_of(self.split.block(block)), blocks.plan.records(block))
        numbers = np.arange(first, len(items))
        order = np.argsort(uniform(self.seed, 0, numbers, ORDER), kind="stable")
        self.items = items
        self._first_epoch = np.concatenate((self._first_epoch, numbers[order]))
        if block == len(blocks) - 1:
            self.groups = [(np.arange(len(items), dtype=np.int32), self.groups[0][1])]
        self._block_ends.append(len(items))

    def is_ready(self, step: int) -> bool:
        """Whether the texts of a step are tokenised. Raises PlaitError where they never will be."""
        return self._all_read or self._read_blocks((step + 1) * self.batch_size, wait=False)

    def _groups(self, batch_size: int, shares: ListOf[float]) -> list[tuple[np.ndarray, int]]:
        """For each dataset that has any: its items, by number, and how many of them a step takes."""
        if not shares or self.split.sources is None:
            return [(np.arange(len(self.items), dtype=np.int32), min(batch_size, len(self.items)))]
        counts = [max(round(batch_size * share), 1) for share in shares]
        of = self.split.sources[self.items.records]
        groups = [np.flatnonzero(of == which) for which in range(len(counts) + 1)]
        sizes = [max(batch_size - sum(counts), 1), *counts]
        return [
            (members, min(count, len(members))) for members, count in zip(groups, sizes, strict=True) if len(members)
        ]

    def _steps_per_epoch(self, group: int) -> int:
        items, count = self.groups[group]
        return max(len(items) // max(count, 1), 1)

    def order(self, epoch: int, group: int = 0) -> np.ndarray:
        """The items of a dataset's epoch in their order; the remainder of the last batch waits for another epoch's.
        Texts in blocks are shuffled within each block in the first epoch, and as a whole in later ones."""
        if self.split.blocks is not None and epoch == 0:
            return self._first_epoch
        kept = self._orders.get(group)
        if kept is None or kept[0] != epoch:
            items = self.groups[group][0]
            draws = np.empty(len(items))
            for start in range(0, len(items), ORDER_BLOCK):
                block = slice(start, start + ORDER_BLOCK)
                draws[block] = uniform(self.seed, epoch, items[block], ORDER)
            kept = epoch, items[np.argsort(draws, kind="stable")]
            self._orders[group] = kept
        return kept[1]

    def members(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs (N,), items (N, 2)) of a step. Each dataset has epochs of its own."""
        if not self._all_read:
            self._read_blocks((step + 1) * self.batch_size)
        first_epoch = not self._all_read  # where it ends is known once all blocks are
        epochs, chosen = [], []
        for group, (_, count) in enumerate(self.groups):
            epoch, place = (0, step) if first_epoch else divmod(step, self._steps_per_epoch(group))
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
        visits: list[tuple[Sequence, int]] = []
        for place, (record, window) in enumerate(items):
            present = [c for c in self.columns if self.split.has(c, record)]
            own_draws = {use: float(values[place]) for use, values in draws.items()}
            for sequence, contrasts in self._sequences(int(record), int(window), present, own_draws, samples, codes):
                visits.append((sequence, int(record) if contrasts else -1))
        if not visits:
            visits.append((Sequence().read_ids([self.vocabulary.pad]), -1))
        visits.sort(key=lambda pair: len(pair[0]))
        batches, span_records = [], []
        middle = self._middle([sequence for sequence, _ in visits])
        lengths = [len(sequence) for sequence, _ in visits]
        left, right = (self.cuts(part) for part in (lengths[:middle], lengths[middle:]))
        cuts = [*left, *([middle] if middle else []), *(middle + cut for cut in right)]
        for start, stop in zip([0, *cuts], [*cuts, len(visits)], strict=True):
            group = visits[start:stop]
            batches.append(collate([s for s, _ in group], self.media, self.vocabulary.pad, few_shapes=True))
            span_records.append(np.array([record for s, record in group for _ in s.spans], np.int64))
        return Step(batches, span_records, records, len(left) + 1 if middle else None)

    def cuts(self, lengths: list[int]) -> list[int]:
        """Where sequences of rising length are cut into batches."""
        cuts = cut_by_length(lengths, self.worth)
        if self.max_tokens is None:
            return cuts
        most = self.max_tokens if self.media_work is None else self.max_tokens // 2  # two threads hold one each
        places = [0, *cuts, len(lengths)]
        for start, stop in pairwise(places):
            if stop > start:
                pieces = -(-(stop - start) // max(most // bucket_length(lengths[stop - 1]), 1))
                rows = -(-(stop - start) // pieces)
                cuts = [*cuts, *range(start + rows, stop, rows)]
        return sorted(cuts)

    def _middle(self, sequences: list[Sequence]) -> int:
        """Where sequences of rising length are cut for two threads; 0 where they are not."""
        if self.media_work is None or len(sequences) < 2:
            return 0
        work = [sum(self.media_work[name] * len(sample) for _, name, sample, _ in one.media) for one in sequences]
        return cut_in_two([len(one) for one in sequences], work)

    def _media(self, epochs: np.ndarray, records: np.ndarray) -> tuple[Media, Media]:
        """The samples that this step reads and the codes that it writes, by (column, record), augmented as (seed,
        epoch, record) says."""
        samples: Media = {}
        codes: Media = {}
        for column in self.media_columns:
            modality = self.media[self.columns[column]]
            there = self.split.rows[column][records] >= 0
            own_records, when = records[there], epochs[there]
            if not len(own_records):
                continue
            raw = [self.split.sample(column, r) for r in own_records]
            bad = [self.split.ids[r] for r, x in zip(own_records, raw, strict=True) if not np.isfinite(x).all()]
            if bad:
                raise DivergedError(
                    f"{column} of record {', '.join(bad)} holds what is not a finite number. "
                    "Delete the run's cache, which is then made again, or look at this record."
                )
            rows = self.split.rows[column][own_records]
            written = [self.split.codes[column][row] for row in rows] if column in self.split.codes else []
            if self.augment:
                drawn = uniform(self.seed, when[:, None], own_records[:, None], AUGMENT, np.arange(AUGMENT_DRAWS))
                uniforms = torch.from_numpy(drawn).float()
                if self.augment_targets and column in self.split.codes:
                    values, lengths = modality.augment(*self._padded(column, raw), uniforms, mask_parts=False)
                    with torch.inference_mode():
                        encoded = modality.codec.encode(values, lengths).numpy()
                    counts = [modality.code_count(int(length)) for length in lengths]
                    written = [row[:count] for row, count in zip(encoded, counts, strict=True)]
                values, lengths = modality.augment(*self._padded(column, raw), uniforms)
                sizes = lengths.tolist() if modality.variable_length else [None] * len(raw)
                raw = [value[:size] for value, size in zip(values.numpy(), sizes, strict=True)]
            samples.update({(column, int(r)): sample for r, sample in zip(own_records, raw, strict=True)})
            codes.update({(column, int(r)): row for r, row in zip(own_records, written, strict=False)})
        return samples, codes

    def _padded(self, column: str, raw: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples as one batch as long as the column's longest: what becomes of one is then the same, to the bit,
        whatever it is batched with; a rounding that differs may be another code."""
        samples = self.split.media[column]
        values, lengths = self.media[self.columns[column]].batch([*raw, samples[samples.longest]])
        return values[:-1], lengths[:-1]

    def _sequences(
        self, record: int, window: int, present: list[str], draws: dict[int, float], samples: Media, codes: Media
    ) -> Iterator[tuple[Sequence, bool]]:
        """The sequences of one visit, each with whether its spans take part in the contrastive loss. A record with a
        conversation is nothing else."""
        if chat := next((c for c in present if c in self.split.chats), None):
            turns = self.split.chats[chat][record] or []
            alone = draws[DROP] < self.cond_dropout
            samples_of_record = {c: samples[c, record] for c in self.media_columns if (c, record) in samples}
            drawn = {c: codes[c, record] for c in samples_of_record if (c, record) in codes}
            for sequence in sequences(turns, self.vocabulary, self.media, samples_of_record, drawn, alone):
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
                yield self._pair(record, column, target, samples, codes), self.contrast
            if column not in self.unwritten:
                dropped = not others or draws[DROP] < self.cond_dropout
                condition = None if dropped else others[int(draws[SOURCE] * len(others))]
                yield self._pair(record, condition, column, samples, codes), self.contrast and not dropped
            elif self.contrast and (texts := [c for c in others if c in self.split.texts]):  # read alone
                source = texts[int(draws[SOURCE] * len(texts))]
                yield Sequence().read_ids((self.split.texts[source][record] or [])[: self.context], "text"), True

    def _pair(self, record: int, source: str | None, target: str, samples: Media, codes: Media) -> Sequence:
        """Read one part of a record and write another."""
        sequence = Sequence()
        vocabulary = self.vocabulary
        if source is not None and source in self.split.texts:
            # Codes that are to be written are never cut; a text that is read gives way.
            max_tokens = self.context // 2
            if target in self.split.media:
                max_tokens = min(max_tokens, max(self.context - len(codes[target, record]) - 3, 1))
            sequence.read_ids((self.split.texts[source][record] or [])[:max_tokens], "text")
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

    def _window(self, record: int, window: int, column: str, uniforms: float) -> Sequence:
        """One window of a text for language modelling, shifted by a new offset in each epoch."""
        ids = [self.vocabulary.opener(column), *(self.split.texts[column][record] or []), self.vocabulary.end]
        size = self.context + 1
        windows = max((len(ids) - 2) // self.context, 1)
        slack = len(ids) - windows * self.context - 1
        start = window * self.context + int(uniforms * (slack + 1)) * (slack > 0)
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
    tokens = [opener, *ids, *([] if end is None else [end])]
    sequences: list[Sequence] = []
    done = 1
    while done < len(tokens):
        start = max(done - context // 2, 0) if sequences else 0
        stop = start + context + 1
        sequences.append(Sequence().read_ids(tokens[start:done]).write(tokens[done:stop]))
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
        steps = ready.result()
        self.next = number + 1, self.pool.submit(self.make, number + 1)
        self.waited += time.perf_counter() - begun
        return steps

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
