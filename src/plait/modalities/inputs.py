"""What single inputs look like: a text or the file that it names, a folder, pixels, a waveform with its rate.

Imports no torch: tensors are known by their methods.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from plait.core.errors import PlaitError
from plait.modalities.media import kind_of_suffix

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")


@dataclass(frozen=True)
class Inputs:
    """What a caller of a verb gave.

    Attributes:
        values: inputs that models read: texts, `Path`s of files, images, (waveform, rate), ...
        several: whether the caller gave a list or a folder, and so wants a list of answers.
    """

    values: list[Any]
    several: bool


def inputs_of(value: Any) -> Inputs:
    """What a value given to a verb means: a list is a batch, a folder its files, a str the file that it names or else a
    text, arrays and tensors are images, (waveform, rate) is audio in either order.

    Only for what a program's author or the owner of the machine gives: a str that came over the network must not name
    files, so servers hand texts to the verbs' counterparts for single inputs.
    Raises PlaitError for a path that does not exist and for what is no input.
    """
    if isinstance(value, list):
        return Inputs([one for item in value for one in inputs_of(item).values], True)
    if isinstance(value, str):
        value = media_or_text(value)
    if isinstance(value, Path) and value.is_dir():
        return Inputs(list(files_of(value)), True)
    if isinstance(value, Path) and value.suffix.lower() in TABLES and value.is_file():
        raise PlaitError(
            f"{value} is a table. To answer for each of its rows, give the table to write: -o answers.csv "
            "(plait.tabulate in Python)."
        )
    return Inputs([plain_input(value)], False)


def medium_of(value: Any) -> Any:
    """What a value given to a verb that reads one medium means: a str is the path of a file, since it can be no text.

    Only for what a program's author gives, as `inputs_of`.
    """
    return Path(value).expanduser() if isinstance(value, str) else plain_input(value)


def plain_input(value: Any) -> Any:
    """A single input in the form in which models take it."""
    if is_tensor(value) or isinstance(value, np.ndarray):
        return as_image(value)
    if (audio := as_audio(value)) is not None:
        return audio
    if isinstance(value, tuple) and not (len(value) == 2 and isinstance(value[0], str)):
        kinds = ", ".join(type(part).__name__ for part in value)
        raise PlaitError(f"A tuple ({kinds}) is no input. Audio is (waveform, rate in Hz); several inputs are a list.")
    return value


def media_or_text(value: str) -> str | Path:
    """A text, or the file or folder that it names.

    What names a file that is there is the file; what names a folder is the folder where it is written with a stroke or
    holds media; what looks like a path and is not there is an error; anything else is text.
    Raises PlaitError for a path that does not exist.
    """
    if not value.strip() or len(value) > 4096 or "\n" in value or "\0" in value:
        return value
    path = Path(value).expanduser()
    with contextlib.suppress(OSError, ValueError):  # a name longer than names may be
        if path.is_file() or (path.is_dir() and ("/" in value or os.sep in value or _holds_media(path))):
            return path
    spaced = re.search(r"\s", value) is not None  # a sentence may end like a file, or hold a stroke
    rooted = value.startswith(("/", "./", "../", "~/")) and "." in path.name
    if not spaced and (rooted or kind_of_suffix(path.suffix)):
        raise PlaitError(f"{value} does not exist. Name a file, or give a text that is no path.")
    return value


def _holds_media(folder: Path) -> bool:
    return any(kind_of_suffix(path.suffix) for path in folder.rglob("*"))


def files_of(folder: Path) -> list[Path]:
    """The media files in a folder and below it, in the order of their names; hidden ones are passed by.

    Raises PlaitError where there is none.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if kind_of_suffix(path.suffix) and path.is_file() and not any(part.startswith(".") for part in path.parts)
    )
    if not files:
        raise PlaitError(f"{folder} holds no images or audio clips. Name a file, or a folder that has some.")
    return files


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
