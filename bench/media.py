"""Input: log-mel of audio, and PNG files to pixels, beside what people would reach for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from measure import OURS, Contender, Table, compare
from PIL import Image

from plait.modalities.audio import AudioSettings, LogMel
from plait.modalities.image_files import decode_image, encode_png


def run(**timing: Any) -> list[Table]:
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.1, 30 * 16000).astype(np.float32)
    mel, whisper = LogMel(AudioSettings.sized(16000, {})), WhisperFeatureExtractor()

    def our_mel() -> float:
        mel.forward(torch.from_numpy(wave))
        return 30.0

    def their_mel() -> float:
        whisper(wave, sampling_rate=16000, return_tensors="np")
        return 30.0

    # Smooth, so that the file is compressed as an image is.
    small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    data = encode_png(small.resize((128, 128), Image.Resampling.BICUBIC))

    def our_png() -> float:
        decode_image(data)
        return 1.0

    def their_png() -> float:
        Image.open(io.BytesIO(data)).convert("RGB")
        return 1.0

    return [
        compare("Log-mel of 30 s at 16 kHz, 80 bands", "s of sound/s", [
            Contender("ours", our_mel, matmul=OURS, note="1,024-point transform"),
            Contender("transformers WhisperFeatureExtractor", their_mel, "ours", note="400-point transform"),
        ], **timing),
        compare("PNG of 128 x 128", "images/s", [
            Contender("ours", our_png, note="with limits checked before decoding"),
            Contender("Pillow alone", their_png, "ours"),
        ], **timing),
    ]  # fmt: skip
