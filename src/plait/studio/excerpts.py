"""The beginning of a file of text as people read it: a table as a table, a conversation as turns, else the text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.data.conversations import is_chat, messages_of
from plait.data.files import TABLE_SUFFIXES, Tree, suffix_of
from plait.data.rows import rows

HEAD = 64 << 10  # bytes of a file that is no table that are looked at
ROWS, COLUMNS, CONVERSATIONS = 6, 12, 2
CELL = 120  # characters of a cell
TEXT = 400  # characters of a text that is no table


@dataclass(frozen=True)
class Excerpt:
    """What is shown of a file; one of the three is filled.

    Attributes:
        path: Relative to the project's source.
        header: The names of a table's columns.
        rows: Its first rows.
        conversations: Each a list of (role, what is said).
        text: The beginning of a text.
    """

    path: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    conversations: list[list[tuple[str, str]]] = field(default_factory=list)
    text: str = ""


def read_excerpt(file: Path, path: str) -> Excerpt:
    """The beginning of a file, which the project calls `path`. A table is read as `plait prepare` reads it."""
    if suffix_of(file.name) in TABLE_SUFFIXES:
        tree = Tree(file.parent, file, files={file.name: file})
        try:
            first_rows = [row for _, row in islice(rows(tree, file.name), ROWS)]
        except PlaitError as error:  # the disk failed
            return Excerpt(path, text=str(error))
        records = [row for row in first_rows if isinstance(row, dict)]
        if records:
            return _of_records(path, records)
        if first_rows:  # a reason, in place of cells
            return Excerpt(path, text=str(first_rows[0]))
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError as error:
        return Excerpt(path, text=str(error))
    return Excerpt(path, text=_cut(head.decode("utf-8-sig", errors="replace"), TEXT))


def _of_records(path: str, records: list[dict[str, Any]]) -> Excerpt:
    conversations = [value for record in records for value in record.values() if is_chat(value)]
    if conversations:
        return Excerpt(path, conversations=[_turns(value) for value in conversations[:CONVERSATIONS]])
    header = list(dict.fromkeys(name for record in records for name in record))[:COLUMNS]
    return Excerpt(path, header=header, rows=[[_cell(record.get(name)) for name in header] for record in records])


def _turns(conversation: Any) -> list[tuple[str, str]]:
    return [(str(message["role"]), _cell(message.get("content"))) for message in messages_of(conversation)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), CELL)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
