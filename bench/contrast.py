"""Contrastive training of images and texts: our one backbone beside open_clip's two encoders, from the same batch.

Both have some 4 million parameters, read 64 images of 32 x 32 and as many texts of 16 ids a step, train in autocast
with fused AdamW and clip gradients at 1. Ours reads an image as 16 embeddings of a convolutional stem through all its
layers, open_clip as 65 patches of 4 x 4 through the layers of its image encoder.

To include the peer, which asks for torchvision and uses none of it here:

    pip install ftfy && pip install --no-deps open_clip_torch
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import numpy as np
import torch
from measure import OURS, Contender, Table, compare
from PIL import Image
from training import step_of

from plait.core.device import Device
from plait.modalities.base import Vocabulary
from plait.modalities.registry import SETTINGS
from plait.model.multimodal import ModelConfig, Multimodal, Sequence, collate
from plait.model.transformer import TransformerConfig
from plait.training.batches import Step
from plait.training.losses import LossModule
from plait.training.optimizer import make_optimizer

BATCH, SIDE, WORDS, VOCABULARY, WIDTH, LAYERS, HEADS, SPACE = 64, 32, 16, 512, 192, 8, 6, 128


def open_clip() -> Any:
    """The module of models and that of losses; None, with a line that says why, where it is not installed. What it
    imports of torchvision, for reading files, is stood in for by nothing where torchvision is missing."""
    if importlib.util.find_spec("open_clip") is None:
        print("open_clip is left out. To include it: pip install ftfy && pip install --no-deps open_clip_torch\n")
        return None
    import transformers  # noqa: F401 (which looks for torchvision by itself, and must not find what follows)

    stand_ins = []
    if importlib.util.find_spec("torchvision") is None:
        wanted = {
            "transforms": ["Normalize", "Compose", "RandomResizedCrop", "InterpolationMode", "ToTensor", "Resize",
                           "CenterCrop", "ColorJitter", "Grayscale"],
            "transforms.functional": [],
            "ops.misc": ["FrozenBatchNorm2d"],
        }  # fmt: skip
        for name in ["", "ops", *wanted]:
            module = types.ModuleType(f"torchvision.{name}".rstrip("."))
            for part in wanted.get(name, []):
                setattr(module, part, type(part, (), {"BICUBIC": 3, "BILINEAR": 2, "NEAREST": 0}))
            sys.modules[module.__name__] = module
            stand_ins.append(module.__name__)
    import open_clip

    for name in stand_ins:
        del sys.modules[name]
    return open_clip


def ours(device: Device, images: list[Image.Image], texts: np.ndarray) -> tuple[Multimodal, Any]:
    """Our model, and what computes its loss of the batch."""
    backbone = TransformerConfig(
        width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_width=WIDTH // HEADS, hidden=WIDTH * 8 // 3,
        max_length=64,
    )  # fmt: skip
    image = SETTINGS["image"].sized(SIDE, {"channels": 3})
    vocabulary = Vocabulary(text=VOCABULARY, columns={"image": "image", "text": "text"}, levels={}, closers=[])
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone, vocabulary=vocabulary, embed_dim=SPACE, tied=True, modalities={"image": image.model_dump()},
        pools_inputs=True, read_only=["image"],
    )  # fmt: skip
    model = Multimodal(config).to(device.torch).train()
    modality, opener = model.media["image"], vocabulary.opener("image")
    seen = [Sequence().read_media(modality, opener, modality.sample(p), vocabulary.pad) for p in images]
    read = [Sequence().read_ids(ids.tolist(), "text") for ids in texts]
    batches = [collate(sequences, model.media, vocabulary.pad) for sequences in (seen, read)]
    records = np.arange(BATCH)
    step, passes, positives = (
        Step(batches, [records, records], records),
        LossModule(model, device),
        torch.eye(BATCH) > 0,
    )

    def loss() -> torch.Tensor:
        output = passes(step, True, True, likelihood=False)
        assert output.embeddings is not None
        a, b = output.embeddings.split(BATCH)
        return model.pair_loss(a, b, positives.to(device.torch), model.pair_scalars) + output.zero_anchor

    return model, loss


def theirs(device: Device, library: Any, images: list[Image.Image], texts: np.ndarray) -> tuple[Any, Any]:
    torch.manual_seed(0)
    hf_encoder = {"layers": LAYERS // 2, "width": WIDTH}
    model = library.model.CLIP(
        SPACE,
        library.model.CLIPVisionCfg(**hf_encoder, head_width=WIDTH // HEADS, patch_size=4, image_size=SIDE),
        library.model.CLIPTextCfg(**hf_encoder, heads=HEADS, context_length=WORDS, vocab_size=VOCABULARY),
    ).to(device.torch)
    model.train()
    criterion = library.loss.ClipLoss()
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2).float() / 255
    pixels, ids = pixels.to(device.torch), torch.from_numpy(texts).to(device.torch)

    def loss() -> torch.Tensor:
        with device.autocast():
            found: torch.Tensor = criterion(*model(pixels, ids))
        return found

    return model, loss


def run(device: Device, **timing: Any) -> list[Table]:
    library = open_clip()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(BATCH)]
    texts = rng.integers(1, VOCABULARY, (BATCH, WORDS))
    contenders = []
    made = [("ours", OURS, ours(device, images, texts))]
    if library is not None:
        made.append(("open_clip", "highest", theirs(device, library, images, texts)))
    for name, matmul, (model, loss) in made:
        used = [p for key, p in model.named_parameters() if ".codec." not in key]
        work = step_of(make_optimizer([model], 1e-4, 0.1, (0.9, 0.98)), model, loss, BATCH)
        note = f"{sum(p.numel() for p in used) / 1e6:.1f} M parameters"
        contenders.append(Contender(name, work, "" if name == "ours" else "ours", matmul, note))
    precision = str(device.dtype).removeprefix("torch.")
    title = f"Contrastive training, {BATCH} images of {SIDE} x {SIDE} and texts of {WORDS} ids, {precision}"
    return [compare(title, "samples/s", contenders, device.name, **timing)]
