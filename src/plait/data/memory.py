"""What people hold in memory, written down as files that `prepare` reads.

A data set of Hugging Face's `datasets`, a pandas DataFrame or a list of dictionaries becomes a folder of tables. Cells
may be texts, numbers, PIL images, arrays of pixels, (waveform, rate), bytes or paths of media files, and messages of
conversations. Imports neither pandas nor `datasets` nor torch: their objects are known by their methods.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from plait.core.errors import PlaitError
from plait.modalities.audio_files import encode_wav
from plait.modalities.image_files import encode_png
from plait.modalities.inputs import as_audio, as_image, is_tensor
from plait.modalities.media import kind_of_suffix

ROWS = 256  # that are encoded and written at a time

Row = Mapping[str, Any]


def in_memory(source: Any) -> bool:
    """Whether a source is held in memory: neither a path nor a URL."""
    return not isinstance(source, (str, Path))


def write_source(source: Any, folder: Path) -> None:
    """Write what is held in memory as files into an empty folder, from which `prepare` reads it.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`, a pandas DataFrame, a list of dictionaries (or of texts), or a
            dictionary of these by split.
        folder: where to; it exists and is empty.

    Raises PlaitError where the source is none of these or a value is of no kind that can be read.
    """
    if hasattr(source, "save_to_disk"):  # datasets.Dataset and DatasetDict: their files hold media as they are
        source.save_to_disk(str(folder / "dataset"))
        return
    if isinstance(source, Mapping):
        if not source or not all(isinstance(name, str) for name in source):
            raise PlaitError("A dictionary of data names splits: {'train': [...], 'test': [...]}.")
        for name, part in source.items():
            _write_table(_rows(part), folder / f"{name}.parquet")
        return
    _write_table(_rows(source), folder / "data.parquet")


def _rows(source: Any) -> Sequence[Row]:
    """The rows of a table held in memory. Raises PlaitError where it is none."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        columns = [str(name) for name in source.columns]
        if len(set(columns)) < len(columns):
            raise PlaitError("Two columns of the DataFrame have one name. Rename one.")
        return _Frame(source)
    if isinstance(source, (list, tuple)):
        if not source:
            raise PlaitError("The list of records is empty.")
        if all(isinstance(row, str) for row in source):
            return [{"text": row} for row in source]
        for number, row in enumerate(source):
            if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
                raise PlaitError(
                    f"Record {number} is of type {type(row).__name__}. Records are dictionaries of columns, as in "
                    "{'image': image, 'label': 'cat'}."
                )
        return source
    raise PlaitError(
        f"Data of type {type(source).__name__} cannot be read. Give a path, a datasets.Dataset, a pandas DataFrame, a "
        "list of dictionaries, or a dictionary of these by split."
    )


class _Frame(Sequence[Row]):
    """The rows of a DataFrame, made when they are asked for."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            part = self.frame.iloc[place]
            names = [str(name) for name in part.columns]
            values = [part.iloc[:, n].tolist() for n in range(len(names))]
            return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        return self[place : place + 1][0]


def _write_table(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a table: Parquet where they hold media, else JSON lines, which can say everything else."""
    kinds: dict[str, set[str]] = {}
    files: set[str] = set()  # columns in which a path of an existing file was seen
    for _, part in _parts(rows):
        for row in part:
            for name, value in row.items():
                kind = _kind(value)
                kinds.setdefault(name, set()).add(kind)
                if kind == "path" and name not in files and Path(value).expanduser().is_file():
                    files.add(name)
    media = {name for name, kinds_found in kinds.items() if "media" in kinds_found}
    named = {name for name, kinds_found in kinds.items() if kinds_found - {"none"} == {"path"}}
    # Names of files that are not there beside media that are: texts.
    media |= named & files if media or files else named
    if not media:
        _write_lines(rows, path.with_suffix(".jsonl"))
        return
    converters: dict[str, Callable[[Any], Any]] = {name: _medium if name in media else _scalar for name in kinds}
    schema = pa.schema([(name, _MEDIUM if name in media else _type(kinds[name])) for name in kinds])
    with pq.ParquetWriter(path, schema) as writer:
        for start, part in _parts(rows):
            cells: dict[str, list[Any]] = {name: [] for name in kinds}
            for number, row in enumerate(part, start):
                for name, convert in converters.items():
                    text = pa.types.is_string(schema.field(name).type)
                    cells[name].append(_cell(row.get(name), _text if text else convert, number, name))
            writer.write_table(pa.table(cells, schema=schema))


def _write_lines(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for start, part in _parts(rows):
            for number, row in enumerate(part, start):
                cells = {name: _cell(value, _scalar, number, name) for name, value in row.items()}
                file.write(json.dumps(cells, ensure_ascii=False) + "\n")


def _parts(rows: Sequence[Row]) -> Iterator[tuple[int, Iterable[Row]]]:
    """The rows, some at a time, each part with the number of its first row."""
    for start in range(0, len(rows), ROWS):
        yield start, rows[start : start + ROWS]


def _cell(value: Any, convert: Callable[[Any], Any], number: int, name: str) -> Any:
    """A cell as the table holds it. Raises PlaitError naming the record and the column."""
    try:
        return None if _kind(value) == "none" else convert(value)
    except PlaitError as error:
        raise PlaitError(f"Record {number}, column '{name}': {error}") from None


def _kind(value: Any) -> str:
    """What a cell is: none, path, media, number or other."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return "none"
    if isinstance(value, (float, np.floating)):
        return "none" if math.isnan(value) else "number"
    if isinstance(value, str):
        return "path" if _names_medium(value) else "text"
    if isinstance(value, Path):
        return "path"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return "integer"
    if isinstance(value, (bytes, PILImage.Image, np.ndarray)) or is_tensor(value):
        return "media"
    if isinstance(value, (tuple, dict)) and (_is_struct(value) or as_audio(value) is not None):
        return "media"
    return "other"


def _is_struct(value: Any) -> bool:
    """Whether a dictionary is a medium as `datasets` stores it: bytes, or a path."""
    return isinstance(value, dict) and bool(value) and set(value) <= {"bytes", "path"}


def _names_medium(value: str) -> bool:
    """Whether a text looks like the path of a medium; a sentence may end like one."""
    if len(value) > 1024 or "\n" in value or kind_of_suffix(Path(value).suffix) is None:
        return False
    return not re.search(r"\s", value) or Path(value).expanduser().is_file()


_MEDIUM = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _type(kinds: set[str]) -> pa.DataType:
    """The type of a column of cells that are no media."""
    kinds = kinds - {"none"}
    if kinds == {"integer"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"integer", "number"} else pa.string()


def _medium(value: Any) -> dict[str, Any]:
    """A medium as bytes. A path that cannot be read stays a path: its row is listed as rejected, with the reason."""
    if _is_struct(value):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, (str, Path)):
        try:
            return {"bytes": Path(value).expanduser().read_bytes(), "path": None}
        except OSError:
            return {"bytes": None, "path": str(value)}
    if (audio := as_audio(value)) is not None:
        return {"bytes": encode_wav(*audio), "path": None}
    return {"bytes": encode_png(as_image(value)), "path": None}


def _scalar(value: Any) -> Any:
    """A cell that is no medium, as JSON can say it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_scalar(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _scalar(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _text(value: Any) -> str:
    value = _scalar(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
