"""Continuous batching: 64 requests of three kinds at once, beside the same engine writing them one after another.

A third continue a text (16 ids read, 24 to 55 written), a third draw an image from a text, a third transcribe an audio
clip. The model is of the size tiny with random weights; in fp32 both must write the same ids.
"""

from __future__ import annotations

import numpy as np
import torch
from measure import Contender, Table, compare

from plait.core.config import SIZES, BackboneRecipe
from plait.core.device import choose_device
from plait.inference.engine import Engine
from plait.inference.requests import Request
from plait.inference.sampling import Sampling
from plait.modalities.base import Vocabulary
from plait.modalities.registry import SETTINGS
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal, Sequence
from plait.training.build import backbone_config

REQUESTS = 64


def table(device_name: str, rounds: int, seconds: float) -> Table:
    device = choose_device(device_name, "fp32")
    size = SIZES["tiny"]
    text = Text.train([], 256)
    image = SETTINGS["image"].sized(size.image, {"channels": 3})
    audio = SETTINGS["audio"].sized(size.rate, {"seconds": size.seconds})
    vocabulary = Vocabulary(
        text=text.size,
        columns={"image": "image", "audio": "audio", "text": "text"},
        levels={"image": image.levels, "audio": audio.levels},
        closers=["audio"],
    )
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone_config(size, BackboneRecipe()),
        vocabulary=vocabulary,
        modalities={"image": image.model_dump(), "audio": audio.model_dump()},
    )
    model = Multimodal(config).eval().to(device.torch)
    engine = Engine(Checkpoint(model, text), device)
    draw = np.random.default_rng(0)
    noise = draw.normal(size=int(size.rate * 0.8)).astype(np.float32) * 0.1
    heard = model.media["audio"].windows((noise, size.rate))[0]
    requests = []
    for i in range(REQUESTS):
        ids = draw.integers(0, 256, 16).tolist()
        sampling = Sampling(temperature=0.8)
        if i % 3 == 0:
            requests.append(Request(Sequence().read_ids(ids), "text", sampling, max_new_tokens=24 + i % 32, seed=i))
        elif i % 3 == 1:
            context = Sequence().read_ids(ids, "text").read_ids([vocabulary.opener("image")])
            requests.append(Request(context, "image", sampling, seed=i))
        else:
            context = Sequence().read_media(model.media["audio"], vocabulary.opener("audio"), heard, vocabulary.pad)
            context.read_ids([vocabulary.opener("text")])
            requests.append(Request(context, "text", sampling, max_new_tokens=24 + i % 32, seed=i))

    def together() -> list[list[int]]:
        return [result.samples[0].ids for result in engine.run(requests)]

    def alone() -> list[list[int]]:
        return [engine.run([request])[0].samples[0].ids for request in requests]

    first, second = together(), alone()
    same = np.mean([a == b for a, b in zip(first, second, strict=True)])
    contenders = [
        Contender("at once", lambda: float(sum(map(len, together())))),
        Contender("one after another", lambda: float(sum(map(len, alone()))), "at once", note=f"{same:.0%} as at once"),
    ]
    title = f"{REQUESTS} requests: text, drawing, transcription; size tiny, fp32"
    return compare(title, "ids/s", contenders, device.name, rounds=rounds, seconds=seconds)
