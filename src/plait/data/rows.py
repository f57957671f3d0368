"""The rows of a table file: CSV, JSON, JSON lines, Parquet and Arrow, read one after another in bounded memory.

The form is told by the content, not by the ending: a `.json` may hold an array or lines, a `.csv` may have tabs, a file
without `.gz` may be compressed. A fault costs its own row: the reader goes on with the next line.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from plait.core.rejects import Reason, RejectKind
from plait.data.files import DAMAGED, Tree, open_text, suffix_of
from plait.data.stores import Location, open_binary, raise_if_passing

LINE = 64 << 20  # characters of one line of a table, at most
_QUOTED = 4 << 20  # characters of one CSV record that goes over several lines, at most
_DOCUMENT = 256 << 20  # characters of a JSON document that is not lines, at most
_DELIMITERS = ",;\t|"  # what may stand between the cells of a CSV file
_LONG_NUMBER = 10  # digits of a name that is no column's number
_SAMPLE = 50  # lines by which the delimiter is told
# How files begin that are no text, or no table, though they are called so.
_FORMS = {
    "pk\x03\x04": "an Excel workbook or a zip archive",
    "\udcd0\udccf\x11\udce0": "an old Excel workbook",
    "par1\x15": "a Parquet file",
    "sqlite format 3": "a SQLite database",
    "%pdf-": "a PDF",
    "<!doctype html": "a web page",
    "<html": "a web page",
}
_ROWS = ("data", "rows", "records", "examples", "instances")  # keys under which a JSON object keeps its rows

Row = tuple[int, dict[str, Any] | Reason]  # line, and the cells or the reason why there are none


@dataclass
class Heading:
    """What is known of a CSV file before its rows: the names of its columns, and how its cells are written."""

    names: list[str]
    delimiter: str
    spaced: bool  # cells follow the delimiter after a space
    notes: list[str] = field(default_factory=list)


class TableError(ValueError):
    """Why a table cannot be read at all. The message is for people."""


def rows(tree: Tree, name: str) -> Iterator[Row]:
    """The rows of a table, each with its line (Parquet, Arrow and JSON arrays: its number from 0). A fault is a Reason
    in place of the cells; where the rest of the file cannot be read, the last row says so."""
    path, suffix = tree.files[name], suffix_of(name)
    line = 0
    try:
        if suffix in (".parquet", ".arrow"):
            for batch in batches(path, suffix):
                for cells in _cells(batch):
                    yield line, cells
                    line += 1
        elif suffix in (".csv", ".tsv"):
            for line, row in _csv_rows(path, name):
                yield line, row
        else:
            for line, row in _json_rows(path, name):
                yield line, row
    except TableError as error:
        yield line, Reason(RejectKind.NOT_A_TABLE, str(error))
    # Arrow turns values that Python cannot hold into ArithmeticError (OverflowError among them).
    except (*DAMAGED, ArithmeticError, RecursionError, TypeError, csv.Error, pa.ArrowException) as error:
        raise_if_passing(error, name)
        yield (
            line + 1,
            Reason(
                RejectKind.DAMAGED,
                f"damaged table: {' '.join(str(error).split())[:200]}; the rest of the file was not read",
            ),
        )


def distinct(names: list[str]) -> tuple[list[str], list[str]]:
    """The names with a number added where one is there already, and a note for each that was renamed."""
    renamed: list[str] = []
    notes = []
    for name in names:
        number, free = 2, name
        while free in renamed or (free != name and free in names):
            free, number = f"{name}_{number}", number + 1
        if free != name:
            notes.append(f"two columns are called '{name}': the later one is read as '{free}'")
        renamed.append(free)
    return renamed, notes


# --- Parquet and Arrow ------------------------------------------------------------------------------------------


def _parquet(path: Location) -> Any:
    return path if isinstance(path, Path) else open_binary(path)


def arrow_file(path: Location) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an Arrow file, of the streaming kind (as Hugging Face's datasets write) or the other. Each
    batch is checked, and the file read rather than mapped: what a damaged one says of its places would end the process.
    """
    file = pa.OSFile(str(path)) if isinstance(path, Path) else pa.PythonFile(open_binary(path))
    try:
        reader = pa.ipc.open_stream(file)
        return reader.schema, map(_valid, reader)
    except pa.ArrowInvalid:
        file.seek(0)
        stream = pa.ipc.open_file(file)
        return stream.schema, (_valid(stream.get_batch(n)) for n in range(stream.num_record_batches))


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch. Raises ArrowInvalid where it says what cannot be."""
    batch.validate(full=True)
    return batch


def schema_of(path: Location, suffix: str) -> tuple[pa.Schema, int | None]:
    """Schema of a Parquet or Arrow file, and the number of its rows where that costs nothing to know."""
    if suffix == ".parquet":
        with pq.ParquetFile(_parquet(path)) as file:
            return file.schema_arrow, file.metadata.num_rows
    return arrow_file(path)[0], None


def batches(path: Location, suffix: str, column: int | None = None) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet or Arrow file, at most 64 rows each, columns of one name told apart. With `column`
    that one alone, in batches of any size."""
    if suffix == ".parquet":
        with pq.ParquetFile(_parquet(path)) as file:
            if column is not None:
                column_name = file.schema_arrow.names[column]
                yield from file.iter_batches(65536, columns=[column_name])
                return
            for batch in file.iter_batches(batch_size=64):
                yield batch.rename_columns(distinct(batch.schema.names)[0])
        return
    schema, record_batches = arrow_file(path)
    names = distinct(schema.names)[0]
    for batch in record_batches:
        if column is not None:
            yield batch.select([column])
            continue
        for start in range(0, len(batch), 64):
            yield batch.slice(start, 64).rename_columns(names)


