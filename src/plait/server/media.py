"""Media on their way in and out: decoded in processes of their own, encoded in the formats that clients ask for."""

from __future__ import annotations

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import soundfile
from PIL import Image as PILImage

from plait.core.errors import PlaitError
from plait.inference.base import Model
from plait.modalities.audio_files import encode_wav, resample
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import encode_png
from plait.modalities.media import Checker
from plait.server.limits import ApiError, Limits
from plait.server.worker import late

DECODERS = 2  # processes that decode
PATIENCE = 10.0  # seconds that one medium may take to decode
PCM_RATE = 24_000  # of headerless samples, as OpenAI's clients expect

# Format -> (media type, container, encoding, the rates it knows; empty for any).
AUDIO: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "wav": ("audio/wav", "WAV", "PCM_16", ()),
    "flac": ("audio/flac", "FLAC", "PCM_16", ()),
    "mp3": ("audio/mpeg", "MP3", "MPEG_LAYER_III", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "opus": ("audio/ogg", "OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
    "pcm": ("audio/pcm", "RAW", "PCM_16", (PCM_RATE,)),
}


class Reader:
    """Turns encoded media into what models take, a few at a time, never in the server's own process."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.checker = Checker(limits.media, PATIENCE)
        self.pool = ThreadPoolExecutor(DECODERS, "media")
        self.waiting = 0

    async def read(
        self, model: Model, kind: str, data: bytes, param: str, deadline: float, undivided: bool = False
    ) -> Any:
        """The medium as an input of the model: (column, its samples) for ours, else an image or (waveform, rate), with
        `undivided` for all. Raises ApiError where it cannot be read, or while too many wait."""
        if (plait_model := model.plait_model) is not None:
            try:
                plait_model.column(None, kind, f"read {kind}")  # before anything is decoded
            except PlaitError as error:
                raise ApiError(400, str(error), param) from error
        if self.waiting >= self.limits.queue:
            raise ApiError(
                429, "Too many media are waiting. Try again soon.", param, "overloaded", {"Retry-After": "1"}
            )

        def work() -> Any:
            value = self.checker.decode(kind, data)
            return value if undivided else model.prepared(kind, value)

        self.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        except MediaError as error:
            raise ApiError(400, f"The {kind} cannot be used: {error}.", param) from error
        except TimeoutError:
            raise late() from None
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self.checker.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


def png(image: PILImage.Image) -> str:
    """An image as base64 of a PNG."""
    return base64.b64encode(encode_png(image)).decode()


def audio(wave: np.ndarray, rate: int, form: str) -> bytes:
    """A waveform in one of SOUNDS."""
    _, container, encoding, rates = AUDIO[form]
    if rates and rate not in rates:
        to = next((supported for supported in rates if supported > rate), rates[-1])
        wave, rate = resample(wave, rate, to), to
    if form == "wav":
        return encode_wav(wave, rate)
    out = io.BytesIO()
    soundfile.write(
        out, np.clip(wave, -1, 1), rate, format=container, subtype=encoding, endian="LITTLE" if form == "pcm" else None
    )
    return out.getvalue()
