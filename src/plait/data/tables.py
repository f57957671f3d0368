"""Tables -> records: jsonl, json, csv, tsv, Parquet and Arrow, with columns of text, labels, paths or bytes of media.

What a column is, is told from its name and a sample of its values, and can be said with a map: `ROLE=COLUMN[:NAME]`
or `COLUMN=ROLE[:NAME]`, where ROLE is text, image, audio, chat (messages, see chat.py), labels (several labels a
record: a list, or values between separators), number (to be predicted), id, split, ignore, or each (a
list column: one record for each of its elements); several columns are separated by commas. NAME is what the column is
called in the dataset.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.cells import (
    DATA_URL,
    are_numbers,
    are_web_media,
    head_of,
    is_blank,
    is_struct,
    most,
    number_of,
    role_of,
    separator_of,
)
from plait.data.conversations import decode_base64, flatten
from plait.data.files import (
    DAMAGED,
    TABLE_SUFFIXES,
    Item,
    Media,
    Plan,
    RawRecord,
    Tree,
    suffix_of,
)
from plait.data.folders import FileSplits
from plait.data.record import RESERVED, Rejected, UnusableError, join_labels, split_name
from plait.data.rows import TableError, batches, distinct, heading, rows, schema_of
from plait.modalities.media import KINDS, MEDIA, sniff

ROLES = ("text", *MEDIA, "chat", "labels", "number", "id", "split", "ignore", "each")
_SAMPLE = 200
_COLUMNS = 500
_SHORT = 200  # characters of what may be a label
_BOOKS = ("dataset_dict.json", "dataset_info.json", "state.json")
_FORM = re.compile(r"sample[-_]?submission")
_PLAIN = {"file_name", "filename", "file", "path", "filepath", "file_path"}


@dataclass
class Column:
    """What a table's column is. `role` is one of ROLES or "media" (paths of images and of audio)."""

    role: str
    name: str
    labels: list[str] | None = None
    separator: str | None = None  # of several labels in one cell


@dataclass
class Table:
    """A table of a source: what its columns are, first values of each (`samples`), and its rows by given split."""

    file: str
    split: str | None  # of its rows, where they do not say another one
    columns: dict[str, Column] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    split_counts: Counter[str | None] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def _is_table(tree: Tree, name: str) -> bool:
    """Whether a file has a table's ending; a `.json` must also hold rows."""
    if suffix_of(name) not in TABLE_SUFFIXES:
        return False
    if _FORM.match(name.rpartition("/")[2].lower()):
        tree.why_not[name] = Reason(RejectKind.NOT_A_TABLE, "a form for answers to a competition, not data")
        return False
    if suffix_of(name) != ".json":
        return True
    for _, row in islice(rows(tree, name), 20):
        if isinstance(row, dict):
            return True
        tree.why_not[name] = row
    return False


def _split_column(column_map: dict[str, str]) -> str:
    """The column that the user's map calls the split, else the one of that name."""
    mapped = [left for left, right in column_map.items() if right.strip() == "split" and left not in ROLES]
    return (column_map.get("split") or (mapped or ["split"])[0]).strip()


def _scan(tree: Tree, name: str, split: str, default: str | None) -> Table:
    """One pass over a table: its columns, a sample of each, and its rows by given split. Of Parquet and Arrow files the
    schema and the split's column are enough."""
    table = Table(name, default)
    suffix = suffix_of(name)
    has_schema = suffix in (".parquet", ".arrow")
    if has_schema:
        try:
            schema, count = schema_of(tree.files[name], suffix)
            names, table.notes = distinct(schema.names)
            if split in names:
                table.split_counts = _counted(batches(tree.files[name], suffix, names.index(split)), default)
            else:
                count = sum(map(len, batches(tree.files[name], suffix, 0))) if count is None else count
                table.split_counts = Counter({default: count})
        except (OSError, ValueError, IndexError, pa.ArrowException):
            return table  # `rows` says what is wrong
        table.samples = {column: [] for column in names}
        table.class_names = _class_names(schema)
    elif suffix in (".csv", ".tsv"):
        try:
            table.notes = heading(tree.files[name], name).notes
        except (*DAMAGED, TableError):
            return table
    for number, (_, row) in enumerate(rows(tree, name)):
        if has_schema and number == _SAMPLE:
            break  # such files tell their columns and their size: their media need not be read for that
        if isinstance(row, Reason):
            continue
        for key, value in row.items():
            values = table.samples.setdefault(key, [])
            if len(values) < _SAMPLE and not is_blank(value):
                values.append(head_of(value))
        if not has_schema:
            split_cell = row.get(split)
            table.split_counts[(split_name(split_cell) if isinstance(split_cell, str) else None) or default] += 1
    return table


