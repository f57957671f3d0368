"""Video files: bytes -> frames and sound, under limits of both. Imports no torch."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plait.core.rejects import RejectKind
from plait.modalities.descriptor import (
    LIMITS,
    Comparison,
    Format,
    Limits,
    MediaError,
    MediaFiles,
    Packed,
    container_brand,
    short,
)
from plait.modalities.image_files import IMAGE, image_fingerprint
from plait.modalities.simple_features import image_features

FPS, FRAMES, SIDE = 8.0, 2400, 160  # of a decoded clip: frames a second, frames at most, pixels of its longer side
RATE = 16_000  # of its sound, Hz
BANDS, STEPS = 32, 8  # of a slot's sound
SOUND = BANDS * STEPS
PREVIEW_FRAMES, PREVIEW_SIDE, PREVIEW_FPS = 16, 96, 4
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
_IMAGE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2", b"avif", b"avis")
_DEMUXERS = {"mp4": "mov", "mov": "mov", "webm": "matroska", "avi": "avi", "mpeg": "mpeg"}


# --- files --------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """A decoded video.

    Attributes:
        frames: uint8 (T, H, W, 3), upright, one every 1 / `fps` seconds.
        wave: the sound, float32 (S,) at RATE, from the first frame on; empty where there is none.
        seconds: how long it is.
        height: of the encoded frames, in pixels.
    """

    frames: np.ndarray
    fps: float
    wave: np.ndarray
    seconds: float
    height: int


class VideoFiles(MediaFiles):
    """The descriptor of video. A value is a `Clip`."""

    kind, verb, writes, unit, element = "video", "describe", "", "seconds", "img"  # shown as an animated image
    comparison = Comparison.PIXELS
    file_column = "video_file_name"
    simple_model = "frames, motion, loudness and a linear SVM"
    formats = (
        Format("mp4", (".mp4", ".m4v", ".3gp", ".3g2"), "video/mp4", needs="av"),
        Format("mov", (".mov", ".qt"), "video/quicktime", needs="av"),
        Format("webm", (".webm", ".mkv"), "video/webm", needs="av"),
        Format("avi", (".avi",), "video/x-msvideo", needs="av"),
        Format("mpeg", (".mpg", ".mpeg"), "video/mpeg", needs="av"),
    )

    def sniff(self, head: bytes) -> str | None:
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            return "avi"
        if head.startswith(b"\x1aE\xdf\xa3"):
            return "webm"
        if head.startswith(b"\0\0\1\xba"):
            return "mpeg"
        brand = container_brand(head)
        if brand is None or brand in _AUDIO_BRANDS or brand in _IMAGE_BRANDS:
            return None
        return "mov" if brand == b"qt  " else "mp4"

    def decode(self, data: bytes | Path, limits: Limits = LIMITS) -> Clip:
        return decode_video(data, limits)

    def check(self, data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
        clip = decode_video(data, limits)
        return {"seconds": clip.seconds, "height": clip.height, "sound": bool(len(clip.wave))}

    def facts(self, value: Clip) -> tuple[float, float]:
        return value.seconds, value.height

    def length(self, first: Any, second: Any) -> Any:
        return first

    def size_name(self, first: float, second: float) -> str:
        return f"{second:.0f}p"

    def fingerprint(self, value: Clip) -> bytes:
        """That of a sheet of four frames."""
        four = [value.frames[int((n + 0.5) / 4 * len(value.frames))] for n in range(4)]
        sheet = np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])
        return image_fingerprint(Image.fromarray(sheet))

    def preview(self, data: bytes, value: Clip) -> bytes:
        """A few frames as an animated WebP."""
        return animated(value.frames, PREVIEW_FRAMES, PREVIEW_SIDE)

    def page_preview(self, data: bytes) -> bytes:
        return animated(decode_video(data).frames, PREVIEW_FRAMES, PREVIEW_SIDE)

    def tile(self, preview: bytes, side: int) -> Image.Image:
        return IMAGE.tile(preview, side)

    def message_part(self, data: bytes, form: str) -> dict[str, Any]:
        return {
            "type": "video_url",
            "video_url": {"url": f"data:video/{form};base64,{base64.b64encode(data).decode()}"},
        }

    def simple_features(self, samples: Sequence[np.ndarray], bands: int) -> np.ndarray:
        """Gradients and colours of three frames, where frames differ from the ones before, and the spectrum."""
        features = []
        for n in range(3):
            features.append(image_features([frames_of(s)[int((n + 0.5) / 3 * len(s))] for s in samples]))
        moved, heard = [], []
        for sample in samples:
            frames = frames_of(sample).astype(np.float32).mean(-1) / 255
            change = np.diff(frames, axis=0) if len(frames) > 1 else np.zeros_like(frames)
            cells = [part.mean((1, 2)) for rows in np.array_split(change, 4, 1) for part in np.array_split(rows, 4, 2)]
            moved.append([f(cell) for cell in cells for f in (np.mean, np.std)])
            sound = sample[:, -SOUND:].reshape(-1, BANDS).astype(np.float32) / 255
            heard.append(np.concatenate([sound.mean(0), sound.std(0)]))
        return np.concatenate([*features, 8 * np.array(moved), np.array(heard)], 1).astype(np.float32)

    def pack(self, value: Clip) -> Packed:
        facts = {"shape": value.frames.shape, "fps": value.fps, "seconds": value.seconds, "height": value.height}
        return Packed(facts, value.frames.tobytes() + np.ascontiguousarray(value.wave, np.float32).tobytes())

    def unpack(self, packed: Packed) -> Clip:
        facts = packed.facts
        size = math.prod(facts["shape"])
        frames = np.frombuffer(packed.body, np.uint8, size).reshape(facts["shape"])
        wave = np.frombuffer(packed.body[size:], np.float32).copy()
        return Clip(frames.copy(), facts["fps"], wave, facts["seconds"], facts["height"])


VIDEO = VideoFiles()


@dataclass
class _Frames:
    """Frames on their way out of a decoder: one is kept every 1 / `fps` seconds; of too many each second one goes."""

    fps: float = FPS
    kept: list[np.ndarray] = field(default_factory=list)
    last: np.ndarray | None = None

    def add(self, at: float, picture: Callable[[], np.ndarray]) -> None:
        """A frame that is shown from second `at` on; `picture` gives its pixels."""
        while self.last is not None and len(self.kept) / self.fps < at - 1e-6:
            self._keep(self.last)
        if self.last is None or (len(self.kept) + 1) / self.fps > at:
            self.last = picture()

    def _keep(self, frame: np.ndarray) -> None:
        self.kept.append(frame)
        if len(self.kept) > FRAMES:
            self.kept, self.fps = self.kept[::2], self.fps / 2

    def done(self) -> np.ndarray:
        """(T, H, W, 3)."""
        if self.last is not None:
            self._keep(self.last)
        return np.stack(self.kept)


def decode_video(data: bytes | Path, limits: Limits = LIMITS) -> Clip:
    """A video file's frames, reduced and some of a second, and its sound.

    Raises MediaError where it is damaged, cut short, of another format, without pictures or beyond the limits.
    """
    data, form = VIDEO.read(data, limits)
    try:
        return _decode(data, form.name, limits)
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError("needs too much memory", RejectKind.NO_MEMORY) from error
    except Exception as error:  # FFmpeg has an exception for each of its errors, and IndexError
        raise MediaError(f"damaged {form.name}: {short(error)}") from error


def _decode(data: bytes, name: str, limits: Limits) -> Clip:
    import av

    # The demuxer is named, so that no file is taken for a playlist that names others.
    with av.open(io.BytesIO(data), mode="r", format=_DEMUXERS[name], metadata_errors="ignore") as container:
        if not container.streams.video:
            raise MediaError(
                f"no pictures in this {name}: as sound alone its name should end in .m4a or .weba",
                RejectKind.UNKNOWN_FORMAT,
            )
        video, audio = container.streams.video[0], next(iter(container.streams.audio), None)
        width, height = video.codec_context.width, video.codec_context.height
        if width * height > limits.pixels:
            raise MediaError(
                f"{width} x {height} pixels, more than {limits.pixels / 1e6:g} million", RejectKind.TOO_LARGE
            )
        promised = float(container.duration or 0) / av.time_base
        if promised > limits.seconds * 1.01 + 1:
            raise MediaError(f"{promised:.0f} s of video, more than {limits.seconds:g} s", RejectKind.TOO_LARGE)
        for stream in (video, audio):
            if stream is not None:
                stream.codec_context.thread_count = 1
        frames, turn = _Frames(), 0
        blocks: list[np.ndarray] = []
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        first = end = heard_from = 0.0
        count = samples = 0
        for packet in container.demux([stream for stream in (video, audio) if stream is not None]):
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    rate = float(video.average_rate or 25)
                    time = frame.time if frame.time is not None else count / rate
                    first = time if not count else first
                    count, end = count + 1, max(end, time - first + 1 / max(rate, 1.0))
                    if end > limits.seconds + 1:
                        raise MediaError(f"more than {limits.seconds:g} s of video", RejectKind.TOO_LARGE)
                    turn = round(getattr(frame, "rotation", 0) / 90) % 4
                    frames.add(time - first, partial(_reduced, frame))
                elif isinstance(frame, av.AudioFrame):
                    heard_from = (frame.time or 0.0) if not blocks else heard_from
                    for block in resampler.resample(frame):
                        blocks.append(block.to_ndarray().reshape(-1).astype(np.float32))
                        samples += len(blocks[-1])
                        if samples > (limits.seconds + 2) * RATE:
                            raise MediaError(f"more than {limits.seconds:g} s of sound", RejectKind.TOO_LARGE)
        if not count:
            raise MediaError("no frames in it", RejectKind.EMPTY)
        if promised and end < min(0.8 * promised, promised - 1.0):
            raise MediaError(
                f"cut short: the header promises {promised:.2f} s, {end:.2f} s are there", RejectKind.CUT_SHORT
            )
    pixels = np.ascontiguousarray(np.rot90(frames.done(), turn, (1, 2)))
    return Clip(pixels, frames.fps, _aligned(blocks, heard_from - first), end, width if turn % 2 else height)


def _reduced(frame: Any) -> np.ndarray:
    """(H, W, 3) of at most SIDE pixels a side."""
    scale = min(SIDE / max(frame.width, frame.height), 1.0)
    width, height = (max(round(side * scale), 1) for side in (frame.width, frame.height))
    pixels: np.ndarray = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return pixels


def _aligned(blocks: list[np.ndarray], late: float) -> np.ndarray:
    """The sound from the first frame on, `late` seconds after which it begins."""
    if not blocks:
        return np.zeros(0, np.float32)
    wave = np.nan_to_num(np.concatenate(blocks))
    shift = round(late * RATE)
    return np.pad(wave, (max(shift, 0), 0))[max(-shift, 0) :]


def animated(frames: np.ndarray, most: int, side: int) -> bytes:
    """At most so many of frames (T, H, W, 3), evenly spaced, as an animated WebP."""
    places = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    images = [Image.fromarray(frames[place]) for place in places]
    for image in images:
        image.thumbnail((side, side))
    out = io.BytesIO()
    images[0].save(out, "WEBP", save_all=True, append_images=images[1:], duration=1000 // PREVIEW_FPS, loop=0,
                   quality=60)  # fmt: skip
    return out.getvalue()


# --- samples ------------------------------------------------------------------------------------------------------


def _size(row: int) -> int:
    """The side of the frames in rows of so many numbers."""
    return math.isqrt((row - SOUND) // 3)


def frames_of(sample: np.ndarray) -> np.ndarray:
    """The frames of a sample, uint8 (T, size, size, 3)."""
    size = _size(sample.shape[1])
    return np.asarray(sample[:, : 3 * size * size], np.uint8).reshape(len(sample), size, size, 3)


def strip_of(frames: np.ndarray, most: int = 6) -> Image.Image:
    """Frames (T, H, W, 3) side by side, evenly spaced."""
    places = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    image = Image.fromarray(np.concatenate(list(frames[places]), 1))
    times = max(96 // image.height, 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
