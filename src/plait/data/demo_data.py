"""The demo's data, written as ordinary files: handwritten digits, their names in two languages, and spoken names.

The images are scikit-learn's copy of the UCI handwritten digits, 8x8, shown at 16x16. The audio clips are made here by
voices of eSpeak NG; the voices of val and test do not occur in train.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plait.core.dist import install_command
from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.modalities.audio_files import encode_wav, resample

NAMES = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "zh": ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九"],
}
ACCENTS = {"en": ["en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029"], "zh": ["cmn"]}
TAKES = {"en": 3, "zh": 3}  # recordings of each name by each voice, at other pitches and speeds
RATE = 8000
SEED = 7


class Speech:
    """eSpeak NG through its C interface: text to a waveform, one call at a time."""

    _SYNCHRONOUS, _RATE, _PITCH, _RANGE = 2, 1, 3, 4  # of espeak_AUDIO_OUTPUT and espeak_PARAMETER

    def __init__(self) -> None:
        """Raises PlaitError where the library is not installed or does not start."""
        try:
            import espeakng_loader

            self.data = Path(espeakng_loader.get_data_path())
            self.library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        except (ImportError, OSError, RuntimeError) as error:
            raise PlaitError(f"eSpeak NG cannot be loaded ({error}). Run: {install_command('speech')}") from error
        self.rate = self.library.espeak_Initialize(self._SYNCHRONOUS, 0, str(self.data.parent).encode(), 0)
        if self.rate <= 0:
            raise PlaitError("eSpeak NG did not start. To install it again: make speech.")
        self.heard: list[np.ndarray] = []
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = prototype(self._hear)  # kept, or it is collected while the library still calls it
        self.library.espeak_SetSynthCallback(self.callback)

    def _hear(self, samples: Any, count: int, events: int) -> int:
        if samples and count > 0:
            self.heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def variants(self) -> list[str]:
        """The names of the voice variants that come with the library, sorted; robots and whispers are left out."""
        names = sorted(file.name for file in (self.data / "voices" / "!v").iterdir())
        unnatural = ("robo", "whisper", "Robot", "Demonic", "croak")
        return [name for name in names if not any(word in name for word in unnatural)]

    def speak(self, text: str, voice: str, speed: int, pitch: int, spread: int = 50) -> np.ndarray:
        """Float32 samples at `rate`, without the silence around them. Speed is in words a minute; pitch, and the spread
        of its intonation, go from 0 to 100."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise PlaitError(f"eSpeak NG has no voice '{voice}'.")
        self.library.espeak_SetParameter(self._RATE, speed, 0)
        self.library.espeak_SetParameter(self._PITCH, pitch, 0)
        self.library.espeak_SetParameter(self._RANGE, spread, 0)
        self.heard.clear()
        encoded = text.encode()
        self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
        wave = np.concatenate([*self.heard, np.zeros(1, np.int16)]).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wave) > 0.01)
        if not len(loud):
            return wave[:0]
        margin = self.rate // 50
        return wave[max(loud[0] - margin, 0) : loud[-1] + margin]


def write_images(folder: Path) -> Iterator[dict[str, str]]:
    """Write the digits as PNG; yields a metadata row for each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    uniforms = uniform(SEED, np.arange(len(digits.target)))
    order = np.empty(len(uniforms))
    order[np.argsort(uniforms)] = np.arange(len(uniforms)) / len(uniforms)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if order[i] < 0.2 else "val" if order[i] < 0.28 else "train"
        name = f"images/{i:04d}.png"
        small = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8))
        small.resize((16, 16), Image.Resampling.BICUBIC).save(folder / name)
        yield {"image_file_name": name, **{lang: NAMES[lang][digit] for lang in NAMES}, "split": split}


def write_clips(folder: Path, speech: Speech) -> Iterator[dict[str, str]]:
    """Write the spoken names as WAV; yields a metadata row for each."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    variants = speech.variants()
    order = np.argsort(uniform(SEED, np.arange(len(variants)), 1))
    for rank, index in enumerate(order[:60]):
        split = "test" if rank < 10 else "val" if rank < 14 else "train"
        for lang, accents in ACCENTS.items():
            for take in range(TAKES[lang]):
                uniforms = uniform(SEED, int(index), take, len(lang) + ord(lang[0]), np.arange(3))
                voice = f"{accents[int(uniforms[0] * len(accents))]}+{variants[index]}"
                speed, pitch = int(130 + 90 * uniforms[1]), int(30 + 40 * uniforms[2])
                for digit, text in enumerate(NAMES[lang]):
                    wave = speech.speak(text, voice, speed, pitch)
                    if len(wave) < speech.rate // 10:
                        continue  # some variants whisper below what can be heard
                    name = f"audio/{lang}-{variants[index].replace(' ', '_')}-{take}-{digit}.wav"
                    (folder / name).write_bytes(encode_wav(resample(wave, speech.rate, RATE), RATE))
                    yield {"audio_file_name": name, lang: text, "split": split}


def write_demo(folder: Path, tell: Callable[[str], None]) -> None:
    """Write images, audio clips and `metadata.jsonl`; without speech synthesis, says so and leaves the audio clips
    out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(write_images(folder))
    try:
        rows += write_clips(folder, Speech())
    except PlaitError as error:
        tell(f"{error} Going on with text and images.")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
