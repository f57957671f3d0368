"""The items of a dataset of histories: what a table says of each, found by id or title, or by a condition."""

from __future__ import annotations

import difflib
import re
import sqlite3
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plait.core.errors import PlaitError
from plait.core.interruption import Interrupted, check_interrupted

MEDIA = ("image", "audio")  # bytes of files
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")  # at the end of a title
OWN = ("id", "title", "text", "categories", *MEDIA)  # what Plait knows the meaning of; all else is for conditions
# Of SQLite's functions those whose time and result are bounded by what they are given.
FUNCTIONS = {"abs", "coalesce", "glob", "ifnull", "iif", "length", "like", "lower", "ltrim", "max", "min", "nullif",
             "round", "rtrim", "substr", "substring", "trim", "upper"}  # fmt: skip
_STEPS = 5_000_000  # of SQLite's machine that a condition may take
_SECONDS = 5.0  # and how long
_GROUP = 1024  # rows that are read together


@dataclass
class Item:
    """What is known of one item. `more` are further cells of its row, for conditions."""

    id: str
    title: str | None = None
    text: str | None = None
    categories: list[str] = field(default_factory=list)
    image: bytes | None = None
    audio: bytes | None = None
    more: dict[str, str | int | float | None] = field(default_factory=dict)

    def named(self) -> str | None:
        """Its title, where it has one."""
        return self.title

    def dated(self) -> str | None:
        """The title as `Heat (1995)`, where the year stands in a column of its own."""
        return f"{self.title} ({self.more['year']})" if self.title and self.more.get("year") else None


class Catalogue:
    """Items by number. The first `known` stand in training histories; those after them have content alone."""

    def __init__(self, items: list[Item], known: int) -> None:
        self.items, self.known = items, known

    def __len__(self) -> int:
        return len(self.items)

    def trained(self) -> Catalogue:
        """Those that stand in training histories, alone."""
        return Catalogue(self.items[: self.known], self.known)

    # --- files ------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """Raises PlaitError where the file is damaged."""
        try:
            table = pq.read_table(path)
            known = int((table.schema.metadata or {})[b"known"])
            rows = table.to_pylist()
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise PlaitError(f"{path} is damaged: {error}. Copy it again, or run plait prepare again.") from error
        items = []
        for row in rows:
            own = {name: row.pop(name) for name in OWN if name in row}
            own["categories"] = own.get("categories") or []
            items.append(Item(**own, more={name.removeprefix("more:"): value for name, value in row.items()}))
        return cls(items, known)

    def write(self, path: Path, media: bool = True) -> None:
        """A Parquet file, with the images and audio clips or without."""
        columns: dict[str, pa.Array] = {
            "id": pa.array([item.id for item in self.items], pa.string()),
            "title": pa.array([item.title for item in self.items], pa.string()),
            "text": pa.array([item.text for item in self.items], pa.string()),
            "categories": pa.array([item.categories for item in self.items], pa.list_(pa.string())),
        }
        if media:
            columns |= {name: pa.array([getattr(item, name) for item in self.items], pa.binary()) for name in MEDIA}
        for name in self.columns:
            columns[f"more:{name}"] = _array([item.more.get(name) for item in self.items])
        table = pa.table(columns).replace_schema_metadata({"known": str(self.known)})
        pq.write_table(table, path, compression="zstd", row_group_size=_GROUP)

    @cached_property
    def columns(self) -> list[str]:
        """The names of the further cells, in the order in which they turned up."""
        return list(dict.fromkeys(name for item in self.items for name in item.more))

    # --- names ------------------------------------------------------------------------------------------------

    def name(self, number: int) -> str:
        """The title, with its year where two items share one; else the id."""
        item = self.items[number]
        if item.title is None:
            return item.id
        return item.title if self._numbers[item.title] == number else item.dated() or f"{item.title} [{item.id}]"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        by_name: dict[str, int] = {}
        for number, item in enumerate(self.items):
            by_name[item.id] = number
        for spelling in (Item.named, Item.dated):  # an id goes before a title, and that before a title with its year
            for number, item in enumerate(self.items):
                if title := spelling(item):
                    by_name.setdefault(title, number)
                    by_name.setdefault(_plain(title), number)
        undated: dict[str, list[int]] = {}
        for number, item in enumerate(self.items):
            if item.title and (short := _YEAR.sub("", item.title)) != item.title:
                undated.setdefault(_plain(short), []).append(number)
        for title, numbers in undated.items():
            if len(numbers) == 1:
                by_name.setdefault(title, numbers[0])
        return by_name

    def find(self, name: str) -> int | None:
        """The number of the item of an id or a title, in any case, with its year or, where that is clear, without;
        None where there is none."""
        name = name.strip()
        return self._numbers.get(name, self._numbers.get(_plain(name)))

    def number(self, name: str) -> int:
        """`find`, but an unknown name raises PlaitError that offers those that are near."""
        number = self.find(name)
        if number is None:
            raise PlaitError(f"There is no item '{name.strip()}'. {self._offer(name)}")
        return number

    def like(self, text: str, count: int) -> list[int]:
        """At most `count` items whose titles hold a text, the shortest first, then those that are nearly it."""
        plain_text = _plain(text)
        inside = [number for plain, number in self._titles.items() if plain_text and plain_text in plain]
        near = difflib.get_close_matches(plain_text, self._titles, n=3, cutoff=0.5) if len(inside) < count else []
        titles = [*sorted(inside, key=lambda i: len(self.name(i)))[:count], *(self._titles[plain] for plain in near)]
        return list(dict.fromkeys(titles))[:count]

    @cached_property
    def _titles(self) -> dict[str, int]:
        return {_plain(self.name(i)): i for i in range(len(self))}

    def _offer(self, name: str) -> str:
        offered = [self.name(i) for i in self.like(name, 4)]
        if offered:
            return "Did you mean " + " or ".join(f"'{title}'" for title in offered) + "?"
        return f"The catalogue has {len(self):,} items, such as '{self.name(0)}'."

    def numbers(self, names: str | Iterable[str | int]) -> list[int]:
        """The items that a history names: ids or titles, in a list or with commas between them. A title may have
        commas of its own: of the pieces, as many as make a known name are taken together.

        Raises PlaitError for an unknown one.
        """
        if not isinstance(names, str):
            return [self.number(str(name)) for name in names]
        pieces, numbers = names.split(","), []
        while pieces:
            if not pieces[0].strip():
                pieces.pop(0)
                continue
            for count in range(len(pieces), 0, -1):
                number = self.find(",".join(pieces[:count]))
                if number is not None:
                    numbers.append(number)
                    del pieces[:count]
                    break
            else:
                longer_names = (",".join(pieces[:count]) for count in range(min(len(pieces), 4), 0, -1))
                near = (name for name in longer_names if difflib.get_close_matches(_plain(name), self._titles, 1, 0.8))
                self.number(next(near, pieces[0]))
        return numbers

    # --- conditions -------------------------------------------------------------------------------------------

    def where(self, condition: str) -> np.ndarray:
        """Which items (len,) a condition holds for, as SQL says it: `year >= 1990 and categories like '%Comedy%'`.

        Columns are id, title, text, categories (joined with |) and the further columns of the items table. Raises
        PlaitError where the condition is not one, calls a function that is not in FUNCTIONS, or takes too long.
        """
        matching = np.zeros(len(self), bool)
        guard = _Condition(max(_STEPS, 200 * len(self)))
        try:
            with self._lock:
                self._database.set_authorizer(guard.judge)
                self._database.set_progress_handler(guard.spend, guard.INTERVAL)
                for (number,) in self._database.execute(f"SELECT number FROM items WHERE ({condition}\n)"):
                    matching[number] = True
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            if guard.interrupted is not None:
                raise guard.interrupted from None
            known = ", ".join(["id", "title", "text", "categories", *self.columns])
            raise PlaitError(
                f"The condition '{condition[:200]}' cannot be used: {guard.reason or error}. Write it as in SQL, for "
                f"example \"categories like '%Comedy%'\"; the columns are {known}."
            ) from None
        return matching

    @cached_property
    def _lock(self) -> Any:
        import threading

        return threading.Lock()

    @cached_property
    def _database(self) -> sqlite3.Connection:
        """The items as a table in memory, which answers conditions and nothing else."""
        # A statement that was compiled before would not be judged again: none is kept.
        database = sqlite3.connect(":memory:", check_same_thread=False, cached_statements=0)
        names = ["id", "title", "text", "categories", *self.columns]
        quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
        database.execute(f"CREATE TABLE items (number INTEGER PRIMARY KEY, {quoted})")
        marks = ", ".join("?" * (len(names) + 1))
        database.executemany(f"INSERT INTO items VALUES ({marks})", self._rows())
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
        database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        return database

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for number, item in enumerate(self.items):
            more = (item.more.get(name) for name in self.columns)
            yield number, item.id, item.title, item.text, "|".join(item.categories), *more


