"""A Hugging Face name or folder as a model at work: in Plait's engine where it can, else through transformers."""

from __future__ import annotations

from pathlib import Path

from plait.core.device import choose_device
from plait.core.files import read_json
from plait.hf import hub, huggingface
from plait.hf.pretrained import load_pretrained
from plait.inference.base import Model
from plait.inference.model import PlaitModel


def load_model(name_or_folder: str | Path, device: str = "auto", precision: str = "auto") -> Model:
    """GPT-2, Llama and Qwen3 in our backbone, other architectures through transformers.

    Raises PlaitError where it cannot be found, or nothing that Plait asks for can be done with it.
    """
    folder = hub.find(name_or_folder)
    if huggingface.runs(read_json(folder / "config.json")):
        checkpoint = huggingface.load(folder, choose_device(device, precision).torch)
        return PlaitModel(checkpoint, device, precision, folder)
    return load_pretrained(str(folder), device, precision)
