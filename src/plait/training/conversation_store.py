"""Conversations as token ids on disk: made once, memory-mapped, and a turn is a Python object only when it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from plait.core.files import read_json, write_json
from plait.data.samples import Samples, mapped
from plait.training.conversations import ConversationEncoder, EncodedTurn, Part

MEDIUM = -1  # instead of the number of ids of a text: a medium, whose column follows
TEMPLATED = -1  # instead of a role: a chat template has put its marks among the ids


@dataclass(frozen=True)
class ConversationFacts:
    """What is counted while conversations are written.

    Attributes:
        made_of: A hash of all that they depend on.
        records: How many records the split has.
        shortened: Conversations that lack their oldest turns, or the ends of texts.
        unwritten: Conversations without a turn of the assistant's that fits.
        names: Roles and columns of media; a turn has the number of one.
    """

    made_of: str
    records: int
    shortened: int
    unwritten: int
    names: list[str]


class Conversations:
    """The conversations of a column by record; None where a record has none, or nothing of it fits.

    `samples` holds them back to back as integers: of each turn its role, whether it is learned and how many parts it
    has; of each part its ids with their number before them, or `MEDIUM` and its column. `rows` (N,) has the number of
    each record there, -1 where absent.
    """

    def __init__(self, samples: Samples, rows: np.ndarray, names: list[str]) -> None:
        self.samples, self.rows, self.names = samples, rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, record: int) -> list[EncodedTurn] | None:
        row = int(self.rows[record])
        return None if row < 0 else _unpack(self.samples[row], self.names)

    @property
    def present(self) -> np.ndarray:
        """(N,) whether a record has a conversation."""
        return self.rows >= 0


def write_conversations(path: Path, cells: Iterable[pa.Array], encoder: ConversationEncoder, made_of: str) -> None:
    """Encode conversations and store them under `path`, a block of them in memory at a time.

    Args:
        path: as in `Samples.write`.
        cells: string arrays, the conversations of consecutive records, null where one has none.
        encoder: turns a conversation into turns of ids that fit a context.
        made_of: a hash of all that the result depends on.
    """
    facts_file, rows_file = _files(path)
    facts_file.unlink(missing_ok=True)
    numbers: dict[str, int] = {}
    rows: list[np.ndarray] = []
    count = unwritten = 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal count, unwritten
        first = 0
        for array in cells:
            here = np.full(len(array), -1, np.int64)
            for place, turns in enumerate(encoder.conversations(first, array.to_pylist())):
                unwritten += turns is not None and not any(turn.written for turn in turns)
                if turns:
                    here[place] = count
                    count += 1
                    yield _pack(turns, numbers)
            rows.append(here)
            first += len(array)

    Samples.write(path, arrays())
    all_rows = np.concatenate([*rows, np.zeros(0, np.int64)])
    np.save(rows_file, all_rows)
    facts = ConversationFacts(made_of, len(all_rows), encoder.shortened, unwritten, list(numbers))
    write_json(facts_file, vars(facts))


def conversation_facts(path: Path) -> ConversationFacts | None:
    """What `write_conversations` counted; None where it has not come to its end."""
    file = _files(path)[0]
    return ConversationFacts(**read_json(file)) if file.is_file() else None


def open_conversations(path: Path, facts: ConversationFacts) -> Conversations:
    """Map what `write_conversations` stored. Raises PlaitError naming the file that is missing or cut."""
    return Conversations(Samples.open(path), mapped(_files(path)[1]), facts.names)


def _files(path: Path) -> tuple[Path, Path]:
    """Facts, which come last, and rows."""
    return path.with_name(path.name + ".facts.json"), path.with_name(path.name + ".rows.npy")


def _pack(turns: list[EncodedTurn], numbers: dict[str, int]) -> np.ndarray:
    """Turns as integers; names that are new get a number."""
    packed: list[int] = []
    for turn in turns:
        role = TEMPLATED if turn.role is None else numbers.setdefault(turn.role, len(numbers))
        packed += (role, int(turn.written), len(turn.parts))
        for part in turn.parts:
            if isinstance(part, str):
                packed += (MEDIUM, numbers.setdefault(part, len(numbers)))
            else:
                packed.append(len(part))
                packed += part
    return np.array(packed, np.int32)


def _unpack(packed: np.ndarray, names: list[str]) -> list[EncodedTurn]:
    """What `_pack` was given."""
    values = iter(packed.tolist())
    turns = []
    for role in values:
        written, count = bool(next(values)), next(values)
        parts: list[Part] = []
        for _ in range(count):
            size = next(values)
            parts.append(names[next(values)] if size == MEDIUM else [next(values) for _ in range(size)])
        turns.append(EncodedTurn(None if role == TEMPLATED else names[role], parts, written))
    return turns
