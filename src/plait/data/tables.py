"""Tables -> records: jsonl, json, csv, tsv, Parquet and Arrow, with columns of text, labels, paths or bytes of media.

What a column is, is told from its name and a sample of its values, and can be said with a map: `ROLE=COLUMN[:NAME]`
or `COLUMN=ROLE[:NAME]`, where ROLE is text, image, audio, chat (messages, see chat.py), id, split, ignore, or each (a
list column: one record for each of its elements); several columns are separated by commas. NAME is what the column is
called in the dataset.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.core.errors import PlaitError
from plait.data.conversations import flatten, is_chat
from plait.data.files import (
    DAMAGED,
    TABLE_SUFFIXES,
    Found,
    Item,
    Media,
    Plan,
    Tree,
    folder_split,
    open_text,
    suffix_of,
)
from plait.data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, sniff
from plait.data.record import RESERVED, Rejected, split_name, split_of_file, text_fault
from plait.data.stores import Location, open_binary

ROLES = ("text", "image", "audio", "chat", "id", "split", "ignore", "each")
_SAMPLE = 200
_COLUMNS = 500
_LINE = 64 << 20  # characters of one line of a table
_BOOKS = ("dataset_dict.json", "dataset_info.json", "state.json")
_PLAIN = {"file_name", "filename", "file", "path", "filepath", "file_path"}


@dataclass
class Column:
    """What a table's column is. `role` is one of ROLES or "media" (paths of images and of audio)."""

    role: str
    name: str
    labels: list[str] | None = None


@dataclass
class Table:
    file: str
    columns: dict[str, Column] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    given: Counter[str | None] = field(default_factory=Counter)


Row = tuple[int, dict[str, Any] | str]  # line, and the cells or why there are none


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def rows(tree: Tree, name: str) -> Iterator[Row]:
    """The rows of a table; a fault is a string in place of the cells, and the last row where it spoils the rest."""
    path, suffix = tree.files[name], suffix_of(name)
    line = 0
    try:
        if suffix == ".parquet":
            with pq.ParquetFile(_parquet(path)) as file:
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        yield line, row
                        line += 1
        elif suffix == ".arrow":
            for batch in _arrow(path)[1]:
                for start in range(0, len(batch), 64):
                    for row in batch.slice(start, 64).to_pylist():
                        yield line, row
                        line += 1
        elif suffix == ".json":
            with open_text(path, name) as file:
                for row in json.loads(file.read(4 * _LINE), parse_constant=_not_a_number):
                    yield line, row if isinstance(row, dict) else "not an object with the columns' names"
                    line += 1
        elif suffix in (".csv", ".tsv"):
            csv.field_size_limit(_LINE)
            with open_text(path, name) as file:
                head = file.readline(_LINE)
                file.seek(0)
                marks = "\t" if suffix == ".tsv" else max(",;\t", key=head.count)
                reader = csv.DictReader(file, delimiter=marks, strict=True)
                for cells in reader:
                    line = reader.line_num
                    # DictReader keeps surplus cells under None and fills short rows with None.
                    yield line, "more cells than columns" if None in cells else dict(cells)
        else:
            with open_text(path, name) as file:
                while text := file.readline(_LINE):
                    line += 1
                    if len(text) == _LINE:
                        raise ValueError(f"line {line} is longer than {_LINE >> 20} Mi characters")
                    if not text.strip():
                        continue
                    try:
                        row = json.loads(text, parse_constant=_not_a_number)
                    except (ValueError, RecursionError) as error:
                        yield line, f"not valid JSON: {error}"
                        continue
                    yield line, row if isinstance(row, dict) else "not an object with the columns' names"
    except UnicodeDecodeError as error:
        yield line + 1, f"not UTF-8 (byte {error.object[error.start]:#04x}); the rest of the file was not read"
    except (*DAMAGED, RecursionError, TypeError, csv.Error, pa.ArrowException) as error:
        yield line + 1, f"damaged table: {' '.join(str(error).split())[:200]}; the rest of the file was not read"


def _parquet(path: Location) -> Any:
    return path if isinstance(path, Path) else open_binary(path)


