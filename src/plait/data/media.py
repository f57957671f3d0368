"""Images and audio: bytes <-> pixels and waveforms, with every limit checked before memory is asked for.

This file imports neither torch nor the rest of Plait, so that the processes that check media start fast. `Checker`
decodes in such processes: a decoder that crashes takes its process along, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import struct
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class MediaError(ValueError):
    """An image or an audio clip that cannot be used. The message is a short reason for people."""


@dataclass(frozen=True)
class Limits:
    """What a media file may ask for."""

    file_bytes: int = 64 << 20
    pixels: int = 40_000_000
    seconds: float = 600.0
    samples: int = 64_000_000  # frames x channels
    channels: int = 16


LIMITS = Limits()
SIDE = 2048  # pixels a side that `Checker.decode` hands over
PREVIEW_BYTES, PREVIEW_SIDE, PREVIEW_SECONDS, PREVIEW_RATE = 16_384, 128, 5, 16_000
_BLOCK = 1 << 16  # frames decoded at a time

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"}
AUDIO_SUFFIXES = {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3"}


def sniff(head: bytes) -> tuple[str, str] | None:
    """(kind, format) from a file's first 64 bytes or more, or None where it is none of the formats that are read."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image", "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", "jpeg"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "image", "gif"
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        if head[8:12] == b"WEBP":
            return "image", "webp"
        return ("audio", "wav") if head[8:12] == b"WAVE" else None
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "image", "tiff"
    if (
        head[:2] == b"BM"
        and len(head) >= 18
        and struct.unpack_from("<I", head, 14)[0] in (12, 40, 52, 56, 64, 108, 124)
    ):
        return "image", "bmp"
    if head.startswith(b"fLaC"):
        return "audio", "flac"
    if head.startswith(b"OggS"):
        return "audio", "ogg"
    if head.startswith(b"ID3") or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "audio", "mp3"
    return None


def mime(data: bytes) -> str:
    """The media type of encoded bytes, as `data:` URLs want it."""
    found = sniff(data[:64])
    if found is None:
        return "application/octet-stream"
    kind, name = found
    return f"{kind}/{'mpeg' if name == 'mp3' else name}"


