"""Generation with a KV cache: many requests of every modality in one batch, joining and leaving between steps.

Rows 0 .. n - 1 of the cache are in use, so that a step slices and never gathers; a row that is left is filled with
the last one. A sample under guidance holds two rows: its own, and one that read only the opener.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from plait.core.device import Device, matmul_precision
from plait.core.errors import ContextLengthError, PlaitError
from plait.core.interruption import Interrupted, pause_point
from plait.core.rng import uniform
from plait.inference.constrained import forbidden_ids
from plait.inference.decoder import Decoder
from plait.inference.grammar import Span, spans
from plait.inference.requests import Completion, Delta, Request, Result, TopIds
from plait.inference.sampling import LOWEST, BatchSamplingParams
from plait.kernels.linear import PackedLinear
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import Sequence, TokenEmbedding, collate, embed_tokens
from plait.model.transformer import KVCache, View

PREFILL_TOKENS = 8192  # padded positions in one prefill


@dataclass
class Job:
    """A request on its way through the engine."""

    request: Request
    span: Span
    limit: int  # ids that each sample may have
    finished: list[Completion | None]
    cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give up the rows at the next step. Any thread may call this."""
        self.cancelled = True

    @property
    def result(self) -> Result:
        """What was written, once `done` is set."""
        return Result([written for written in self.finished if written is not None])


class IncrementalDetokenizer:
    """Ids to text piece by piece: a piece ends where the bytes so far make whole characters."""

    def __init__(self, text: Text, before: list[int]) -> None:
        """`before` are ids that come first and are not spelt again: some tokenizers spell a word by its left side."""
        self.text, self.ids = text, list(before)
        self.start, self.shown = 0, len(before)

    def add(self, ids: list[int], last: bool = False) -> str:
        """The text that has become certain."""
        self.ids += ids
        old = self.text.decode(self.ids[self.start : self.shown])
        now = self.text.decode(self.ids[self.start :])
        if len(now) <= len(old) or (now.endswith("\ufffd") and not last):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return now[len(old) :]


class _Sample:
    """One sample that is being written."""

    def __init__(self, job: Job, index: int, text: Text) -> None:
        self.job, self.index = job, index
        self.row = self.partner = -1
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopIds] = []
        constraint = job.request.constraint
        self.matcher = constraint.matcher() if constraint is not None and job.span.token_type == "text" else None
        self.finish: str | None = None
        request = job.request
        self.guided = request.guidance != 1 and len(request.context) > 1
        self.speller: IncrementalDetokenizer | None = None
        self.spelt, self.sent = "", 0
        if job.span.token_type == "text" and (request.stop or request.on_delta):
            self.speller = IncrementalDetokenizer(text, request.context.ids[-8:] if not request.context.media else [])

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1

    def add(self, token: int) -> None:
        """Take the id that was chosen, and see whether it was the last."""
        span, request = self.job.span, self.job.request
        if span.ends(token):
            self.finish = "end"
        else:
            self.ids.append(token)
            if len(self.ids) == span.limit:
                self.finish = "end"
            elif self.matcher is not None and self.matcher.accept(token):
                self.finish = "length" if self.matcher.failed else "end"
            elif len(self.ids) >= self.job.limit:
                self.finish = "length"
        if self.speller is not None:
            self._spell([] if span.ends(token) else [token], request.stop)

    def _spell(self, ids: list[int], stops: tuple[str, ...]) -> None:
        assert self.speller is not None
        fresh = self.speller.add(ids, last=self.finish is not None)
        self.spelt += fresh
        if not stops or not fresh:
            return
        since = max(len(self.spelt) - len(fresh) - max(map(len, stops)), 0)
        positions = [at for stop in stops if (at := self.spelt.find(stop, since)) >= 0]
        if positions:
            self.spelt, self.finish = self.spelt[: min(positions)], "stop"

    def unsent(self) -> str:
        """The text that may be shown: what could still become a stop string is held back."""
        keep = len(self.spelt)
        if self.finish is None:
            for stop in self.job.request.stop:
                for size in range(min(len(stop) - 1, len(self.spelt)), 0, -1):
                    if self.spelt.endswith(stop[:size]):
                        keep = min(keep, len(self.spelt) - size)
                        break
        text, self.sent = self.spelt[self.sent : keep], max(keep, self.sent)
        return text


