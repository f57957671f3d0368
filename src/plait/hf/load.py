"""A Hugging Face name or folder as a model at work: in Plait's engine where it can, else through transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from plait.core.device import choose_device
from plait.hf import dual_encoder, heads, hub, huggingface
from plait.hf.pretrained import load_pretrained
from plait.inference.base import Model
from plait.inference.model import PlaitModel
from plait.kernels.linear import library as linear_library


def load_model(name_or_folder: str | Path, device: str = "auto", precision: str = "auto") -> Model:
    """The architectures of `hf.architectures` and GGUF files in our backbone, others through transformers. Weights are
    kept as `precision` says, those of a GGUF file by default as the file keeps them.

    Raises PlaitError where it cannot be found, or nothing that Plait asks for can be done with it.
    """
    folder = hub.find(name_or_folder)
    if folder.is_dir() and (folder / heads.ARRAYS).is_file():
        return heads.HeadModel(folder, device, precision)
    if folder.is_dir() and (folder / dual_encoder.WEIGHTS).is_file():
        return dual_encoder.DualEncoder(folder, device, precision)
    gguf = folder.suffix == ".gguf"
    if gguf or huggingface.runs(folder):
        chosen = choose_device(device, precision)
        storage = "file" if gguf and precision == "auto" and chosen.kind == "cpu" else chosen.weights
        if chosen.kind == "cpu" and chosen.dtype is torch.bfloat16 and linear_library() is not None:
            storage = "bf16"  # as it is read, so that it is never held in fp32
        checkpoint = huggingface.load(folder, chosen.torch, storage)
        return PlaitModel(checkpoint, device, precision, folder)
    return load_pretrained(str(folder), device, precision)