def _read(data: bytes | Path, kind: str, limits: Limits) -> tuple[bytes, str]:
    if not isinstance(data, bytes):
        try:
            with Path(data).open("rb") as file:
                data = file.read(limits.file_bytes + 1)
        except OSError as error:
            raise MediaError(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise MediaError("the file is empty")
    if len(data) > limits.file_bytes:
        raise MediaError(f"larger than {limits.file_bytes >> 20} MiB")
    found = sniff(data[:64])
    if found is None or found[0] != kind:
        what = f"{found[1]}, not {'a image' if kind == 'image' else 'audio'}" if found else "of an unknown format"
        known = "png, jpeg, gif, webp, bmp, tiff" if kind == "image" else "wav, flac, ogg, opus, mp3"
        raise MediaError(f"the content is {what} (read are {known})")
    return data, found[1]


# --- images ---------------------------------------------------------------------------------------------------


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a WebP header: Pillow's decoder allocates the canvas already on opening."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _check_size(size: tuple[int, int] | None, limits: Limits) -> None:
    if size is not None and size[0] * size[1] > limits.pixels:
        raise MediaError(f"{size[0]} x {size[1]} pixels, more than {limits.pixels / 1e6:g} million")
    if size is not None and min(size) < 1:
        raise MediaError("the image has no pixels")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float grey image scaled to mode L."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise MediaError("pixels that are not numbers")
        top = float(values.max(initial=0.0))
        values = values * (255.0 if top <= 1.0 else 255.0 / 65535.0 if top > 255.0 else 1.0)
    else:
        values = values.astype(np.float32) / 257.0
    if values.max(initial=0) > 255.5 or values.min(initial=0) < -0.5:
        raise MediaError("pixel values beyond 16 bits")
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def decode_image(data: bytes | Path, limits: Limits = LIMITS) -> Image.Image:
    """The first frame of a png, jpeg, gif, webp, bmp or tiff in mode L, LA, RGB or RGBA, 8 bits a channel, upright.

    Raises MediaError where it is damaged, of another format or larger than the limits, before memory is asked for.
    """
    data, name = _read(data, "image", limits)
    if name == "webp":
        _check_size(_webp_size(data), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of metadata; the size is checked here, by our own limit
            with Image.open(io.BytesIO(data), formats=[name.upper()]) as image:
                _check_size(image.size, limits)
                image.load()
                _check_size(image.size, limits)
                with contextlib.suppress(Exception):  # a broken EXIF block does not spoil the image
                    ImageOps.exif_transpose(image, in_place=True)
                mode, clear = image.mode, "transparency" in image.info
                if mode in ("F", "I") or mode.startswith("I;"):
                    return _eight_bits(image)
                if mode in ("LA", "RGBA") or (mode in ("L", "RGB") and not clear):
                    target = mode
                elif mode in ("1", "L", "La"):
                    target = "LA" if clear or mode == "La" else "L"
                else:
                    target = "RGBA" if clear or mode in ("PA", "RGBa") else "RGB"
                return image.copy() if mode == target else image.convert(target)
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError("needs too much memory") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"more than {limits.pixels / 1e6:g} million pixels") from error
    # Pillow's parsers raise nearly every built-in class on damaged files.
    except Exception as error:
        raise MediaError(f"damaged {name}: {_short(error)}") from error


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """The image (PIL, or uint8 array H x W or H x W x channels) as PNG bytes, lossless."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# --- audio ------------------------------------------------------------------------------------------------------


def _wav_frames(data: bytes) -> int | None:
    """Frames that a WAV's header promises, None where they cannot be told. Raises MediaError where it lies."""
    big, wide = data[:4] == b"RIFX", data[:4] == b"RF64"
    order = ">" if big else "<"
    at, align, wide_size = 12, 0, -1
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from(order + "I", data, at + 4)[0]
        body, at = at + 8, at + 8 + size + (size & 1)
        if name == b"ds64" and body + 16 <= len(data):
            wide_size = struct.unpack_from("<Q", data, body + 8)[0]
        elif name == b"fmt " and body + 14 <= len(data):
            code = struct.unpack_from(order + "H", data, body)[0]
            align = struct.unpack_from(order + "H", data, body + 12)[0]
            if code not in (1, 3, 6, 7, 0xFFFE):
                align = 0  # compressed: bytes do not tell frames
        elif name == b"data":
            size = wide_size if wide and wide_size >= 0 else size
            if size > len(data) - body:
                raise MediaError(f"cut short: the header promises {size} bytes of audio, {len(data) - body} are there")
            return size // align if align else None
    raise MediaError("damaged wav: no audio in it")


def _blocks(data: bytes, name: str, limits: Limits) -> tuple[int, Any]:
    """(rate, iterator of float32 mono blocks); raises MediaError, the last check coming when the iterator ends."""
    import soundfile

    promised = _wav_frames(data) if name == "wav" else None
    try:
        audio = soundfile.SoundFile(io.BytesIO(data))
    except Exception as error:
        raise MediaError(f"damaged {name}: {_short(error)}") from error
    rate, channels, frames = audio.samplerate, audio.channels, audio.frames
    known = 0 < frames < 1 << 48
    longest = min(int(limits.seconds * max(rate, 1)), limits.samples // max(channels, 1))
    fault = None
    if frames == 0 or promised == 0:
        fault = "no samples in it"
    elif not 100 <= rate <= 768_000:
        fault = f"a sampling rate of {rate} Hz"
    elif channels > limits.channels:
        fault = f"{channels} channels, more than {limits.channels}"
    elif known and frames > longest:
        fault = f"{frames / rate:.0f} s of audio in {channels} channels, more than {limits.seconds:g} s"
    elif promised is not None and promised != frames:
        fault = f"the header promises {promised} samples, {frames} are there"
    if fault:
        audio.close()
        raise MediaError(fault)

    def read() -> Any:
        got = 0
        with audio:
            while True:
                try:
                    block = audio.read(_BLOCK, dtype="float32", always_2d=True)
                except Exception as error:
                    raise MediaError(f"damaged {name}: {_short(error)}") from error
                got += len(block)
                if got > longest:
                    raise MediaError(f"more than {limits.seconds:g} s of audio")
                if not len(block):
                    break
                mono = block.mean(1, dtype=np.float32) if channels > 1 else block[:, 0]
                if not np.isfinite(mono).all():
                    raise MediaError("samples that are not numbers")
                yield mono
        # An mp3's length is an estimate of whole frames; all others say it exactly.
        slack = 4 * 1152 if name == "mp3" else 0
        if got == 0:
            raise MediaError("no samples in it")
        if known and abs(got - frames) > slack:
            raise MediaError(f"cut short: the header promises {frames} samples, {got} are there")

    return rate, read()


def decode_audio(data: bytes | Path, limits: Limits = LIMITS) -> tuple[np.ndarray, int]:
    """(waveform float32 (T,), mono, full scale 1; sampling rate in Hz) of a wav, flac, ogg, opus or mp3.

    Raises MediaError where it is damaged, cut short, of another format, silent of samples or beyond the limits.
    """
    data, name = _read(data, "audio", limits)
    rate, blocks = _blocks(data, name, limits)
    try:
        return np.concatenate(list(blocks)), rate
    except MemoryError as error:
        raise MediaError("needs too much memory") from error


def encode_wav(wave: np.ndarray, rate: int) -> bytes:
    """The waveform (T,), full scale 1, clipped, as a 16-bit mono WAV."""
    body = np.rint(np.clip(np.asarray(wave, np.float32), -1.0, 1.0) * 32767.0).astype("<i2").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate,
                       2, 16, b"data", len(body))  # fmt: skip
    return head + body


@lru_cache(maxsize=16)
def _filters(up: int, down: int, zeros: int = 24, beta: float = 9.0, rolloff: float = 0.96) -> tuple[np.ndarray, int]:
    """Kaiser-windowed sinc sampled at the `up` phases: (up, K) float32, and how far the first tap lies back."""
    cut = rolloff * min(1.0, up / down)
    half = math.ceil(zeros / cut)
    offsets = np.arange(-half, half + 1)[None, :] - np.arange(up)[:, None] / up
    window = np.i0(beta * np.sqrt(np.clip(1 - (offsets / (half + 1)) ** 2, 0, None))) / np.i0(beta)
    taps = cut * np.sinc(cut * offsets) * window
    return (taps / taps.sum(1, keepdims=True)).astype(np.float32), half


def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """The waveform float32 (T,) at another rate: ceil(T * to / rate) samples, by a windowed sinc in phases."""
    wave = np.ascontiguousarray(wave, np.float32)
    if rate == to or not len(wave):
        return wave
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    taps, half = _filters(up, down)
    padded = np.pad(wave, (half, half + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1])
    out = np.empty(-(-len(wave) * up // down), np.float32)
    if up <= 512:
        for first in range(min(up, len(out))):  # outputs of one phase are one strided matrix times one filter
            at = first * down
            count = len(range(first, len(out), up))
            rows = windows[at // up :: down][:count]
            out[first::up] = rows @ taps[at % up]
    else:
        for start in range(0, len(out), 1 << 14):
            places = np.arange(start, min(start + (1 << 14), len(out)), dtype=np.int64) * down
            out[start : start + len(places)] = np.einsum("nk,nk->n", windows[places // up], taps[places % up])
    return out


# --- checking in processes of their own ---------------------------------------------------------------------------


def preview(data: bytes, value: Image.Image | tuple[np.ndarray, int]) -> bytes:
    """A medium small enough to be kept in an index or shown in a browser: itself, a thumbnail, its first seconds."""
    if len(data) <= PREVIEW_BYTES and (sniff(data[:64]) or ("", ""))[1] not in ("tiff", "bmp"):
        return data
    out = io.BytesIO()
    if isinstance(value, Image.Image):
        small = value.copy()
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        clear = small.mode in ("LA", "RGBA")
        small.save(out, "PNG" if clear else "JPEG", quality=80)
        return out.getvalue()
    import soundfile

    wave, rate = value
    wave = resample(wave[: PREVIEW_SECONDS * rate], rate, PREVIEW_RATE)
    soundfile.write(out, np.clip(wave, -1, 1), PREVIEW_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return out.getvalue()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.replace("Error opening <_io.BytesIO object>: ", "")
    if "<_io.BytesIO" in text:
        return "it cannot be identified"
    return text[:160].rstrip(".")


def check(kind: str, data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """What decoding shows: {"width", "height"} or {"seconds", "rate"}. Raises MediaError. Keeps no waveform."""
    if kind == "image":
        image = decode_image(data, limits)
        return {"width": image.width, "height": image.height}
    data, name = _read(data, "audio", limits)
    rate, blocks = _blocks(data, name, limits)
    return {"seconds": sum(len(block) for block in blocks) / rate, "rate": rate}


class Checker:
    """Decodes media in a process of its own, one for each thread that calls it. `close()` ends the processes."""

    def __init__(self, limits: Limits = LIMITS, patience: float = 120.0) -> None:
        self.limits, self.patience = limits, patience
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            # A plain process, not multiprocessing: nothing of the caller's main module is imported again.
            room = str(Path(__file__).parents[2])
            code = (
                "import sys; sys.path.insert(0, sys.argv[1]); from plait.data.media import _serve; _serve(sys.argv[2])"
            )
            limits = json.dumps(self.limits.__dict__)
            process = subprocess.Popen(
                [sys.executable, "-c", code, room, limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            self._own.process = process
            with self._lock:
                self._all.append(process)
        return process

    def __call__(self, kind: str, data: bytes) -> dict[str, Any]:
        """As `check`; a crash or a decoder that hangs is a MediaError too."""
        return self._ask(kind, data, whole=False)[0]

    def decode(self, kind: str, data: bytes) -> Image.Image | tuple[np.ndarray, int]:
        """As `decode_image` and `decode_audio`, but nothing in this process touches the encoded bytes. An image whose
        longer side is above SIDE comes reduced by a whole factor."""
        facts, body = self._ask(kind, data, whole=True)
        if kind == "image":
            return Image.frombytes(facts["mode"], (facts["width"], facts["height"]), body)
        return np.frombuffer(body, np.float32).copy(), int(facts["rate"])

    def _ask(self, kind: str, data: bytes, whole: bool) -> tuple[dict[str, Any], bytes]:
        process = self._process()
        assert process.stdin is not None and process.stdout is not None
        body = b""
        try:
            process.stdin.write(struct.pack("<BBQ", kind == "image", whole, len(data)))
            process.stdin.write(data)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], self.patience)[0]:
                process.kill()
                process.wait()
                raise MediaError(f"decoding took more than {self.patience:g} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            answer = json.loads(line)
            body = process.stdout.read(answer.pop("bytes"))
        if not line or process.poll() is not None:
            process.wait()
            raise MediaError("the decoder crashed")
        if "error" in answer:
            raise MediaError(answer["error"])
        return answer, body

    def close(self) -> None:
        for process in self._all:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process.stdout is not None:
                process.stdout.close()
            process.kill()
            process.wait()


def _serve(limits: str) -> None:
    """The loop of a checking process: header and bytes on stdin; for each, one JSON line on stdout, and the pixels or
    samples where they are asked for."""
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    allowed = Limits(**json.loads(limits))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while len(header := stdin.read(10)) == 10:
        image, whole, size = struct.unpack("<BBQ", header)
        data, body = stdin.read(size), b""
        answer: dict[str, Any]
        try:
            if not whole:
                answer = check("image" if image else "audio", data, allowed)
            elif image:
                image = decode_image(data, allowed)
                image = image.reduce(-(-max(image.size) // SIDE)) if max(image.size) > SIDE else image
                answer = {"mode": image.mode, "width": image.width, "height": image.height}
                body = image.tobytes()
            else:
                wave, rate = decode_audio(data, allowed)
                answer, body = {"rate": rate}, np.ascontiguousarray(wave, np.float32).tobytes()
        except MediaError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "needs too much memory"}
        stdout.write(json.dumps({**answer, "bytes": len(body)}).encode() + b"\n" + body)
        stdout.flush()
