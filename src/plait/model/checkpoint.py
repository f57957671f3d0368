"""A checkpoint is a folder in the Hugging Face layout with a manifest of sha256, written last. No pickle anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plait.config import GenerationConfig
from plait.modalities.text import Text
from plait.model.multimodal import ModelConfig, Multimodal
from plait.runtime import PlaitError, publish_folder, read_json, sha256_file, write_atomic, write_json

VERSION = 1


@dataclass
class Checkpoint:
    """A model with what is needed to use it."""

    model: Multimodal
    text: Text
    labels: dict[str, list[str]] = field(default_factory=dict)  # text column -> its few distinct values
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: dict[str, Any] = field(default_factory=dict)  # how it came to be: data, step, validation, seed


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the folder, taking the place of an older one. Raises PlaitError where it cannot be written."""
    model = checkpoint.model
    config = model.config.model_dump()
    settings = config.pop("modalities")
    with publish_folder(folder) as aside:
        write_json(
            aside / "config.json",
            {
                "model_type": "plait",
                "version": VERSION,
                **config,
                "labels": checkpoint.labels,
                "training": checkpoint.training,
            },
        )
        write_json(aside / "preprocessor_config.json", settings)
        write_json(aside / "generation_config.json", checkpoint.generation.model_dump())
        checkpoint.text.save(aside / "tokenizer.json")
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        write_atomic(aside / "README.md", model_card(checkpoint))
        files = {f.name: sha256_file(f) for f in sorted(aside.iterdir())}
        write_json(aside / "manifest.json", {"version": VERSION, "sha256": files})


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line a file; empty where it is whole."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return [f"{manifest} is missing: the checkpoint was not finished"]
    try:
        sums = read_json(manifest)["sha256"].items()
    except (PlaitError, KeyError, TypeError, AttributeError) as error:
        return [f"{manifest} is damaged: {error}"]
    wrong = []
    for name, wanted in sums:
        file = folder / name
        if not file.is_file():
            wrong.append(f"{file} is missing")
        elif sha256_file(file) != wanted:
            wrong.append(f"{file} was altered or cut: its sha256 differs from the manifest's")
    return wrong


def load(folder: Path, device: torch.device | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder. Raises PlaitError naming the file that is missing or damaged."""
    folder = Path(folder)
    if wrong := verify(folder):
        raise PlaitError("; ".join(wrong) + ". Use another checkpoint of the run, or train again.")
    config = read_json(folder / "config.json")
    if config.pop("model_type", None) != "plait" or config.pop("version", None) != VERSION:
        raise PlaitError(f"{folder / 'config.json'} is not of a Plait model of version {VERSION}.")
    labels, training = config.pop("labels"), config.pop("training")
    try:
        settings = read_json(folder / "preprocessor_config.json")
        model = Multimodal(ModelConfig.model_validate({**config, "modalities": settings}))
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict(tensors)
        generation = GenerationConfig.model_validate(read_json(folder / "generation_config.json"))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise PlaitError(f"{folder} does not hold a whole model: {error}") from error
    model.eval()
    if device is not None:
        model.to(device)
    return Checkpoint(model, Text.load(folder / "tokenizer.json"), labels, generation, training)


def model_card(checkpoint: Checkpoint) -> str:
    """The README of a checkpoint."""
    config, training = checkpoint.model.config, checkpoint.training
    columns = ", ".join(f"`{name}` ({modality})" for name, modality in config.vocabulary.columns.items())
    counts = checkpoint.model.parameter_count()
    parts = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    facts = "\n".join(f"* {name}: {value}" for name, value in training.items())
    return f"""---
library_name: plait
---
# A Plait model

Reads and writes the columns {columns}. Made by `plait train` from its owner's files; nothing else was used.

| part | parameters |
| --- | ---: |
{parts}

{facts}

Load it with `plait.load("<this folder>")` or any `plait` command. Figures, with how they were measured, are in the
run's `metrics.json` and `report.html`. It knows what its data held and nothing more; pictures and sounds that it
makes are machine-made.
"""