def _cells(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Reason]:
    """The rows of a batch as Python values. A time that Python has no date for (after the year 9999, parts of a
    microsecond) is its text; any other value that cannot be had costs its row."""
    try:
        yield from batch.to_pylist()
        return
    except (ArithmeticError, ValueError, pa.ArrowException):
        pass
    columns: dict[str, list[Any]] = {}
    faults: dict[int, Reason] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
            continue
        except (ArithmeticError, ValueError, pa.ArrowException):
            pass
        if pa.types.is_temporal(column.type):
            try:
                columns[name] = column.cast(pa.string()).to_pylist()
                continue
            except pa.ArrowException:
                pass
        columns[name] = [None] * len(column)
        for n in range(len(column)):
            try:
                columns[name][n] = column[n].as_py()
            except (ArithmeticError, ValueError, pa.ArrowException) as error:
                faults[n] = Reason(RejectKind.BAD_VALUE, f"column '{name}': {' '.join(str(error).split())[:150]}")
    for n in range(len(batch)):
        yield faults[n] if n in faults else {name: values[n] for name, values in columns.items()}


# --- CSV --------------------------------------------------------------------------------------------------------


def heading(path: Location, name: str) -> Heading:
    """How a CSV file is written, told from its first lines. Raises TableError where it has no heading that can be
    read, and what reading may raise."""
    with open_text(path, name) as file:
        lines = [line for line in islice(iter(lambda: file.readline(LINE), ""), _SAMPLE) if line.strip()]
    if not lines:
        raise TableError("no line in it")
    if form := next((form for mark, form in _FORMS.items() if lines[0].lower().startswith(mark)), None):
        raise TableError(f"this is {form}, whatever its name says: save it as CSV in UTF-8")
    if fault := not_utf8(lines[0]):
        raise TableError(f"the heading is {fault}: save it as UTF-8")
    if "\0" in lines[0]:
        raise TableError("the heading holds NUL characters: this is no text")
    first = "\t" if suffix_of(name) == ".tsv" else ","
    fits = {delimiter: _fit(lines, delimiter) for delimiter in (first, *_DELIMITERS.replace(first, ""))}
    delimiter = max(fits, key=lambda delimiter: fits[delimiter])  # of equal ones the first
    if fits[delimiter] < (0.0, 0.0, 0):
        raise TableError("the quotes of its heading do not match")
    cells = next(csv.reader(lines, delimiter=delimiter))
    spaced = _is_spaced(cells)
    names, notes = distinct([cell.strip() if spaced else cell for cell in cells])
    sample = [row for _, _, row in _records(_Source(io.StringIO("".join(lines))), delimiter, spaced)]
    if (again := _value_in(names, [row for row in sample[1:] if isinstance(row, list)])) is not None:
        notes.append(
            f"the first line is read as the names of the columns, but '{again}' stands among the values too. If that "
            "line is a record, put a line of names before it"
        )
    return Heading(names, delimiter, spaced, notes)