def _counted(record_batches: Iterator[pa.RecordBatch], default: str | None) -> Counter[str | None]:
    split_counts: Counter[str | None] = Counter()
    for batch in record_batches:
        for entry in pc.value_counts(batch.column(0)).to_pylist():
            value = entry["values"]
            split_counts[(split_name(value) if isinstance(value, str) else None) or default] += entry["counts"]
    return split_counts


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


def _read_column_map(column_map: dict[str, str], column_names: set[str]) -> dict[str, tuple[str, str | None]]:
    """The user's map as column -> (role, name or None). Raises PlaitError where it does not fit the table."""
    requested: dict[str, tuple[str, str | None]] = {}
    for left, right in column_map.items():
        for piece in right.split(","):
            head, _, name = piece.strip().partition(":")
            if left in ROLES and (head in column_names or head not in ROLES):
                role, column = left, head
            else:
                role, column = head, left
            if role not in ROLES:
                raise PlaitError(f"--map {left}={right}: write ROLE=COLUMN, where ROLE is one of {', '.join(ROLES)}.")
            if column not in column_names:
                raise PlaitError(
                    f"--map {left}={right}: there is no column '{column}'. Columns: {', '.join(sorted(column_names))}."
                )
            requested[column] = role, name or None
    return requested


@dataclass
class _Columns:
    """What becomes of the columns of all tables.

    Attributes:
        kinds: Name of a column of the dataset -> its kind.
        notes: What each column of a table was taken for.
        hints: What people may want to say.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, table: Table, name: str, column: Column) -> None:
        """Column `name` of a table. Raises PlaitError where another table says something else."""
        table.columns[name] = column
        role, text = column.role, "text" if column.role == "each" else column.role
        if role == "text" and not column.labels and are_numbers(table.samples[name]):
            self.hints.append(f"{table.file}: '{name}' holds numbers, read as texts. To predict them: --number {name}.")
        if role == "text" and any(isinstance(value, list | dict) for value in table.samples[name]):
            self.hints.append(
                f"{table.file}: '{name}' holds lists or objects, read as texts of JSON. To leave them out: --map "
                f"ignore={name}; to take each of a list's texts for a record: --map each={name}."
            )
        if role == "text" and are_web_media(table.samples[name]):
            self.hints.append(
                f"{table.file}: '{name}' holds addresses of the web, read as texts: nothing is fetched. Fetch the "
                "files and write their paths, to have the media themselves."
            )
        if role == "text" and name.lower() == "split":
            unknown = sorted({str(v) for v in table.samples[name] if not (isinstance(v, str) and split_name(v))})[:3]
            self.hints.append(
                f"{table.file}: '{name}' is read as a text, since it holds what is no split ("
                f"{', '.join(map(repr, unknown))}): write train, validation or test."
            )
        shown = column.name if role != "media" else ", ".join(MEDIA)
        self.notes.append(
            f"{table.file}: {_printable(name) or 'a column without a name'} -> "
            + (role if role in ("id", "split", "ignore") else f"{shown} ({text})")
            + (f", several between '{column.separator}'" if column.separator else "")
        )
        for target, kind in _targets(column).items():
            if self.kinds.setdefault(target, kind) != kind:
                raise PlaitError(
                    f"{table.file}: column '{name}' is {kind}, but '{target}' is {self.kinds[target]} elsewhere. "
                    f"Give it another name: --map {kind}={name}:NAME."
                )


def plan_tables(tree: Tree, column_map: dict[str, str], labels: dict[str, list[str]]) -> Plan | None:
    """The tables of a source as one plan, or None where there is none.

    Raises PlaitError where the map or the labels do not fit, or two tables disagree about a column.
    """
    split = _split_column(column_map)
    names_of_tables = [name for name in list(tree.files) if _is_table(tree, name)]
    splits = FileSplits(names_of_tables)
    tables = [_scan(tree, name, split, splits.split(name)) for name in names_of_tables]
    tables = _without_lists(tree, tables, split)
    if not tables:
        return None
    # What Hugging Face's save_to_disk says about its tables; it holds no records.
    if any(table.file.endswith(".arrow") for table in tables):
        tree.used.update(name for name in tree.files if name.rpartition("/")[2] in _BOOKS)
    columns = _plan_columns(tree, tables, column_map, labels)

    def read() -> Iterator[Item]:
        for table in tables:
            tree.used.add(table.file)
            for line, row in rows(tree, table.file):
                if isinstance(row, Reason):
                    yield Rejected(table.file, line, row)
                else:
                    yield from _record(tree, table, line, row)

    by_role: dict[str, set[str]] = {"chat": set(), "labels": set(), "number": set()}
    for table in tables:
        for column in table.columns.values():
            by_role.setdefault(column.role, set()).add(column.name)
    return Plan(
        dict(sorted(columns.kinds.items(), key=lambda item: KINDS.index(item[1]))),
        _split_counts(tables),
        read,
        list(dict.fromkeys(columns.notes)),
        chats=sorted(by_role["chat"]),
        multi_label=sorted(by_role["labels"]),
        numbers=sorted(by_role["number"]),
        warnings=[
            *(f"{table.file}: {note}." for table in tables for note in table.notes),
            *splits.notes,
            *splits.folders.notes.values(),
            *columns.hints,
        ],
    )


def _without_lists(tree: Tree, tables: list[Table], split: str) -> list[Table]:
    """The tables but for those that name no split and stand beside tables of several: they list the same things again,
    or say something of them."""
    splits: dict[str, set[str]] = {}
    for table in tables:
        if table.split is not None:
            splits.setdefault(table.file.rpartition("/")[0], set()).add(table.split)
    kept = []
    for table in tables:
        beside = splits.get(table.file.rpartition("/")[0], set())
        if table.split is None and split not in table.samples and len(beside) > 1:
            why = (
                f"it names no split, and stands beside tables of {', '.join(sorted(beside))}: what is in it is not used"
            )
            tree.why_not[table.file] = Reason(RejectKind.UNUSED, why)
        else:
            kept.append(table)
    return kept


def _stem_kinds(tree: Tree, table: str, values: list[Any]) -> set[str]:
    """The kinds of media that most of these values name without their endings, each another; empty where not."""
    texts = [value for value in values if isinstance(value, str) and "/" not in value]
    if len(texts) < 2 or len(texts) < len(values) or len(set(texts)) < len(texts):
        return set()
    named = [found[0] for value in texts if len(found := tree.named(table, value)) == 1]
    return {kind for name in named if (kind := tree.kind(name))} if most(len(named), texts) else set()


def _plan_columns(
    tree: Tree, tables: list[Table], column_map: dict[str, str], labels: dict[str, list[str]]
) -> _Columns:
    """What each column of the tables is: as the map says, else as its name and values do. Raises PlaitError."""
    column_names = {column for table in tables for column in table.samples}
    requested = _read_column_map(column_map, column_names)
    columns = _Columns()
    for table in tables:
        roles = {
            column: requested[column][0] if column in requested else role_of(tree, table.file, column, values)
            for column, values in table.samples.items()
        }
        by_stem = None
        if not {*MEDIA, "media"} & set(roles.values()):
            free = (column for column in roles if column not in requested)
            by_stem = next((column for column in free if _stem_kinds(tree, table.file, table.samples[column])), None)
        for column, values in table.samples.items():
            mapped, role = requested.get(column), roles[column]
            name = (mapped[1] if mapped else None) or _target(column, role, set(table.samples))
            if column == by_stem:
                kinds = _stem_kinds(tree, table.file, values)
                role = "media" if len(kinds) > 1 else kinds.pop()
                name = role if role not in table.samples else column
            names = labels.get(name) or labels.get(column) or table.class_names.get(column)
            separator = separator_of(values) if role == "labels" else None
            columns.add(table, column, Column(role, name, names, separator))
    if len(columns.kinds) > _COLUMNS:
        raise PlaitError(
            f"{tables[0].file}: {len(columns.kinds)} columns, more than {_COLUMNS}. If it is a table of records, leave "
            "some columns out of it."
        )
    if unknown := set(labels) - column_names - set(columns.kinds):
        raise PlaitError(
            f"Labels for '{sorted(unknown)[0]}': there is no such column. Columns: {', '.join(columns.kinds)}."
        )
    return columns


def _split_counts(tables: list[Table]) -> Counter[str | None]:
    """How many records the tables give to each split, None for those that leave it open."""
    split_counts: Counter[str | None] = Counter()
    for table in tables:
        lists = [v for key, c in table.columns.items() if c.role == "each" for v in table.samples[key]]
        many = sum(len(v) if isinstance(v, list) else 1 for v in lists) / len(lists) if lists else 1.0
        split_counts.update({of: round(count * many) for of, count in table.split_counts.items()})
    return split_counts


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _target(column: str, role: str, others: set[str]) -> str:
    if role in MEDIA:
        name = column.removesuffix("_file_name") if column.endswith("_file_name") else column
        name = role if column in _PLAIN else name
        if name == column or name not in others:
            column = name
    return f"{column}_2" if column in RESERVED and role not in ("id", "ignore") else column


def _targets(column: Column) -> dict[str, str]:
    if column.role in ("id", "split", "ignore"):
        return {}
    if column.role == "media":
        return {kind: kind for kind in MEDIA}
    return {column.name: column.role if column.role in MEDIA else "text"}


def words(value: Any, labels: list[str] | None) -> str | None:
    """A cell as text, or None where it is blank. Raises UnusableError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if labels is not None and (isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())):
        if not 0 <= int(value) < len(labels):
            raise UnusableError(Reason(RejectKind.UNKNOWN_LABEL, f"label {value}, but there are {len(labels)} names"))
        return labels[int(value)]
    if isinstance(value, float) and math.isinf(value):
        raise UnusableError(Reason(RejectKind.BAD_VALUE, "a number that is not finite"))
    if is_blank(value):
        return None
    if isinstance(value, list) and value and all(isinstance(cell, tuple) and len(cell) == 2 for cell in value):
        value = {str(key): cell for key, cell in value}  # a map of Arrow's
    if isinstance(value, list):
        return "\n".join(text for cell in value if (text := words(cell, labels)) is not None) or None
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UnusableError(Reason(RejectKind.BAD_TEXT, "bytes that are not UTF-8 text")) from None
    text = str(value)
    if not text.strip():
        return None
    # Labels are compared by their spelling: of the two that Unicode has for an accent, one.
    return unicodedata.normalize("NFC", text) if len(text) <= _SHORT else text


