"""Checkpoints of the Hugging Face ecosystem as our own: causal language models of the `ARCHITECTURES` that our backbone
computes.

Everything that can be wrong is found from the headers before a weight is read, so a bad folder fails fast and whole.
No transformers here: a checkpoint is JSON and safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.architectures import ARCHITECTURES, Stored, imported, layout
from plait.hf.hub import find, no_safetensors, other_weights
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model import checkpoint as own
from plait.model.checkpoint import Checkpoint, GenerationConfig
from plait.model.multimodal import ModelConfig, Multimodal

_BUFFERS = re.compile(
    r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$"
)  # older files keep constants among the weights


# --- weights ----------------------------------------------------------------------------------------------------


class _Weights:
    """The tensors of a folder, one file or sharded, by the names that transformers writes today."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.files: dict[str, tuple[Any, str, Path]] = {}  # name -> open file, name in it, path
        index = folder / "model.safetensors.index.json"
        where: dict[str, str] | None = None
        if (folder / "model.safetensors").is_file():
            paths = [folder / "model.safetensors"]
        elif index.is_file():
            where = read_json(index).get("weight_map") if isinstance(read_json(index), dict) else None
            if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
                raise PlaitError(f"{index} has no weight_map of tensor to file. Fetch the model again.")
            if odd := [file for file in where.values() if Path(file).name != file]:
                raise PlaitError(
                    f"{index} names {odd[0]!r}, which is not a file of this folder. Do not trust this model."
                )
            paths = [folder / file for file in sorted(set(where.values()))]
            if lost := [path for path in paths if not path.is_file()]:
                raise PlaitError(f"{lost[0]} is missing, though {index.name} lists it. Fetch the model again.")
        else:
            raise PlaitError(no_safetensors(folder, other_weights(folder)))
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise PlaitError(f"{path} is damaged or cut short: {error}. Fetch it again.") from error
            for name in names:
                full = name if name.startswith((prefix, "lm_head.")) else prefix + name
                self.files[full] = file, name, path
        for name, listed in (where or {}).items():
            full = name if name.startswith((prefix, "lm_head.")) else prefix + name
            if full not in self.files or self.files[full][2].name != listed:
                raise PlaitError(
                    f"{folder / listed} lacks tensor {name}, though {index.name} lists it. Fetch it again."
                )

    def check(self, wanted: Iterable[Stored]) -> None:
        """Raises PlaitError where a tensor is missing, too many, of another shape or not of floats."""
        shapes = {part.name: part.shape for part in wanted}
        missing = [name for name in shapes if name not in self.files]
        extra = [name for name in self.files if name not in shapes and not _BUFFERS.search(name)]
        for what, names in (("lacks", missing), ("has unknown", extra)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise PlaitError(
                    f"{self.folder} {what} {'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:3])}{more}. "
                    "The weights do not belong to its config.json."
                )
        for name, shape in shapes.items():
            file, inner, path = self.files[name]
            part = file.get_slice(inner)
            if tuple(part.get_shape()) != shape:
                raise PlaitError(f"{path}: tensor {name} has shape {part.get_shape()}, config.json says {list(shape)}.")
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise PlaitError(
                    f"{path}: tensor {name} is of type {part.get_dtype()}; quantised weights cannot be read."
                )

    def read(self, name: str) -> Tensor:
        file, inner, path = self.files[name]
        try:
            value: Tensor = file.get_tensor(inner).float()
        except (SafetensorError, RuntimeError, OSError) as error:
            raise PlaitError(f"{path}: tensor {name} cannot be read: {error}. Fetch it again.") from error
        if not value.isfinite().all():
            raise PlaitError(f"{path}: tensor {name} holds values that are not finite. Fetch it again.")
        return value


def _read_text(folder: Path, size: int) -> Text:
    file = folder / "tokenizer.json"
    if not file.is_file():
        if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model", "vocab.txt", "merges.txt")):
            raise PlaitError(
                f'{folder} has only a slow tokenizer. Write the fast one: python -c "from transformers import '
                f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\"."
            )
        raise PlaitError(f"{file} is missing. Fetch the model's tokenizer too.")
    text = Text.load(file)
    if text.size > size:
        raise PlaitError(f"{file} knows {text.size} ids, and config.json has a vocabulary of {size}.")
    return text


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise PlaitError(f"{file} must hold an object.")
    return value


def _sampling(values: dict[str, Any], file: Path) -> GenerationConfig:
    """The sampling that the authors advise; where they advise none, ours."""
    if not values.get("do_sample"):
        return GenerationConfig()
    known = {key: values[key] for key in ("temperature", "top_k", "top_p") if values.get(key) is not None}
    try:
        return GenerationConfig.model_validate(known)
    except ValidationError as error:
        raise PlaitError(f"{file} is wrong: {error.errors()[0]['msg']}.") from error


def _ends(config: dict[str, Any], generation: dict[str, Any], size: int, folder: Path) -> list[int]:
    """The ids that end a text: those of generation_config.json, which generation obeys, else those of config.json."""
    found: list[int] = []
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        ends = values.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        for end in ends:
            if type(end) is not int or not 0 <= end < size:
                raise PlaitError(f"{folder / name}: eos_token_id is {end!r}, outside the vocabulary of {size}.")
        found = list(dict.fromkeys(ends)) or found
    return found


def runs(config: dict[str, Any]) -> bool:
    """Whether our backbone computes what a `config.json` names."""
    return config.get("model_type") in ARCHITECTURES


def load(name_or_folder: str | Path, device: torch.device | None = None) -> Checkpoint:
    """A causal language model of one of the `ARCHITECTURES` as a Plait checkpoint that reads and writes text, in fp32.

    The vocabulary is theirs and ends with their end token; our own end and padding rows after it are zero and unused.
    Raises PlaitError naming the file, key or tensor where the model cannot be found, trusted or represented.
    """
    folder = find(name_or_folder)
    file, advice = folder / "config.json", folder / "generation_config.json"
    config = _object(file)
    if config.get("model_type") == "plait":
        return own.load(folder, device)
    described = imported(config, file)
    architecture, size, tied = described.architecture, described.size, described.tied
    advised = _object(advice) if advice.is_file() else {}
    generation, ends = _sampling(advised, advice), _ends(config, advised, size, folder)
    plan = layout(architecture, described.backbone, size, tied, described.biases)
    weights = _Weights(folder, architecture.prefix)
    head = Stored("lm_head.weight", (size, described.backbone.width))
    copied = tied and head.name in weights.files  # a tied head may be stored twice
    weights.check([part for parts in plan.values() for part in parts] + [head] * copied)
    text = _read_text(folder, size)
    end, more = (ends[0], ends[1:] or None) if ends else (None, None)
    vocabulary = Vocabulary(text=size, columns={}, levels={}, closers=[], end_id=end, more_ends=more)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = Multimodal(ModelConfig(backbone=described.backbone, vocabulary=vocabulary, embed_dim=0, tied=tied))
    tensors = {}
    for name, wanted in model.state_dict().items():
        value = _ours(plan[name], weights, wanted.shape)
        if name.endswith(".free"):
            value = F.pad(value, (0, 0, 0, vocabulary.size - size))
        tensors[name] = value
    if copied and not torch.equal(weights.read(head.name), tensors["token_embedding.free"][:size]):
        raise PlaitError(f"{folder} has a {head.name} of its own, though config.json says tie_word_embeddings.")
    model.load_state_dict(tensors, assign=True)
    if described.backbone.position == "rotary":
        model.backbone.set_frequencies()
    model.eval()
    if device is not None:
        model.to(device)
    return Checkpoint(model, text, generation=generation, training={"imported from": str(name_or_folder)})


def _ours(parts: list[Stored], weights: _Weights, shape: torch.Size) -> Tensor:
    """One of our tensors, made of theirs."""
    values = []
    for part in parts:
        value = weights.read(part.name) + part.offset
        values.append(value.t().contiguous() if part.transposed else value)
    if not values:
        return torch.zeros(shape)
    return values[0] if len(values) == 1 else torch.cat(values)
