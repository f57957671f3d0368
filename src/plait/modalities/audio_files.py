"""Audio files: bytes <-> waveforms, with every limit checked before memory is asked for. Imports no torch."""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from plait.core.dist import install_command
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
from plait.modalities.image_files import blank_tile
from plait.modalities.simple_features import audio_features, audio_weights

PREVIEW_BYTES, PREVIEW_SECONDS, PREVIEW_RATE = 16_384, 5, 16_000
PAGE_BYTES = 150_000  # up to which a page holds a file as it is
BANDS, FRAME, HOP = 64, 0.064, 0.032  # of a fingerprint's spectrogram; seconds
_FRAMES = 512  # that are kept of it: 16 s
_LOW, _HIGH, _RATE = 80.0, 3600.0, 8000  # Hz
_DEPTH, _STEPS, _SILENCE = 64, 4, 35  # of the spectrogram: dB, values a dB, and what counts as silence at the ends
_BLOCK = 1 << 16  # frames decoded at a time
_PLACEHOLDER = 0x7FFF0000  # lengths from here to 4 GiB stand in the headers of streams whose end was not known

Wave = tuple[np.ndarray, int]  # float32 (T,), mono, full scale 1; sampling rate in Hz


class AudioFiles(MediaFiles):
    """The descriptor of audio. A value is (waveform float32 (T,), mono, full scale 1; sampling rate in Hz)."""

    kind, verb, writes, unit, element = "audio", "transcribe", "speak", "seconds", "audio"
    comparison = Comparison.SPECTROGRAM
    file_column = "audio_file_name"
    simple_model = "cepstra, loudness and a linear SVM"
    formats = (
        Format("wav", (".wav", ".wave"), "audio/wav"),
        Format("flac", (".flac",), "audio/flac"),
        Format("ogg", (".ogg", ".oga", ".opus"), "audio/ogg"),
        Format("mp3", (".mp3",), "audio/mpeg"),
        Format("aiff", (".aiff", ".aif", ".aifc"), "audio/aiff"),
        Format("au", (".au", ".snd"), "audio/basic"),
        Format("caf", (".caf",), "audio/x-caf"),
        Format("m4a", (".m4a", ".m4b"), "audio/mp4", needs="av"),
        Format("aac", (".aac",), "audio/aac", needs="av"),
        Format("amr", (".amr",), "audio/amr", needs="av"),
        Format("webm", (".weba",), "audio/webm", needs="av"),
    )

    def sniff(self, head: bytes) -> str | None:
        if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
            return "wav" if head[8:12] == b"WAVE" else None
        if head[:4] == b"FORM":
            return "aiff" if head[8:12] in (b"AIFF", b"AIFC") else None
        starts = {b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"caff": "caf", b"\x1aE\xdf\xa3": "webm"}
        if head[:4] in starts:
            return starts[head[:4]]
        if head.startswith(b"#!AMR"):
            return "amr"
        if container_brand(head) is not None and container_brand(head) not in _OTHER_BRANDS:
            return "m4a"
        if len(head) > 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
            return "aac"
        if head.startswith(b"ID3") or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
            return "mp3"
        return None

    def decode(self, data: bytes | Path, limits: Limits = LIMITS) -> Wave:
        return decode_audio(data, limits)

    def check(self, data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
        data, form = self.read(data, limits)
        rate, blocks = _blocks(data, form, limits)
        return {"seconds": sum(len(block) for block in blocks) / rate, "rate": rate}

    def facts(self, value: Wave) -> tuple[float, float]:
        return len(value[0]) / value[1], value[1]

    def length(self, first: Any, second: Any) -> Any:
        return first

    def size_name(self, first: float, second: float) -> str:
        return f"{second:.0f} Hz"

    def fingerprint(self, value: Wave) -> bytes:
        return audio_fingerprint(*value)

    def preview(self, data: bytes, value: Wave) -> bytes:
        """The file itself where it is small and a browser plays it, else its first seconds as MP3."""
        if len(data) <= PREVIEW_BYTES and self.sniff(data[:64]) in ("wav", "flac", "ogg", "mp3"):
            return data
        import soundfile

        wave, rate = value
        wave = resample(wave[: PREVIEW_SECONDS * rate], rate, PREVIEW_RATE)
        out = io.BytesIO()
        soundfile.write(out, np.clip(wave, -1, 1), PREVIEW_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return out.getvalue()

    def page_preview(self, data: bytes) -> bytes:
        """A clip, its first five seconds where it is large."""
        if len(data) <= PAGE_BYTES:
            return data
        wave, rate = decode_audio(data)
        return encode_wav(wave[: PREVIEW_SECONDS * rate], rate)

    def tile(self, preview: bytes, side: int) -> Image.Image:
        """The waveform."""
        tile = blank_tile(side)
        pen = ImageDraw.Draw(tile)
        strength = np.abs(decode_audio(preview)[0])
        loudest = max(float(strength.max()), 1e-6)
        for x, part in enumerate(np.array_split(strength, side)):
            high = float(part.max(initial=0.0)) / loudest * side * 0.45
            pen.line((x, side / 2 - high, x, side / 2 + high), (53, 99, 217))
        return tile

    def message_part(self, data: bytes, form: str) -> dict[str, Any]:
        return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}

    def simple_features(self, samples: Sequence[np.ndarray], bands: int) -> np.ndarray:
        return audio_features(samples, bands)

    def simple_weights(self, features: int) -> np.ndarray:
        return audio_weights(features)

    def pack(self, value: Wave) -> Packed:
        return Packed({"rate": value[1]}, np.ascontiguousarray(value[0], np.float32).tobytes())

    def unpack(self, packed: Packed) -> Wave:
        return np.frombuffer(packed.body, np.float32).copy(), int(packed.facts["rate"])


# Brands of the ISO base media format that are no audio: images.
_OTHER_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2", b"avif", b"avis")

AUDIO = AudioFiles()


def silent(wave: np.ndarray) -> bool:
    """Whether a waveform says nothing: it nowhere exceeds 60 dB below full scale."""
    return not len(wave) or float(np.abs(wave).max()) < 1e-3


def decode_audio(data: bytes | Path, limits: Limits = LIMITS) -> Wave:
    """(waveform float32 (T,), mono, full scale 1; sampling rate in Hz) of an audio file.

    Raises MediaError where it is damaged, cut short, of another format, without samples or beyond the limits.
    """
    data, form = AUDIO.read(data, limits)
    rate, blocks = _blocks(data, form, limits)
    try:
        return np.concatenate(list(blocks)), rate
    except MemoryError as error:
        raise MediaError("needs too much memory", RejectKind.NO_MEMORY) from error


Blocks = tuple[int, Iterator[np.ndarray]]  # rate, and float32 mono blocks


def _blocks(data: bytes, form: Format, limits: Limits) -> Blocks:
    """Raises MediaError, the last check coming when the iterator ends."""
    if form.needs:
        return av_blocks(data, form.name, limits)
    try:
        return _libsndfile_blocks(data, form.name, limits)
    except MediaError:
        if form.name != "caf":
            raise
    # Core Audio's files may hold AAC, which libsndfile does not read.
    other = Format("caf", (), "audio/x-caf", needs="av")
    if other.decoder_missing():
        raise MediaError(f"this caf needs the extra media: {install_command('media')}", RejectKind.NEEDS_EXTRA)
    return av_blocks(data, form.name, limits)


def _libsndfile_blocks(data: bytes, name: str, limits: Limits) -> Blocks:
    import soundfile

    promised = None
    counted = False
    if name == "wav":
        data, promised = _wav(data)
    elif name == "mp3":
        data, counted = _counted_mp3(data)
    try:
        audio = soundfile.SoundFile(io.BytesIO(data))
    except Exception as error:
        raise MediaError(f"damaged {name}: {short(error)}") from error
    rate, channels, frames = audio.samplerate, audio.channels, audio.frames
    # Frames of an mp3 whose count neither its header nor we know are an estimate.
    known = 0 < frames < 1 << 48 and (name != "mp3" or counted)
    longest = min(int(limits.seconds * max(rate, 1)), limits.samples // max(channels, 1))
    fault = None
    if frames == 0 or promised == 0:
        fault = MediaError("no samples in it", RejectKind.EMPTY)
    elif not 100 <= rate <= 768_000:
        fault = MediaError(f"a sampling rate of {rate} Hz", RejectKind.BAD_VALUE)
    elif channels > limits.channels:
        fault = MediaError(f"{channels} channels, more than {limits.channels}", RejectKind.TOO_LARGE)
    elif known and frames > longest:
        length = f"{frames / rate:.0f} s of audio in {channels} channels"
        fault = MediaError(f"{length}, more than {limits.seconds:g} s", RejectKind.TOO_LARGE)
    elif promised is not None and promised != frames:
        fault = MediaError(f"the header promises {promised} samples, {frames} are there", RejectKind.CUT_SHORT)
    if fault:
        audio.close()
        raise fault

    def read() -> Iterator[np.ndarray]:
        samples_read = 0
        with audio:
            while True:
                try:
                    block = audio.read(_BLOCK, dtype="float32", always_2d=True)
                except Exception as error:
                    raise MediaError(f"damaged {name}: {short(error)}") from error
                samples_read += len(block)
                if samples_read > longest:
                    raise MediaError(f"more than {limits.seconds:g} s of audio", RejectKind.TOO_LARGE)
                if not len(block):
                    break
                mono = block.mean(1, dtype=np.float32) if channels > 1 else block[:, 0]
                if not np.isfinite(mono).all():
                    raise MediaError("samples that are not numbers", RejectKind.BAD_VALUE)
                yield mono
        # Of an mp3 whole frames are counted, of which encoders fill some with silence; all others say it exactly.
        slack = 4 * 1152 if name == "mp3" else 0
        if samples_read == 0:
            raise MediaError("no samples in it", RejectKind.EMPTY)
        if known and abs(samples_read - frames) > slack:
            raise MediaError(
                f"cut short: the header promises {frames} samples, {samples_read} are there", RejectKind.CUT_SHORT
            )

    return rate, read()


def av_blocks(data: bytes, name: str, limits: Limits) -> Blocks:
    """The audio of a container that FFmpeg reads, by PyAV. Raises MediaError, also where it has none."""
    import av

    try:
        container = av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
        stream = next(iter(container.streams.audio), None)
        rate = stream.codec_context.sample_rate if stream else 0
        seconds = float(container.duration or 0) / av.time_base
    except Exception as error:  # FFmpeg has an exception for each of its errors, and IndexError
        raise MediaError(f"damaged {name}: {short(error)}") from error
    if stream is None:
        container.close()
        raise MediaError(f"no audio in this {name}", RejectKind.UNKNOWN_FORMAT)
    fault = None
    if not 100 <= rate <= 768_000:
        fault = MediaError(f"a sampling rate of {rate} Hz", RejectKind.BAD_VALUE)
    elif seconds > limits.seconds * 1.01 + 1:
        fault = MediaError(f"{seconds:.0f} s of audio, more than {limits.seconds:g} s", RejectKind.TOO_LARGE)
    if fault:
        container.close()
        raise fault
    stream.codec_context.thread_count = 1
    longest = int(limits.seconds * rate)

    def read() -> Iterator[np.ndarray]:
        samples_read = 0
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        try:
            with container:
                frames = (out for frame in container.decode(stream) for out in resampler.resample(frame))
                for frame in frames:
                    block = frame.to_ndarray().reshape(-1).astype(np.float32)
                    samples_read += len(block)
                    if samples_read > longest:
                        raise MediaError(f"more than {limits.seconds:g} s of audio", RejectKind.TOO_LARGE)
                    if not np.isfinite(block).all():
                        raise MediaError("samples that are not numbers", RejectKind.BAD_VALUE)
                    yield block
                for frame in resampler.resample(None):
                    block = frame.to_ndarray().reshape(-1).astype(np.float32)
                    samples_read += len(block)
                    yield block
        except MediaError:
            raise
        except MemoryError as error:
            raise MediaError("needs too much memory", RejectKind.NO_MEMORY) from error
        except Exception as error:
            raise MediaError(f"damaged {name}: {short(error)}") from error
        if samples_read == 0:
            raise MediaError("no samples in it", RejectKind.EMPTY)
        # A container says its length in whole packets, whose last may be filled up.
        if seconds and samples_read / rate < min(0.9 * seconds, seconds - 0.5):
            raise MediaError(
                f"cut short: the header promises {seconds:.2f} s, {samples_read / rate:.2f} s are there",
                RejectKind.CUT_SHORT,
            )

    return rate, read()


# --- WAV and MP3, as they are found -------------------------------------------------------------------------------


def _wav(data: bytes) -> tuple[bytes, int | None]:
    """The bytes for libsndfile, and the frames that the header promises, None where they cannot be told.

    A stream's header has a placeholder for a length that was not known when it was written: it is mended, and the audio
    reaches to the end of the file. Raises MediaError where a length that was meant is not there.
    """
    big, wide = data[:4] == b"RIFX", data[:4] == b"RF64"
    order = ">" if big else "<"
    at, align, wide_size = 12, 0, -1
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from(order + "I", data, at + 4)[0]
        body, following = at + 8, at + 8 + size + (size & 1)
        if name == b"ds64" and body + 16 <= len(data):
            wide_size = struct.unpack_from("<Q", data, body + 8)[0]
        elif name == b"fmt " and body + 14 <= len(data):
            code = struct.unpack_from(order + "H", data, body)[0]
            align = struct.unpack_from(order + "H", data, body + 12)[0]
            if code not in (1, 3, 6, 7, 0xFFFE):
                align = 0  # compressed: bytes do not tell frames
        elif name == b"data":
            size = wide_size if wide and wide_size >= 0 else size
            left = len(data) - body
            outer = struct.unpack_from(order + "I", data, 4)[0]
            # Nothing is promised where bytes follow that the whole does not count: 0 was written ahead of them.
            unknown = size >= _PLACEHOLDER if size > left else size == 0 < left and outer + 8 <= body
            if unknown and not wide:
                size = left - left % max(align, 1)
                if size == 0:
                    raise MediaError("no samples in it", RejectKind.EMPTY)
                sizes = (struct.pack(order + "I", body + size - 8), struct.pack(order + "I", size))
                data = data[:4] + sizes[0] + data[8 : at + 4] + sizes[1] + data[body : body + size]
            if size > left:
                raise MediaError(
                    f"cut short: the header promises {size} bytes of audio, {left} are there", RejectKind.CUT_SHORT
                )
            return data, size // align if align else None
        at = following
    raise MediaError("damaged wav: no audio in it")


_KBPS = {  # by (MPEG 1, layer): of the 14 numbers that a frame's head may have
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mp3_frame(data: bytes, at: int) -> tuple[int, int] | None:
    """(bytes, length of the side information behind the head) of the MPEG audio frame at a place, or None."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, bits, hertz = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or not 0 < bits < 15 or hertz == 3:
        return None
    first = version == 3
    rate = (44100, 48000, 32000)[hertz] // {3: 1, 2: 2, 0: 4}[version]
    kbps = _KBPS[first, layer][bits - 1]
    padding = head[2] >> 1 & 1
    if layer == 1:
        size = (12000 * kbps // rate + padding) * 4
    else:
        size = (144000 if first or layer == 2 else 72000) * kbps // rate + padding
    mono = head[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return size, side


def _after_id3(data: bytes, at: int) -> int:
    """The place behind the ID3 tags that begin at a place."""
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True))
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at


def _counted_mp3(data: bytes) -> tuple[bytes, bool]:
    """The mp3 with a count of its frames in front, and whether the count is known.

    Without one libsndfile guesses the length from the first frame's bit rate, which says nothing where rates vary, and
    reads no further; with one of the first of several files that were joined, it reads that one alone.
    """
    start = data.find(b"\xff", _after_id3(data, 0))
    first = _mp3_frame(data, start) if start >= 0 else None
    if first is None:
        return data, False
    count, place = 0, start
    while (frame := _mp3_frame(data, place)) is not None:
        count += 1
        place = _after_id3(data, place + frame[0])
    rest = data[place:]
    walked = count > 1 and (len(rest) < 4 or rest.startswith((b"TAG", b"APETAG", b"LYRICS")) or not any(rest))
    tag = start + 4 + first[1]
    stated = None
    if data[tag : tag + 4] in (b"Xing", b"Info") and len(data) > tag + 12 and data[tag + 7] & 1:
        stated = int.from_bytes(data[tag + 8 : tag + 12], "big")
    elif data[start + 36 : start + 40] == b"VBRI":
        stated = int.from_bytes(data[start + 50 : start + 54], "big")
    if stated is not None and (not walked or count <= stated + 4):
        return data, True
    if not walked:
        return data, False  # frames of free format, or something else between them
    # A frame like the first, empty but for the count, at the least rate that has room for it.
    head = bytearray(data[start : start + 4])
    size = 0
    for bits in range(1, 15):
        head[2] = bits << 4 | head[2] & 0x0D
        size = (_mp3_frame(bytes(head), 0) or (0, 0))[0]
        if size >= 4 + first[1] + 12:
            break
    head[1] |= 1  # without a checksum
    counter = bytes(head) + bytes(first[1]) + b"Info" + struct.pack(">II", 1, count)
    return counter.ljust(size, b"\0") + data[start:], True


# --- writing and resampling ---------------------------------------------------------------------------------------


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


# --- fingerprints -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _bands(rate: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(window, filters (bins, BANDS) equally wide, samples of a hop) for a sampling rate."""
    size = max(round(FRAME * rate), 16)
    edges = np.linspace(_LOW, _HIGH, BANDS + 2)
    bins = np.fft.rfftfreq(size, 1 / rate)[:, None]
    rise, fall = (bins - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - bins) / np.diff(edges)[1:]
    filters = np.clip(np.minimum(rise, fall), 0, None)
    return np.hanning(size).astype(np.float32), filters.astype(np.float32), max(round(HOP * rate), 1)


def audio_fingerprint(wave: np.ndarray, rate: int) -> bytes:
    """The spectrogram of a mono waveform float32 (T,): (frames, 64) x uint8, a quarter of a decibel a step below the
    loudest, without silence at both ends, at most 16 s of it. Empty where there is silence only."""
    wave = wave[: int(2 * _FRAMES * HOP * rate)]
    if (factor := rate // _RATE) > 1:
        wave = wave[: len(wave) // factor * factor]
        wave, rate = sum((wave[n::factor] for n in range(1, factor)), wave[::factor].copy()), rate // factor
    window, filters, hop = _bands(rate)
    if len(wave) < len(window):
        wave = np.pad(wave, (0, len(window) - len(wave)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, len(window))[::hop]
    spectrum = np.fft.rfft(frames * window)
    power = (spectrum.real**2 + spectrum.imag**2) @ filters
    top = float(power.max())
    if not top > 1e-9:
        return b""
    level = np.log10(np.maximum(power, top * 10 ** (-_DEPTH / 10)) / top) * 10 + _DEPTH
    heard = np.flatnonzero(level.max(1) > _DEPTH - _SILENCE)
    level = level[heard[0] : heard[-1] + 1][:_FRAMES]
    return np.minimum(np.rint(level * _STEPS), 255).astype(np.uint8).tobytes()