def _is_spaced(cells: list[str]) -> bool:
    """Whether the cells of a heading follow the delimiter after a space."""
    return len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])


def _value_in(names: list[str], rows: list[list[str]]) -> str | None:
    """The first name that is also a value of its column: that of a heading which is a record. Columns that are numbered
    are none."""
    numbers = [int(name) for name in names if name.isdecimal() and name.isascii() and len(name) < _LONG_NUMBER]
    numbered = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    for place, name in enumerate(names):
        if name and not numbered and any(len(row) > place and row[place] == name for row in rows):
            return name
    return None


def _fit(lines: list[str], delimiter: str) -> tuple[float, float, int]:
    """How well a delimiter fits lines of a CSV file: whether it cuts the heading, the share of rows that have
    as many cells as it, and that number."""
    try:
        names = next(csv.reader(lines[:1], delimiter=delimiter, strict=True))
    except csv.Error:
        try:  # a heading of several lines
            names = next(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            return -1.0, 0.0, 0
    head = len(names)
    counts: Counter[int] = Counter()
    for _, _, row in _records(_Source(io.StringIO("".join(lines))), delimiter, _is_spaced(names)):
        if isinstance(row, list) and row:
            counts[len(row)] += 1
    counts[head] -= 1
    other_rows = sum(counts.values())
    share = counts[head] / other_rows if other_rows else 1.0
    if head == 1:
        return 0.5, share, 1
    # A delimiter that cuts the heading, and no row like it, stands in a name.
    return (1.0 if share >= 0.5 else 0.0), share, head


class _Source:
    """The lines of a CSV file, numbered, with those of the record at hand kept so that they can be read again."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.again: deque[str] = deque()
        self.held: list[str] = []  # the lines of the record at hand
        self.size = 0  # their characters
        self.first = 1  # the number of the first of these

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self.file.readline(LINE)
        if not line:
            raise StopIteration
        self.held.append(line)
        self.size += len(line)
        if len(self.held) > 1 and self.size > _QUOTED:
            raise csv.Error("a quote that is not closed")
        return line

    def next_record(self) -> None:
        """What is held was a record."""
        self.first += len(self.held)
        self.held, self.size = [], 0

    def give_back(self) -> None:
        """What is held was no record: its first line is left out, the others are read again."""
        self.again.extendleft(reversed(self.held[1:]))
        self.first += 1
        self.held, self.size = [], 0


def _records(source: _Source, delimiter: str, spaced: bool) -> Iterator[tuple[int, list[str], list[str] | Reason]]:
    """The records of a CSV file: the number of each one's first line, its lines, and its cells or why there are none.
    Behind a fault the next line is read."""
    csv.field_size_limit(LINE)

    def reader() -> Any:
        return csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=spaced)

    cells = reader()
    while True:
        try:
            row = next(cells, None)
        except csv.Error as error:
            if not source.held:  # nothing was read: not a fault of a line
                raise
            why = "a quote that is not closed" if "end of data" in str(error) else str(error)
            yield source.first, source.held[:1], Reason(RejectKind.BAD_ROW, f"not valid CSV: {why}")
            source.give_back()
            cells = reader()
            continue
        if row is None:
            return
        line, lines = source.first, source.held
        source.next_record()
        yield line, lines, row


def _csv_rows(path: Location, name: str) -> Iterator[Row]:
    header = heading(path, name)
    with open_text(path, name) as file:
        headed = False
        for line, lines, row in _records(_Source(file), header.delimiter, header.spaced):
            if not row:
                continue
            if not headed:
                headed = True
                continue
            fault = next((f for text in lines if not text.isascii() and (f := not_utf8(text))), None)
            if fault:
                yield line, Reason(RejectKind.BAD_TEXT, fault)
            elif isinstance(row, Reason):
                yield line, row
            elif len(row) > len(header.names):
                yield line, Reason(RejectKind.BAD_ROW, f"{len(row)} cells, more than the {len(header.names)} columns")
            else:
                yield line, dict(zip(header.names, row, strict=False)) | dict.fromkeys(header.names[len(row) :])


def not_utf8(text: str) -> str | None:
    """Why a text that was read with `surrogateescape` is no UTF-8, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return f"not UTF-8 (byte {code - 0xDC00:#04x})"
    return None


# --- JSON -------------------------------------------------------------------------------------------------------


def _not_a_number(text: str) -> float:
    if text == "NaN":
        return math.nan
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{twice}' stands there twice")
    return cells


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError also where a key stands twice in an object, and at Infinity; NaN is NaN."""
    return _DECODER.decode(text)


_DECODER = json.JSONDecoder(parse_constant=_not_a_number, object_pairs_hook=_object)


def _json_rows(path: Location, name: str) -> Iterator[Row]:
    """The rows of JSON lines, or of a document: an array of objects, or an object that holds one under a
    usual key."""
    with open_text(path, name) as file:
        filled = (line for line in iter(lambda: file.readline(LINE), "") if not line.isspace())
        if _is_lines(next(filled, ""), next(filled, ""), suffix_of(name) != ".json"):
            file.seek(0)
            yield from _json_lines(file)
            return
        file.seek(0)
        text = file.read(_DOCUMENT + 1)
    if len(text) > _DOCUMENT:
        raise TableError(f"a JSON document of more than {_DOCUMENT >> 20} Mi characters: write it as JSON lines")
    try:
        if fault := not_utf8(text):
            raise TableError(fault)
        value = parse_json(text)
    except TableError:
        raise
    except (ValueError, RecursionError) as error:
        raise TableError(f"not valid JSON: {error}") from error
    for line, row in enumerate(document_rows(value)):
        yield (
            line,
            row if isinstance(row, dict) else Reason(RejectKind.BAD_ROW, "not an object with the columns' names"),
        )


def document_rows(value: Any) -> list[Any]:
    """The rows of a JSON document. Raises TableError where it holds none."""
    if isinstance(value, list):
        if value and not any(isinstance(row, dict) for row in value):
            raise TableError("a JSON array without objects in it: rows are objects with the columns' names")
        return value
    if isinstance(value, dict):
        for key in _ROWS:
            cells = value.get(key)
            if isinstance(cells, list) and any(isinstance(cell, dict) for cell in cells):
                return cells
        if {"images", "annotations", "categories"} <= value.keys():
            raise TableError("annotations of things in images (COCO): write a table of file_name and label instead")
        sizes = {len(cells) for cells in value.values() if isinstance(cells, list | dict)}
        if len(value) > 1 and len(sizes) == 1 and all(isinstance(cells, list | dict) for cells in value.values()):
            raise TableError("a JSON object of columns: write rows, with pandas to_json(orient='records', lines=True)")
    raise TableError("a JSON document that is no table: write an array of objects, or an object a line")


def _is_lines(first: str, second: str, default: bool) -> bool:
    """Whether a JSON file with these first two lines, blank ones apart, is JSON lines. `default` is what its ending
    says, for a file of one line."""
    first, second = first.strip(), second.strip()
    if first.startswith("["):
        return False
    if not second:
        return default
    if second.startswith("{"):
        return True
    return default and (not first.startswith("{") or first.endswith("}"))


def _json_lines(file: IO[str]) -> Iterator[Row]:
    line = 0
    while text := file.readline(LINE):
        line += 1
        if len(text) == LINE:
            raise ValueError(f"line {line} is longer than {LINE >> 20} Mi characters")
        if text.isspace():
            continue
        if not text.isascii() and (fault := not_utf8(text)):
            yield line, Reason(RejectKind.BAD_TEXT, fault)
            continue
        try:
            row = parse_json(text.strip())
        except (ValueError, RecursionError) as error:
            yield line, Reason(RejectKind.BAD_ROW, f"not valid JSON: {error}")
            continue
        yield (
            line,
            row if isinstance(row, dict) else Reason(RejectKind.BAD_ROW, "not an object with the columns' names"),
        )
