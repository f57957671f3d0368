"""The beginning of a file of text as people read it: a table as a table, a conversation as turns, else the text."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.data.conversations import is_chat, messages_of

HEAD = 64 << 10  # bytes of a file that are looked at
ROWS, COLUMNS, TALKS = 6, 12, 2
CELL = 120  # characters of a cell
TEXT = 400  # characters of a text that is no table


@dataclass(frozen=True)
class Excerpt:
    """What is shown of a file; one of the three is filled.

    Attributes:
        path: Relative to the project's source.
        header: The names of a table's columns.
        rows: Its first rows.
        talks: Conversations, each a list of (role, what is said).
        text: The beginning of a text.
    """

    path: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    talks: list[list[tuple[str, str]]] = field(default_factory=list)
    text: str = ""


def read_excerpt(place: Path, path: str) -> Excerpt:
    """The beginning of the file at `place`, which the project calls `path`."""
    suffix = place.suffix.lower()
    try:
        if suffix == ".parquet":
            return _of_records(path, _parquet_rows(place))
        with place.open("rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError) as error:
        return Excerpt(path, text=str(error))
    text = head.decode("utf-8-sig", errors="replace")
    whole = text if len(head) < HEAD else text.rpartition("\n")[0]
    if suffix in (".csv", ".tsv"):
        return _of_table(path, whole, "\t" if suffix == ".tsv" else None)
    if suffix == ".jsonl":
        rows = _json_rows(whole)
        return _of_records(path, rows) if rows else Excerpt(path, text=_cut(text, TEXT))
    return Excerpt(path, text=_cut(text, TEXT))


def _of_table(path: str, text: str, mark: str | None) -> Excerpt:
    if mark is None:
        try:
            mark = csv.Sniffer().sniff(text[:4096], ",;\t|").delimiter
        except csv.Error:
            mark = ","
    reader = csv.reader(io.StringIO(text), delimiter=mark)
    found: list[list[str]] = []
    try:
        for row in reader:
            found.append([_cut(cell, CELL) for cell in row[:COLUMNS]])
            if len(found) > ROWS:
                break
    except csv.Error:
        return Excerpt(path, text=_cut(text, TEXT))
    return Excerpt(path, header=found[0], rows=found[1:]) if found else Excerpt(path)


def _of_records(path: str, records: list[dict[str, Any]]) -> Excerpt:
    talks = [value for record in records for value in record.values() if is_chat(value)]
    if talks:
        return Excerpt(path, talks=[_turns(value) for value in talks[:TALKS]])
    header = list(dict.fromkeys(name for record in records for name in record))[:COLUMNS]
    rows = [[_cell(record.get(name)) for name in header] for record in records]
    return Excerpt(path, header=header, rows=rows)


def _turns(talk: Any) -> list[tuple[str, str]]:
    return [(str(message["role"]), _cell(message.get("content"))) for message in messages_of(talk)]


def _json_rows(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines()[:ROWS]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _parquet_rows(place: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    batch = next(pq.ParquetFile(place).iter_batches(ROWS), None)
    return batch.to_pylist() if batch is not None else []


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), CELL)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