class _Group:
    """The samples of one space that are in the batch, with what a step needs of them as tensors."""

    def __init__(self, span: Span, samples: list[_Sample], device: torch.device) -> None:
        requests = [sample.job.request for sample in samples]
        self.span, self.samples = span, samples
        self.rows = np.array([sample.row for sample in samples])
        self.index = torch.from_numpy(self.rows).to(device)
        self.seeds = np.array([request.seed for request in requests])
        self.numbers = np.array([r.first_sample + s.index for r, s in zip(requests, samples, strict=True)])
        self.counts = np.array([len(sample.ids) for sample in samples])
        self.least = np.array(
            [
                max(r.min_new_tokens if s.matcher is None else 0, span.least)
                for r, s in zip(requests, samples, strict=True)
            ]
        )
        self.knobs = BatchSamplingParams([request.sampling for request in requests], device)
        self.logprobs = any(request.logprobs for request in requests)
        self.top = max(request.top_logprobs for request in requests)
        self.constrained = [i for i, sample in enumerate(samples) if sample.matcher is not None]
        guided = [i for i, sample in enumerate(samples) if sample.guided]
        self.partners = np.array([samples[i].partner for i in guided], dtype=np.int64)
        self.guided = torch.tensor(guided, dtype=torch.long, device=device)
        self.guided_rows = self.rows[guided]
        self.partner_index = torch.from_numpy(self.partners).to(device)
        self.weights = torch.tensor([requests[i].guidance for i in guided], device=device)[:, None]
        self.seen: Tensor | None = None
        if self.knobs.penalised:
            seen = np.zeros((len(samples), span.stop - span.start), bool)
            for row, sample in zip(seen, samples, strict=True):
                read = sample.job.request.context.ids if span.token_type == "text" else []
                ids = np.array([*read, *sample.ids], dtype=np.int64)
                row[ids[(ids >= span.start) & (ids < span.stop)] - span.start] = True
            self.seen = torch.from_numpy(seen).to(device)

    def closed(self) -> np.ndarray:
        """Which samples may not end here, (B,) bool."""
        return (self.counts < self.least) | (self.counts % self.span.unit != 0)


def top_ids(chances: Tensor, count: int, start: int = 0) -> list[TopIds] | None:
    """The likeliest `count` ids of each row of log P (B, V), whose first column is the id `start`."""
    if not count:
        return None
    top = chances.topk(min(count, chances.shape[1]), -1)
    ids, logprobs = (top.indices + start).tolist(), top.values.tolist()
    return [TopIds(tuple(i), tuple(p)) for i, p in zip(ids, logprobs, strict=True)]


