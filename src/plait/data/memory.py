"""What people hold in memory, written down as files that `prepare` reads, and single values that look like media.

A data set of Hugging Face's `datasets`, a pandas DataFrame or a list of dictionaries becomes a folder of tables. Cells
may be texts, numbers, PIL images, arrays of pixels, (waveform, rate), bytes or paths of media files, and messages of
conversations. Imports neither pandas nor `datasets` nor torch: their objects are known by their methods.
"""

from __future__ import annotations

import json
import math
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
from plait.modalities.media import kind_of_suffix

ROWS = 256  # that are encoded and written at a time

Row = Mapping[str, Any]


# --- single values -----------------------------------------------------------------------------------------------


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor; torch is not imported for that."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def as_image(value: Any) -> PILImage.Image:
    """An image from a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W).

    Numbers are 0 to 255 where they are integers, 0 to 1 where they are floats.
    Raises PlaitError for other shapes and ranges.
    """
    if isinstance(value, PILImage.Image):
        return value
    if is_tensor(value):
        pixels = value.detach().cpu().numpy()
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, -1)
    else:
        pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)) or 0 in pixels.shape:
        hint = " A waveform needs its rate beside it: (waveform, rate)." if pixels.ndim == 1 else ""
        raise PlaitError(
            f"An array of shape {tuple(pixels.shape)} is not an image. Give (H, W) or (H, W, C) as an array, or "
            f"(C, H, W) as a tensor, with 1, 3 or 4 channels.{hint}"
        )
    return PILImage.fromarray(_eight_bits(pixels))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8. Raises PlaitError where their range says neither 0 to 1 nor 0 to 255."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if not np.issubdtype(pixels.dtype, np.number) or np.iscomplexobj(pixels) or not np.isfinite(pixels).all():
        raise PlaitError(f"The pixels are no finite numbers (dtype {pixels.dtype}).")
    low, high = float(pixels.min()), float(pixels.max())
    floats = np.issubdtype(pixels.dtype, np.floating)
    if low < 0 or high > (1.0 if floats else 255):
        allowed = "0 to 1 as floats" if floats else "0 to 255 as integers"
        raise PlaitError(f"The pixels lie between {low:g} and {high:g}. Give {allowed}.")
    return np.round(pixels * 255).astype(np.uint8) if floats else pixels.astype(np.uint8)


def as_audio(value: Any) -> tuple[np.ndarray, int] | None:
    """(waveform (T,) float32, rate in Hz) from (waveform, rate), (rate, waveform) as scipy gives it, or a dictionary
    with "array" and "sampling_rate" as `datasets` gives it; None where the value is none of these.

    Integers are scaled to -1 to 1; channels, the smaller of two axes, are averaged.
    Raises PlaitError for a rate or a waveform that cannot be.
    """
    if isinstance(value, dict) and set(value) >= {"array", "sampling_rate"}:
        value = (value["array"], value["sampling_rate"])
    if not isinstance(value, tuple) or len(value) != 2:
        return None
    first, second = value
    if _is_wave(first) and _is_rate(second):
        wave, rate = first, second
    elif _is_rate(first) and _is_wave(second):
        wave, rate = second, first
    else:
        return None
    rate = int(rate)
    if not 100 <= rate <= 1_000_000:
        raise PlaitError(f"A rate of {rate} Hz cannot be. Give (waveform, rate) with the rate in Hz.")
    return _mono(wave.detach().cpu().numpy() if is_tensor(wave) else np.asarray(wave)), rate


def _is_wave(value: Any) -> bool:
    return is_tensor(value) or (isinstance(value, (np.ndarray, list)) and np.ndim(value) in (1, 2))


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _mono(wave: np.ndarray) -> np.ndarray:
    """One channel of float32 between -1 and 1. Raises PlaitError where the values are no waveform."""
    if wave.size == 0 or not np.issubdtype(wave.dtype, np.number) or np.iscomplexobj(wave):
        raise PlaitError(f"A waveform of shape {wave.shape} and dtype {wave.dtype} is none that can be heard.")
    if np.issubdtype(wave.dtype, np.integer):
        scale = float(np.iinfo(wave.dtype).max) + 1
        wave = (wave.astype(np.float64) - 128) / 128 if wave.dtype == np.uint8 else wave / scale
    if wave.ndim == 2:
        wave = wave.mean(int(np.argmin(wave.shape)))
    if not np.isfinite(wave).all():
        raise PlaitError("The waveform holds values that are not finite.")
    return np.asarray(wave, np.float32)


# --- tables ------------------------------------------------------------------------------------------------------


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
    media = {name for name, found in kinds.items() if "media" in found}
    named = {name for name, found in kinds.items() if found - {"none"} == {"path"}}
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
    """Whether a text looks like the path of a medium."""
    return len(value) < 1024 and "\n" not in value and kind_of_suffix(Path(value).suffix) is not None


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
