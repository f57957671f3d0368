"""What an image, an audio clip or a text is like, in a few hundred bytes that survive resizing, re-encoding and
cropping.

Light, since it runs in the processes that check media: numpy and Pillow, and nothing of the rest of Plait.
`near.py` compares what is made here.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np
from PIL import Image

SIDE, CHROMA = 24, 8  # of an image's brightness and of its two colour planes
IMAGE = SIDE * SIDE + 2 * CHROMA * CHROMA
BANDS, FRAME, HOP = 64, 0.064, 0.032  # of an audio clip's spectrogram; seconds
FRAMES = 512  # that are kept of an audio clip: 16 s
PERMUTATIONS = 128
_LOW, _HIGH, _RATE = 80.0, 3600.0, 8000  # Hz
_DEPTH, _STEPS, _SILENCE = 64, 4, 35  # of the spectrogram: dB, values a dB, and what counts as silence at the ends
_SHINGLE, _TEXT = 5, 1 << 16  # characters


def image_fingerprint(image: Image.Image) -> bytes:
    """Brightness (24 x 24) and two colour planes (8 x 8 each) of an image over white: 704 x uint8."""
    image = image.reduce(factor) if (factor := min(image.size) // (2 * SIDE)) > 1 else image
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
    colour = small.resize((CHROMA, CHROMA), Image.Resampling.BOX).tobytes()
    return small.tobytes()[::3] + colour[1::3] + colour[2::3]


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
    wave = wave[: int(2 * FRAMES * HOP * rate)]
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
    level = level[heard[0] : heard[-1] + 1][:FRAMES]
    return np.minimum(np.rint(level * _STEPS), 255).astype(np.uint8).tobytes()


@lru_cache(maxsize=1)
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    factors, offsets = np.random.Generator(np.random.PCG64(1997)).integers(0, 1 << 32, (2, PERMUTATIONS, 1), np.uint32)
    return factors | np.uint32(1), offsets


def plain(text: str) -> str:
    """The text without what a copy may change: case, encoding of accents, punctuation, spaces."""
    text = unicodedata.normalize("NFKC", text[:_TEXT]).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def text_print(text: str) -> bytes:
    """MinHash (Broder, 1997) of a text's runs of five characters: 128 x uint32. Empty where that is too short."""
    codes = np.frombuffer(plain(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < 4 * _SHINGLE:
        return b""
    with np.errstate(over="ignore"):
        runs = np.zeros(len(codes) - _SHINGLE + 1, np.uint64)
        for n in range(_SHINGLE):
            runs = (runs ^ codes[n : n + len(runs)]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
        hashes = (runs >> np.uint64(32)).astype(np.uint32)
        factors, offsets = _permutations()
        least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
        for start in range(0, len(hashes), 256):
            least = np.minimum(least, (hashes[start : start + 256] * factors + offsets).min(1))
    return least.tobytes()