def _several(value: Any, column: Column) -> str:
    """The labels of a cell as one text. Raises UnusableError."""
    if isinstance(value, str):
        cells: list[Any] = value.split(column.separator) if column.separator else [value]
    else:
        cells = value if isinstance(value, list) else [value]
    try:
        return join_labels(text for cell in cells if (text := words(cell, column.labels)) is not None)
    except UnusableError:
        raise
    except ValueError as error:
        raise UnusableError(Reason(RejectKind.BAD_VALUE, str(error))) from None


def _medium(tree: Tree, table: Table, place: str, column: Column, value: Any) -> Media | None:
    if is_struct(value):
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        kind = column.role
        if kind == "media":
            kind = (sniff(value[:64]) or (next(iter(MEDIA)), ""))[0]
        return Media(kind, place, data=value)
    if not isinstance(value, str):
        raise UnusableError(Reason(RejectKind.BAD_VALUE, f"column '{column.name}' is neither a path nor bytes"))
    if match := DATA_URL.match(value):
        try:
            data = decode_base64(value[match.end() :], f"column '{column.name}'")
        except ValueError as error:
            raise UnusableError(Reason(RejectKind.BAD_VALUE, str(error))) from None
        kind = match[1] if match[1] in MEDIA else column.role
        if kind not in MEDIA:
            raise UnusableError(Reason(RejectKind.BAD_VALUE, f"a data URL of {match[1]}, which is no medium"))
        return Media(kind, place, data=data)
    resolved = tree.resolve(table.file, value)
    if isinstance(resolved, Rejected):
        raise UnusableError(resolved.why)
    tree.used.add(resolved)
    kind = column.role if column.role != "media" else tree.kind(resolved) or next(iter(MEDIA))
    return tree.media(kind, resolved)