def _arrow(path: Location) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an Arrow file, of the streaming kind (as Hugging Face's datasets write) or the other."""
    file = pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(open_binary(path))
    try:
        reader = pa.ipc.open_stream(file)
        return reader.schema, iter(reader)
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        return whole.schema, (whole.get_batch(n) for n in range(whole.num_record_batches))


def _columns(table: Table, path: Location, split: str) -> tuple[pa.Schema, Counter[str | None]]:
    """Schema of a Parquet or Arrow file, and its rows by given split, none of its other columns being read."""
    default = _given(table.file)
    if suffix_of(table.file) == ".parquet":
        with pq.ParquetFile(_parquet(path)) as file:
            schema = file.schema_arrow
            if split not in schema.names:
                return schema, Counter({default: file.metadata.num_rows})
            columns = (batch.column(0) for batch in file.iter_batches(65536, columns=[split]))
            return schema, _counted(columns, default)
    schema, batches = _arrow(path)
    if split not in schema.names:
        return schema, Counter({default: sum(map(len, batches))})
    return schema, _counted((batch.column(schema.names.index(split)) for batch in batches), default)


def _counted(columns: Iterator[pa.Array], default: str | None) -> Counter[str | None]:
    given: Counter[str | None] = Counter()
    for column in columns:
        for entry in pc.value_counts(column).to_pylist():
            value = entry["values"]
            given[(split_name(value) if isinstance(value, str) else None) or default] += entry["counts"]
    return given


def _is_table(tree: Tree, name: str) -> bool:
    if suffix_of(name) not in TABLE_SUFFIXES:
        return False
    if suffix_of(name) != ".json":
        return True
    first = next(rows(tree, name), (0, ""))[1]
    return isinstance(first, dict)


def _given(name: str) -> str | None:
    stem = name.rpartition("/")[2].split(".")[0]
    return split_of_file(stem) or folder_split(name)


def _split_column(column_map: dict[str, str]) -> str:
    """The column that the user's map calls the split, else the one of that name."""
    mapped = [left for left, right in column_map.items() if right.strip() == "split" and left not in ROLES]
    return (column_map.get("split") or (mapped or ["split"])[0]).strip()


def _scan(tree: Tree, name: str, split: str) -> Table:
    """One pass over a table: its columns, a sample of each, and its rows by given split."""
    table = Table(name)
    default = _given(name)
    known = suffix_of(name) in (".parquet", ".arrow")
    if known:
        try:
            schema, table.given = _columns(table, tree.files[name], split)
        except (OSError, ValueError, pa.ArrowException):
            return table
        table.samples = {column: [] for column in schema.names}
        table.class_names = _class_names(schema)
    for number, (_, row) in enumerate(rows(tree, name)):
        if known and number == _SAMPLE:
            break  # such files tell their columns and their size: their media need not be read for that
        if isinstance(row, str):
            continue
        for key, value in row.items():
            values = table.samples.setdefault(key, [])
            if len(values) < _SAMPLE and value is not None and value != "":
                values.append(_head(value))
        if not known:
            given = row.get(split)
            table.given[(split_name(given) if isinstance(given, str) else None) or default] += 1
    return table


def _head(value: Any) -> Any:
    if isinstance(value, bytes):
        return value[:64]
    if _is_struct(value):
        return {"bytes": (value.get("bytes") or b"")[:64] or None, "path": value.get("path")}
    if isinstance(value, list):
        return [_head(cell) for cell in value]
    if isinstance(value, dict):
        return {key: _head(cell) for key, cell in value.items()}
    return value[:400] if isinstance(value, str) else value


def _is_struct(value: Any) -> bool:
    return isinstance(value, dict) and "bytes" in value and set(value) <= {"bytes", "path"}


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of integer classes, as Hugging Face's datasets leave them in a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            str(column): [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _path_kinds(tree: Tree, table: str, column: str, values: list[Any]) -> set[str]:
    """The kinds of media whose paths the values are; empty where they are not paths."""
    named = column == "file_name" or column.endswith("_file_name")
    kinds, there = [], False
    for value in values:
        if not isinstance(value, str) or len(value) > 300 or "\n" in value or "://" in value:
            return set()
        suffix = suffix_of(value.replace("\\", "/"))
        kind = "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None
        found = tree.resolve(table, value) if named or not there else None
        if isinstance(found, str):
            there = True
            kind = kind or tree.kind(found)
        kinds.append(kind)
    known = [kind for kind in kinds if kind]
    return set(known) if (there or named) and len(known) >= 0.9 * len(kinds) else set()


def _recognise(tree: Tree, table: str, column: str, values: list[Any]) -> str:
    """A column's role from its name and the sample of its values."""
    if not column or text_fault(column):
        return "ignore"
    if not values:
        return "text"
    # Most values decide: the few others are then rows to be rejected, not a reason to read the column otherwise.
    if column == "split" and sum(isinstance(v, str) and bool(split_name(v)) for v in values) >= 0.8 * len(values):
        return "split"
    if column == "id" and all(isinstance(v, str | int) for v in values) and len(set(values)) >= 0.8 * len(values):
        return "id"
    if all(isinstance(v, bytes) or _is_struct(v) for v in values):
        heads = [v if isinstance(v, bytes) else v["bytes"] or b"" for v in values]
        found = Counter(kind[0] for head in heads if (kind := sniff(head)))
        paths = [v["path"] for v in values if not isinstance(v, bytes) and v["path"]]
        kinds = set(found) or _path_kinds(tree, table, "file_name", paths)
        return "ignore" if not kinds else "media" if len(kinds) == 2 else kinds.pop()
    if all(map(is_chat, values)):
        return "chat"
    kinds = _path_kinds(tree, table, column, values)
    return "media" if len(kinds) == 2 else kinds.pop() if kinds else "text"


def _wanted(column_map: dict[str, str], known: set[str]) -> dict[str, tuple[str, str | None]]:
    """The user's map as column -> (role, name or None). Raises PlaitError where it does not fit the table."""
    wanted: dict[str, tuple[str, str | None]] = {}
    for left, right in column_map.items():
        for piece in right.split(","):
            head, _, name = piece.strip().partition(":")
            if left in ROLES and (head in known or head not in ROLES):
                role, column = left, head
            else:
                role, column = head, left
            if role not in ROLES:
                raise PlaitError(f"--map {left}={right}: write ROLE=COLUMN, where ROLE is one of {', '.join(ROLES)}.")
            if column not in known:
                raise PlaitError(
                    f"--map {left}={right}: there is no column '{column}'. Columns: {', '.join(sorted(known))}."
                )
            wanted[column] = role, name or None
    return wanted


def plan_tables(tree: Tree, column_map: dict[str, str], labels: dict[str, list[str]]) -> Plan | None:
    """The tables of a source as one plan, or None where there is none.

    Raises PlaitError where the map or the labels do not fit, or two tables disagree about a column.
    """
    split = _split_column(column_map)
    tables = [_scan(tree, name, split) for name in list(tree.files) if _is_table(tree, name)]
    if not tables:
        return None
    # What Hugging Face's save_to_disk says about its tables; it holds no records.
    if any(table.file.endswith(".arrow") for table in tables):
        tree.used.update(name for name in tree.files if name.rpartition("/")[2] in _BOOKS)
    known = {column for table in tables for column in table.samples}
    wanted = _wanted(column_map, known)
    columns: dict[str, str] = {}
    notes: list[str] = []
    for table in tables:
        for column, values in table.samples.items():
            asked = wanted.get(column)
            role = asked[0] if asked else _recognise(tree, table.file, column, values)
            name = (asked[1] if asked else None) or _target(column, role, set(table.samples))
            names = labels.get(name) or labels.get(column) or table.class_names.get(column)
            table.columns[column] = Column(role, name, names)
            shown = name if role != "media" else "image, audio"
            notes.append(
                f"{table.file}: {_printable(column) or 'a column without a name'} -> "
                + (role if role in ("id", "split", "ignore") else f"{shown} ({'text' if role == 'each' else role})")
            )
            for target, kind in _targets(table.columns[column]).items():
                if columns.setdefault(target, kind) != kind:
                    raise PlaitError(
                        f"{table.file}: column '{column}' is {kind}, but '{target}' is {columns[target]} elsewhere. "
                        f"Give it another name: --map {kind}={column}:NAME."
                    )
    if len(columns) > _COLUMNS:
        raise PlaitError(
            f"{tables[0].file}: {len(columns)} columns, more than {_COLUMNS}. If it is a table of records, leave some "
            "columns out of it."
        )
    unknown = set(labels) - known - set(columns)
    if unknown:
        raise PlaitError(f"Labels for '{sorted(unknown)[0]}': there is no such column. Columns: {', '.join(columns)}.")

    def read() -> Iterator[Item]:
        for table in tables:
            tree.used.add(table.file)
            for line, row in rows(tree, table.file):
                if isinstance(row, str):
                    yield Rejected(table.file, line, row)
                else:
                    yield from _record(tree, table, line, row)

    given: Counter[str | None] = Counter()
    for table in tables:
        lists = [v for key, c in table.columns.items() if c.role == "each" for v in table.samples[key]]
        many = sum(len(v) if isinstance(v, list) else 1 for v in lists) / len(lists) if lists else 1.0
        given.update({of: round(count * many) for of, count in table.given.items()})
    ordered = dict(sorted(columns.items(), key=lambda item: ("image", "audio", "text").index(item[1])))
    chats = {c.name for table in tables for c in table.columns.values() if c.role == "chat"}
    return Plan(ordered, given, read, list(dict.fromkeys(notes)), chats=sorted(chats))


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _target(column: str, role: str, others: set[str]) -> str:
    if role in ("image", "audio"):
        name = column.removesuffix("_file_name") if column.endswith("_file_name") else column
        name = role if column in _PLAIN else name
        if name == column or name not in others:
            column = name
    return f"{column}_2" if column in RESERVED and role not in ("id", "ignore") else column


def _targets(column: Column) -> dict[str, str]:
    if column.role in ("id", "split", "ignore"):
        return {}
    if column.role == "media":
        return {"image": "image", "audio": "audio"}
    return {column.name: column.role if column.role in ("image", "audio") else "text"}


class UnusableError(ValueError):
    """Why a cell, and so its row, cannot be used."""


def words(value: Any, labels: list[str] | None) -> str | None:
    """A cell as text, or None where it is blank. Raises UnusableError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if labels is not None and (isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())):
        if not 0 <= int(value) < len(labels):
            raise UnusableError(f"label {value}, but there are {len(labels)} names")
        return labels[int(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableError("a number that is not finite")
    if isinstance(value, list):
        return "\n".join(text for cell in value if (text := words(cell, labels)) is not None) or None
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UnusableError("bytes that are not UTF-8 text") from None
    text = "" if value is None else str(value)
    return text if text.strip() else None


def _medium(tree: Tree, table: Table, place: str, column: Column, value: Any) -> Media | None:
    path = None
    if _is_struct(value):
        path, value = value.get("path"), value["bytes"]
        value = path if value is None else value
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        kind = column.role
        if kind == "media":
            kind = (sniff(value[:64]) or ("image", ""))[0]
        return Media(kind, place, data=value)
    if not isinstance(value, str):
        raise UnusableError(f"column '{column.name}' is neither a path nor bytes")
    found = tree.resolve(table.file, value)
    if isinstance(found, Rejected):
        raise UnusableError(found.reason)
    tree.used.add(found)
    kind = column.role if column.role != "media" else tree.kind(found) or "image"
    return tree.media(kind, found)


def _spoken(tree: Tree, table: Table, place: str, column: Column, kind: str, value: bytes | str) -> Media:
    medium = _medium(tree, table, place, Column(kind, column.name), value)
    if medium is None:
        raise UnusableError("an empty medium")
    return medium


def _record(tree: Tree, table: Table, line: int, row: dict[str, Any]) -> Iterator[Item]:
    """The record of a row; one for each element where a column's role is "each"."""
    place = f"{table.file}:{line}"
    found = Found(place, place, {}, _given(table.file))
    each: dict[str, list[Any]] = {}
    chats: list[tuple[Column, Any]] = []
    try:
        for key, value in row.items():
            column = table.columns.get(key)
            if column is None or column.role == "ignore" or value is None:
                continue
            if column.role == "id":
                if not (text := words(value, None)):
                    raise UnusableError("the id is empty")
                found.id = text
            elif column.role == "split":
                if not (split := split_name(str(value))):
                    raise UnusableError(f"unknown split '{value}': write train, validation or test")
                found.split = split
            elif column.role == "chat":
                chats.append((column, value))
            elif column.role == "each":
                each[key] = value if isinstance(value, list) else [value]
            elif column.role == "text":
                if (text := words(value, column.labels)) is not None:
                    found.parts[column.name] = text
            elif (medium := _medium(tree, table, place, column, value)) is not None:
                found.parts[column.name if column.role != "media" else medium.kind] = medium
        for column, value in chats:  # last, since their media take the names that are free
            part = partial(_spoken, tree, table, place, column)
            try:
                text, media = flatten(value, found.parts, part)
            except ValueError as error:
                raise UnusableError(f"column '{column.name}': {error}") from None
            found.parts |= {column.name: text, **media}
        if not each:
            yield found
            return
        for n in range(max(len(values) for values in each.values())):
            parts = dict(found.parts)
            for key, values in each.items():
                column = table.columns[key]
                if n < len(values) and (text := words(values[n], column.labels)) is not None:
                    parts[column.name] = text
            yield Found(f"{found.id}#{n}", place, parts, found.split, found.group)
    except UnusableError as error:
        yield Rejected(table.file, line, str(error))
