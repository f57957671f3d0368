"""Entries decoded and embedded, wherever that is done: in the process that writes an index, or by workers of Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.record import UnusableError
from plait.inference.base import Model
from plait.modalities.descriptor import MediaError
from plait.modalities.media import Checker, preview
from plait.search.entries import Entry


@dataclass
class Part:
    """An entry, or a moment of one from second `start` to second `stop`, with its vector (E,) or why it has none."""

    start: float | None
    stop: float | None
    vector: np.ndarray | Reason


@dataclass
class Outcome:
    """What became of an entry: its digest and its parts, why it cannot be used, or that it is the `same` as before."""

    digest: bytes = b""
    same: bool = False
    reason: Reason | None = None
    parts: list[Part] = field(default_factory=list)
    preview: bytes | None = None


@dataclass
class _Read:
    """A medium or text as it was read: its parts (from when to when, and what the model takes), and a preview."""

    parts: list[tuple[float | None, float | None, Any]]
    preview: bytes | None


@dataclass
class Begun:
    """An entry that is being decoded; `reading` is None where there is nothing to decode."""

    outcome: Outcome
    reading: Future[_Read] | None = None


class Embedder:
    """Decodes entries in threads and embeds them a batch at a time.

    Args:
        model: makes the vectors.
        checker: decodes media, in processes of its own.
        pool: threads that wait for it.
    """

    def __init__(self, model: Model, checker: Checker, pool: ThreadPoolExecutor) -> None:
        self.model, self.checker, self.pool = model, checker, pool

    def begin(self, items: list[Entry], known: Mapping[str, bytes]) -> list[Begun]:
        """Read entries and begin to decode those whose digest is not `known` by their id. Raises StoreError where a
        store fails."""
        begun = []
        for item in items:
            try:
                content = item.content()
            except (OSError, ValueError) as error:
                begun.append(Begun(Outcome(reason=reason_of(error))))
                continue
            body = content.encode() if isinstance(content, str) else content
            facts = json.dumps([item.kind, item.split, item.texts, len(body)], sort_keys=True).encode()
            outcome = Outcome(hashlib.sha256(facts + body).digest()[:16])
            outcome.same = known.get(item.id) == outcome.digest
            begun.append(Begun(outcome, None if outcome.same else self.pool.submit(self._read, item.kind, content)))
        return begun

    def finish(self, begun: list[Begun]) -> list[Outcome]:
        """Embed what was begun, in one batch."""
        values, places = [], []
        for one in begun:
            if one.reading is None:
                continue
            try:
                read = one.reading.result()
            except (MediaError, PlaitError) as error:
                one.outcome.reason = reason_of(error)
                continue
            one.outcome.preview = read.preview
            for start, stop, value in read.parts:
                values.append(value)
                places.append((one.outcome, start, stop))
        for (outcome, start, stop), vector in zip(places, self._embedded(values), strict=True):
            outcome.parts.append(Part(start, stop, vector))
        return [one.outcome for one in begun]

    def _read(self, kind: str, content: str | bytes) -> _Read:
        """What the model takes, and the preview."""
        if isinstance(content, str):
            return _Read([(None, None, content)], None)
        value = self.checker.decode(kind, content)
        return _Read(self.model.moments(kind, value), preview(kind, content, value))

    def _embedded(self, values: list[Any]) -> list[np.ndarray | Reason]:
        """The vector of each value, or why it has none."""
        if not values:
            return []
        try:
            return list(self.model.embed_inputs(values))
        except PlaitError as error:
            if len(values) == 1:
                return [reason_of(error)]
            return [one for value in values for one in self._embedded([value])]


def reason_of(error: Exception) -> Reason:
    """Why an entry cannot be added."""
    if isinstance(error, UnusableError | MediaError):
        return error.reason
    if isinstance(error, OSError):
        return Reason(RejectKind.UNREADABLE, error.strerror or str(error))
    return Reason(RejectKind.NOT_TAKEN, str(error).removesuffix("."))