class Engine:
    """Writes what requests ask for. One thread runs it; `submit` and `Job.cancel` may be called by any.

    The rows of the vocabulary are laid out when it is made: after the weights have changed, make a new one.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, rows: int = 64) -> None:
        """`rows` bounds the batch; the cache grows up to it as requests need."""
        self.checkpoint, self.device, self.max_rows = checkpoint, device, max(rows, 2)
        self.model = checkpoint.model
        self.spans = spans(self.model)
        self.max_length = self.model.config.backbone.max_length
        with torch.inference_mode():
            self.decoder = Decoder(self.model.backbone, device)
            self.table = self._table(self.model.token_embedding)
            tied = self.model.output_embedding is self.model.token_embedding
            self.rows = self.table if tied else self._table(self.model.output_embedding)
            self.predict = {name: self._head(span.start, span.stop) for name, span in self.spans.items()}
        self.cache: KVCache | None = None
        self.used = 0
        self.samples: list[_Sample] = []
        self.groups: list[_Group] | None = None  # None: who is in the batch has changed
        self.hidden = torch.empty(0)
        self.lengths = np.zeros(0, np.int64)  # of the rows, as the cache has them
        self.adapters = np.zeros(0, np.int64)  # of the rows
        self.adapter_rows = self.model.backbone.adapter_rows
        self.pending: deque[_Sample] = deque()
        self.lock = threading.Lock()

    def _table(self, embedding: TokenEmbedding) -> Tensor | PackedLinear:
        return embedding.table().to(self.device.dtype) if embedding.packed is None else embedding.packed

    def _head(self, start: int, stop: int) -> Callable[[Tensor], Tensor]:
        if isinstance(self.rows, PackedLinear):
            return self.rows.part(start, stop)
        return self.decoder.linear(self.rows[start:stop])

    def head(self, token_type: str) -> Tensor:
        """The rows that ids of a type are predicted with, (ids, D) in the engine's precision; unpacked anew where
        they are kept packed."""
        span = self.spans[token_type]
        if isinstance(self.rows, PackedLinear):
            return self.rows.rows(torch.arange(span.start, span.stop)).to(self.device.dtype)
        return self.rows[span.start : span.stop]

    # --- requests ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Job:
        """Queue a request. Raises PlaitError where it cannot be met."""
        if request.token_type not in self.spans:
            raise PlaitError(f"This model cannot write {request.token_type}. It writes {', '.join(self.spans)}.")
        span, length = self.spans[request.token_type], len(request.context)
        if not length:
            raise PlaitError("The prompt is empty. Give a prompt, or name the column to write.")
        if length > self.max_length:
            raise ContextLengthError(
                f"The prompt takes {length} tokens; this model has room for {self.max_length}. Shorten it."
            )
        vocabulary = self.model.vocabulary
        if request.guidance != 1 and request.context.ids[-1] not in map(vocabulary.opener, vocabulary.columns):
            raise PlaitError(
                "Guidance needs a column to write: a prompt that is continued has no condition to leave out."
            )
        room = self.max_length + 1 - length  # the last id is never read
        if room < span.least:
            raise ContextLengthError(
                f"The prompt takes {length} tokens and {span.token_type} needs {span.least} more, but this model has "
                f"room for {self.max_length}. Shorten the prompt."
            )
        bounds = [b for b in (request.max_new_tokens, span.limit, room) if b is not None]
        limit = min(bounds) // span.unit * span.unit
        if limit < 1 or limit < span.least:
            raise PlaitError(f"max_new_tokens must be at least {max(span.least, 1)} for {span.token_type}.")
        if request.n < 1:
            raise PlaitError(f"The number of samples must be at least 1, not {request.n}.")
        if any(not stop for stop in request.stop):
            raise PlaitError("A stop string must not be empty.")
        job = Job(request, span, limit, [None] * request.n)
        samples = [_Sample(job, index, self.checkpoint.text) for index in range(request.n)]
        with self.lock:
            self.pending.extend(samples)
        return job

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Write all requests to their ends, in the order given."""
        jobs = [self.submit(request) for request in requests]
        try:
            while not all(job.done.is_set() for job in jobs):
                self.step()
                pause_point()
        except Interrupted:
            for job in jobs:
                job.cancel()
            raise
        return [job.result for job in jobs]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Yield the updates of one request, running the engine meanwhile. Leaving the loop cancels it."""
        updates: deque[Delta] = deque()
        job = self.submit(replace(request, on_delta=updates.append))
        try:
            while not job.done.is_set():
                self.step()
                while updates:
                    yield updates.popleft()
        finally:
            if not job.done.is_set():
                job.cancel()
                self.step()

    # --- steps ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Admit what fits, choose one id for every sample in the batch, and read them. False when nothing is left."""
        updates: list[tuple[_Sample, Delta]] = []
        try:
            with torch.inference_mode(), matmul_precision(self.device):
                self._drop_cancelled(updates)
                self._admit()
                feed = np.zeros(self.used, np.int64)
                for group in self._groups():
                    self._choose(group, feed, updates)
                feed = self._leave(feed)
                if self.used:
                    self._read(feed)
        except BaseException:
            self.abort()
            raise
        for sample, update in updates:
            if sample.job.request.on_delta is not None:
                sample.job.request.on_delta(update)
        for sample, update in updates:
            if update.finish and all(sample.job.finished):
                sample.job.done.set()
        with self.lock:
            return bool(self.samples or self.pending)

    def abort(self) -> None:
        """Give up everything: all jobs end as cancelled with what they have."""
        with self.lock:
            waiting = [*self.samples, *self.pending]
            self.pending.clear()
        for sample in waiting:
            self._finish(sample, "cancelled")
            sample.job.done.set()
        self.samples, self.groups, self.used = [], None, 0

    def _finish(self, sample: _Sample, finish: str) -> None:
        sample.finish = finish
        text = None
        if sample.job.span.token_type == "text":
            text = sample.spelt
            if sample.speller is None:
                before = sample.job.request.context
                text = IncrementalDetokenizer(self.checkpoint.text, [] if before.media else before.ids[-8:]).add(
                    sample.ids, True
                )
        request = sample.job.request
        logprobs = sample.logprobs if request.logprobs else None
        top = sample.top if request.logprobs and request.top_logprobs else None
        sample.job.finished[sample.index] = Completion(sample.ids, finish, text, logprobs, top)

    def _drop_cancelled(self, updates: list[tuple[_Sample, Delta]]) -> None:
        with self.lock:
            gone = [sample for sample in self.pending if sample.job.cancelled]
            if gone:
                self.pending = deque(sample for sample in self.pending if not sample.job.cancelled)
        gone += [sample for sample in self.samples if sample.job.cancelled]
        for sample in gone:
            self._finish(sample, "cancelled")
            updates.append((sample, Delta(sample.index, [], sample.unsent(), "cancelled")))
        if gone:
            self._leave(np.zeros(self.used, np.int64))

    def _admit(self) -> None:
        """Take samples from the queue while there are rows, and read their contexts."""
        fresh: list[_Sample] = []
        rows = self.used
        with self.lock:
            while self.pending and rows + self.pending[0].rows <= self.max_rows:
                fresh.append(self.pending.popleft())
                rows += fresh[-1].rows
        if not fresh:
            return
        self._reserve(rows, max(len(s.job.request.context) + s.job.limit for s in fresh))
        # Equal contexts are read once: the samples of one request, the bare openers of guidance.
        prefixes: dict[object, tuple[Sequence, list[int]]] = {}

        def place(context: Sequence, adapter: int) -> int:
            key = adapter, id(context) if context.media else tuple(context.ids)
            self.adapters[self.used] = adapter
            prefixes.setdefault(key, (context, []))[1].append(self.used)
            self.used += 1
            return self.used - 1

        for sample in fresh:
            context = sample.job.request.context
            adapter = sample.job.request.adapter
            sample.row = place(context, adapter)
            if sample.guided:
                sample.partner = place(Sequence().read_ids(context.ids[-1:]), adapter)
        self.samples += fresh
        self.groups = None
        todo = sorted(prefixes.values(), key=lambda entry: len(entry[0]))
        while todo:
            count = 1
            while count < len(todo) and (count + 1) * len(todo[count][0]) <= PREFILL_TOKENS:
                count += 1
            self._prefill(todo[:count])
            todo = todo[count:]

    def _prefill(self, entries: list[tuple[Sequence, list[int]]]) -> None:
        cache = self.cache
        assert cache is not None
        batch = collate([s for s, _ in entries], self.model.media, self.model.vocabulary.pad).to(self.device.torch)
        rows = torch.tensor([places[0] for _, places in entries], device=self.device.torch)
        cache.lengths[rows] = 0
        self._choose_adapters([places[0] for _, places in entries])
        with self.device.autocast():
            x = self.model.inputs(batch, self.table)
        hidden = self.decoder(x, view=View(cache, rows, batch.lengths, batch.tokens.shape[1], held=0))
        self.hidden[rows] = hidden[torch.arange(len(entries), device=hidden.device), batch.lengths - 1]
        source, target = [], []
        for context, places in entries:
            self.lengths[places] = len(context)
            source += places[:1] * (len(places) - 1)
            target += places[1:]
        if target:
            cache.copy(source, target, batch.tokens.shape[1])
            self.hidden[target] = self.hidden[source]

    def _choose_adapters(self, rows: list[int] | slice) -> None:
        """Which adapters the next pass, over these rows, is computed with."""
        if self.adapter_rows is not None:
            own = self.adapters[rows]
            self.adapter_rows.choose(np.where(own < 0, self.adapter_rows.default, own).tolist())

    def _reserve(self, rows: int, length: int) -> None:
        """Room for so many rows of such a length; what is there is kept."""
        old = self.cache
        if old is not None and rows <= len(old.lengths) and length <= old.capacity:
            return
        # A power of two of rows and a multiple of 64 positions, so that growth is rare.
        rows = max(min(1 << (rows - 1).bit_length(), self.max_rows), len(old.lengths) if old else 0)
        length = max(-(-length // 64) * 64, old.capacity if old else 0)
        config = self.model.config.backbone
        new = self.decoder.cache(rows, length)
        hidden = torch.zeros(rows, config.width, device=self.device.torch, dtype=self.device.dtype)
        lengths, adapters = np.zeros(rows, np.int64), np.full(rows, -1, np.int64)
        if old is not None and self.used:
            held = int(self.lengths[: self.used].max())
            new.keys[:, : self.used, :, :held] = old.keys[:, : self.used, :, :held]
            new.values[:, : self.used, :, :held] = old.values[:, : self.used, :, :held]
            new.lengths[: self.used] = old.lengths[: self.used]
            hidden[: self.used] = self.hidden[: self.used]
            lengths[: self.used] = self.lengths[: self.used]
            adapters[: self.used] = self.adapters[: self.used]
        self.cache, self.hidden, self.lengths, self.adapters = new, hidden, lengths, adapters

    def _groups(self) -> list[_Group]:
        if self.groups is None:
            parts: dict[str, list[_Sample]] = {}
            for sample in self.samples:
                parts.setdefault(sample.job.span.token_type, []).append(sample)
            self.groups = [_Group(self.spans[name], part, self.device.torch) for name, part in parts.items()]
        return self.groups

    def _choose(self, group: _Group, feed: np.ndarray, updates: list[tuple[_Sample, Delta]]) -> None:
        """Choose the next id of each sample of a space and put it into `feed` (rows,)."""
        span, predict = group.span, self.predict[group.span.token_type]

        def logits_of(index: Tensor) -> Tensor:
            logits: Tensor = predict(self.hidden[index]).float()
            return logits

        own = logits = logits_of(group.index)
        if len(group.partners):
            without, conditional = logits_of(group.partner_index), own[group.guided]
            logits = own.index_copy(0, group.guided, without + group.weights * (conditional - without))
        if span.end is not None and (closed := group.closed()).any():
            mask = torch.from_numpy(closed).to(self.device.torch)
            for scores_of in {id(own): own, id(logits): logits}.values():
                for end in (span.end, *span.more_ends):
                    scores_of[:, end - span.start].masked_fill_(mask, LOWEST)
        if group.constrained:
            logits = self._constrained(group, logits)
        draws: Tensor | None = None
        if not group.knobs.all_greedy:
            draws = torch.from_numpy(uniform(group.seeds, group.numbers, group.counts)).float().to(self.device.torch)
        chosen = group.knobs.choose(logits, draws, group.seen)
        if group.seen is not None:
            group.seen.scatter_(1, chosen[:, None], True)
        scores: list[float] | None = None
        tops: list[TopIds] | None = None
        if group.logprobs:
            chances = own.log_softmax(-1)
            scores = chances.gather(1, chosen[:, None])[:, 0].tolist()
            tops = top_ids(chances, group.top, span.start)
        tokens = chosen.cpu().numpy() + span.start
        feed[group.rows] = tokens
        if len(group.partners):
            feed[group.partners] = feed[group.guided_rows]
        group.counts += 1
        for i, (sample, token) in enumerate(zip(group.samples, tokens.tolist(), strict=True)):
            sample.add(token)
            if scores is not None:
                sample.logprobs.append(scores[i])
            if tops is not None:
                sample.top.append(tops[i])
            if sample.finish is not None:
                self._finish(sample, sample.finish)
            if sample.job.request.on_delta is not None or sample.finish is not None:
                new = [] if span.ends(token) else [token]
                logprobs = tuple(sample.logprobs[-1:]) if new and sample.job.request.logprobs else ()
                top = tuple(sample.top[-1:]) if logprobs and sample.job.request.top_logprobs else ()
                updates.append((sample, Delta(sample.index, new, sample.unsent(), sample.finish, logprobs, top)))

    def _constrained(self, group: _Group, logits: Tensor) -> Tensor:
        """The logits (B, V) with what the samples' constraints forbid taken out."""
        matchers = [group.samples[i].matcher for i in group.constrained]
        held = forbidden_ids([matcher for matcher in matchers if matcher is not None], logits.shape[1])
        forbidden = torch.from_numpy(held).to(logits.device)
        if len(group.constrained) == len(logits):
            return logits.masked_fill(forbidden, LOWEST)
        rows = torch.tensor(group.constrained, device=logits.device)
        return logits.index_copy(0, rows, logits[rows].masked_fill(forbidden, LOWEST))

    def _leave(self, feed: np.ndarray) -> np.ndarray:
        """Free the rows of finished samples, move the last rows into their places; return `feed` moved alike."""
        going = [sample for sample in self.samples if sample.finish is not None]
        if not going:
            return feed
        free = {row for sample in going for row in (sample.row, sample.partner) if row >= 0}
        self.samples = [sample for sample in self.samples if sample.finish is None]
        self.groups = None
        left = self.used - len(free)
        holes = sorted(row for row in free if row < left)
        moved = [row for row in range(left, self.used) if row not in free]
        if moved:
            assert self.cache is not None
            self.cache.copy(moved, holes, int(self.lengths[moved].max()))
            self.hidden[holes] = self.hidden[moved]
            self.lengths[holes] = self.lengths[moved]
            self.adapters[holes] = self.adapters[moved]
            feed[holes] = feed[moved]
            places = dict(zip(moved, holes, strict=True))
            for sample in self.samples:
                sample.row = places.get(sample.row, sample.row)
                sample.partner = places.get(sample.partner, sample.partner)
        self.used = left
        return feed[:left]

    def _read(self, feed: np.ndarray) -> None:
        """One forward pass over the ids just chosen."""
        assert self.cache is not None
        x = embed_tokens(torch.from_numpy(feed).to(self.device.torch), self.table)
        self._choose_adapters(slice(self.used))
        self.hidden[: self.used] = self.decoder.step(x, self.cache, self.lengths[: self.used])
        self.lengths[: self.used] += 1
        trained = self.model.config.backbone.trained_length
        if trained is not None and (self.lengths[: self.used] == trained + 1).any():
            self._read_anew(trained + 1)

    def _read_anew(self, length: int) -> None:
        """Read rows of this length as a whole: they have just outgrown LongRoPE's trained length, and from there on all
        of their positions are turned by other factors."""
        entries = []
        for sample in self.samples:
            if self.lengths[sample.row] == length:
                sequence = Sequence().extend(sample.job.request.context).read_ids(sample.ids)
                entries.append((sequence, [sample.row]))
        for entry in entries:
            self._prefill([entry])
