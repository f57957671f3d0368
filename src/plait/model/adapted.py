"""Checkpoints of models that stand on another one: what was trained, and which model it belongs to.

Such a checkpoint has `base.json`, which names the base by its place and its content, and `model.safetensors` with what
was trained alone: low-rank updates, new rows, new encoders. The tokenizer is the base's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from plait.core.config import GenerationConfig
from plait.core.errors import PlaitError
from plait.core.files import read_json, sha256_file
from plait.model import lora
from plait.model.checkpoint import CHECKPOINT_SOURCES, Checkpoint, find_checkpoint, settings_of
from plait.model.extend import extend_frozen, inherited
from plait.model.multimodal import ModelConfig, Multimodal

FILE = "base.json"


class Base(BaseModel):
    """The model that a checkpoint stands on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # a folder, relative to the checkpoint's where it begins with a dot, or a name of the hub
    sha256: dict[str, str]  # its files of weights -> their content
    rank: int  # of the low-rank updates
    alpha: float

    def folder(self, beside: Path) -> Path | str:
        """Where it lies for a checkpoint in the folder `beside`."""
        return (beside / self.name).resolve() if self.name.startswith(".") else self.name

    def load(self, beside: Path, compact: bool = False) -> Checkpoint:
        """The base itself. Raises PlaitError where it is not there, or is another model by now."""
        where = self.folder(beside)
        try:
            checkpoint = CHECKPOINT_SOURCES.one()(find_checkpoint(where) or where, compact=compact)
        except PlaitError as error:
            raise PlaitError(f"{beside} is trained on top of {where}, which cannot be loaded: {error}") from error
        assert checkpoint.origin is not None
        if weight_sums(checkpoint.origin) != self.sha256:
            raise PlaitError(
                f"{beside} is trained on top of {where}, whose weights are others now. Put back those that it was "
                "trained on, or train again."
            )
        return checkpoint


def weight_sums(folder: Path) -> dict[str, str]:
    """The content of a model folder's weights, or of a GGUF file."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {file.name: sha256_file(file) for file in files if not file.name.startswith("training_state")}


def load_adapted(folder: Path, device: torch.device | None = None, merge: bool = True) -> Checkpoint:
    """A checkpoint with its base; with `merge` the updates are added to the matrices, which are in fp32 then.

    Raises PlaitError where either of the two is damaged or missing.
    """
    base = read_base(folder)
    source = base.load(folder, compact=not merge)
    config, labels, training = settings_of(folder)
    try:
        model = attach(source, config, base)
        fill(model, source.model, folder)
        generation = GenerationConfig.model_validate(read_json(folder / "generation_config.json"))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise PlaitError(f"{folder} does not hold a whole model: {error}") from error
    text = source.text
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        text.settings = read_json(settings)
    if merge:
        lora.merge(model.backbone)
        for table in (model.token_embedding, model.lm_head):
            if table is not None:
                table.join_text()
        model.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)
    return Checkpoint(model, text, labels, generation, training, base=None if merge else base)


def read_base(folder: Path) -> Base:
    """The base that a checkpoint names. Raises PlaitError where the file is damaged."""
    try:
        return Base.model_validate(read_json(folder / FILE))
    except ValidationError as error:
        raise PlaitError(f"{folder / FILE} is damaged: {error.errors()[0]['msg']}.") from error


def attach(source: Checkpoint, config: ModelConfig, base: Base) -> Multimodal:
    """A model that shares the source's tensors, with updates that are still zero and new parts that are random."""
    model = extend_frozen(source, config)
    lora.adapt(model.backbone, base.rank, base.alpha)
    return model


def fill(model: Multimodal, source: Multimodal, folder: Path) -> None:
    """Give an attached model what was trained. Raises RuntimeError where a tensor is missing or misshapen."""
    tensors = load_file(folder / "model.safetensors")
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if lost := sorted(set(missing) - inherited(model.requires_grad_(False), source)):
        raise RuntimeError(f"it lacks {', '.join(lost[:3])}")
    if unknown:
        raise RuntimeError(f"it has unknown {', '.join(unknown[:3])}")