def _spoken(tree: Tree, table: Table, place: str, column: Column, kind: str, value: bytes | str) -> Media:
    medium = _medium(tree, table, place, Column(kind, column.name), value)
    if medium is None:
        raise UnusableError(Reason(RejectKind.EMPTY, "an empty medium"))
    return medium


def _record(tree: Tree, table: Table, line: int, row: dict[str, Any]) -> Iterator[Item]:
    """The record of a row; one for each element where a column's role is "each"."""
    place = f"{table.file}:{line}"
    record = RawRecord(place, place, {}, table.split)
    lists: dict[str, list[Any]] = {}
    chats: list[tuple[Column, Any]] = []
    try:
        for key, value in row.items():
            column = table.columns.get(key)
            if column is None or column.role == "ignore" or is_blank(value):
                continue
            if column.role == "id":
                if not (text := words(value, None)):
                    raise UnusableError(Reason(RejectKind.NO_VALUE, "the id is empty"))
                record.id = text
            elif column.role == "split":
                if not (split := split_name(str(value))):
                    raise UnusableError(
                        Reason(RejectKind.UNKNOWN_SPLIT, f"unknown split '{value}': write train, validation or test")
                    )
                record.split = split
            elif column.role == "chat":
                chats.append((column, value))
            elif column.role == "each":
                lists[key] = value if isinstance(value, list) else [value]
            elif column.role == "labels":
                record.parts[column.name] = _several(value, column)
            elif column.role == "number":
                if (number := number_of(value)) is None:
                    raise UnusableError(
                        Reason(RejectKind.BAD_VALUE, f"column '{column.name}': '{str(value)[:40]}' is no finite number")
                    )
                record.parts[column.name] = f"{number:.10g}"
            elif column.role == "text":
                if (text := words(value, column.labels)) is not None:
                    record.parts[column.name] = text
            elif (medium := _medium(tree, table, place, column, value)) is not None:
                record.parts[column.name if column.role != "media" else medium.kind] = medium
        for column, value in chats:  # last, since their media take the names that are free
            part = partial(_spoken, tree, table, place, column)
            try:
                text, media = flatten(value, record.parts, part, row.get("current_node"))
            except ValueError as error:
                kind = error.reason.kind if isinstance(error, UnusableError) else RejectKind.BAD_VALUE
                raise UnusableError(Reason(kind, f"column '{column.name}': {error}")) from None
            record.parts |= {column.name: text, **media}
        if not lists:
            yield record
            return
        for n in range(max(len(values) for values in lists.values())):
            parts = dict(record.parts)
            for key, values in lists.items():
                column = table.columns[key]
                if n < len(values) and (text := words(values[n], column.labels)) is not None:
                    parts[column.name] = text
            yield RawRecord(f"{record.id}#{n}", place, parts, record.split, record.group)
    except UnusableError as error:
        yield Rejected(table.file, line, error.reason)