class _Condition:
    """What one condition, which may come from a stranger, is allowed: it reads the table of items, calls plain
    functions, and ends."""

    INTERVAL = 200  # steps of SQLite's machine between two calls of `spend`

    def __init__(self, steps: int) -> None:
        """`steps` are those of SQLite's machine that it may take."""
        self.steps, self.until = steps, time.monotonic() + _SECONDS
        self.selects = 0
        self.reason = ""
        self.interrupted: Interrupted | None = None

    def judge(self, action: int, first: str | None, second: str | None, *_: object) -> int:
        """SQLite's question whether a part of the statement is allowed."""
        if action == sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_SELECT:
            self.selects += 1
            if self.selects == 1:  # the statement around the condition
                return sqlite3.SQLITE_OK
            self.reason = "it must be one condition, without SELECT in it"
        elif action == sqlite3.SQLITE_FUNCTION:
            if second in FUNCTIONS:
                return sqlite3.SQLITE_OK
            self.reason = f"the function {second} is not allowed. Those that are: {', '.join(sorted(FUNCTIONS))}"
        else:
            self.reason = self.reason or "it must be one condition"
        return sqlite3.SQLITE_DENY

    def spend(self) -> int:
        """Whether to stop: asked every INTERVAL steps."""
        self.steps -= self.INTERVAL
        try:
            check_interrupted()
        except Interrupted as error:
            self.interrupted = error
            return 1
        if self.steps < 0 or time.monotonic() > self.until:
            self.reason = "it takes too long"
            return 1
        return 0


class Images:
    """The images of a catalogue's file, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self._there = "image" in self._file.schema_arrow.names
        ids = self._file.read(columns=["id"])["id"].to_pylist() if self._there else []
        self._places = {id_: place for place, id_ in enumerate(ids)}
        groups = range(self._file.num_row_groups)
        self._starts = np.cumsum([0] + [self._file.metadata.row_group(group).num_rows for group in groups])

    def get(self, id_: str) -> bytes | None:
        """The image of an item; None where it has none."""
        if (place := self._places.get(id_)) is None:
            return None
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        column = self._file.read_row_group(group, columns=["image"])["image"]
        image: bytes | None = column[place - int(self._starts[group])].as_py()
        return image


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _array(values: list[Any]) -> pa.Array:
    """Numbers where all cells are, else text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} or kinds <= {int, float}:
        return pa.array(values, pa.int64() if kinds <= {int} else pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())
