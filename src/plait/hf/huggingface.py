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
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plait.core.device import release_memory, shapes_only
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.architectures import Imported, Layout, Stored, UnsupportedError, imported, layout
from plait.hf.gguf_files import GGUF, all_finite
from plait.hf.hub import find, no_safetensors, other_weights
from plait.inference.memory import BYTES, check_memory
from plait.kernels.linear import Blocks, PackedLinear
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model import checkpoint as own
from plait.model.checkpoint import Checkpoint, GenerationConfig
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig

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
            if unsafe_names := [file for file in where.values() if Path(file).name != file]:
                raise PlaitError(
                    f"{index} names {unsafe_names[0]!r}, which is not a file of this folder. Do not trust this model."
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

    def check(self, expected: Iterable[Stored]) -> None:
        """Raises PlaitError where a tensor is missing, too many, of another shape or not of floats."""
        shapes = {part.name: part.shape for part in expected}
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

    def read(self, part: Stored, rows: slice = slice(None), half: bool = False) -> Tensor:
        """Rows of a tensor, in fp32, or with `half` in the 16 bit that the file has them in. The file is opened anew
        each time, so that no more of it stays in memory."""
        _, inner, path = self.files[part.name]
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_slice(inner)[rows]
                value = value if half and value.dtype in (torch.bfloat16, torch.float16) else value.float()
        except (SafetensorError, RuntimeError, OSError) as error:
            raise PlaitError(f"{path}: tensor {part.name} cannot be read: {error}. Fetch it again.") from error
        if not all_finite(value):
            raise PlaitError(f"{path}: tensor {part.name} holds values that are not finite. Fetch it again.")
        return value

    def storage(self, part: Stored) -> str:
        """How the file keeps a tensor, in our words."""
        file, inner, _ = self.files[part.name]
        return {"F16": "fp16", "BF16": "bf16"}.get(file.get_slice(inner).get_dtype(), "fp32")


def _read_text(folder: Path, size: int) -> Text:
    file = folder / "tokenizer.json"
    if not file.is_file():
        if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model", "vocab.txt", "merges.txt")):
            raise PlaitError(
                f'{folder} has only a slow tokenizer. Write the fast one: python -c "from transformers import '
                f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\"."
            )
        raise PlaitError(f"{file} is missing. Fetch the model's tokenizer too.")
    text = Text.load(file, size)
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
    advised = {key: values[key] for key in ("temperature", "top_k", "top_p") if values.get(key) is not None}
    try:
        return GenerationConfig.model_validate(advised)
    except ValidationError as error:
        raise PlaitError(f"{file} is wrong: {error.errors()[0]['msg']}.") from error


def _ends(config: dict[str, Any], generation: dict[str, Any], size: int, folder: Path) -> list[int]:
    """The ids that end a text: those of generation_config.json, which generation obeys, else those of config.json."""
    end_ids: list[int] = []
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        ends = values.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        for end in ends:
            if type(end) is not int or not 0 <= end < size:
                raise PlaitError(f"{folder / name}: eos_token_id is {end!r}, outside the vocabulary of {size}.")
        end_ids = list(dict.fromkeys(ends)) or end_ids
    return end_ids


def runs(folder: Path) -> bool:
    """Whether our backbone computes what a folder's `config.json` describes. Raises PlaitError where that is wrong."""
    try:
        imported(_object(folder / "config.json"), folder / "config.json")
    except UnsupportedError:
        return False
    return True


def load(
    name_or_folder: str | Path,
    device: torch.device | None = None,
    storage: str | None = None,
    *,
    compact: bool = False,
) -> Checkpoint:
    """A causal language model of one of the `ARCHITECTURES` as a Plait checkpoint that reads and writes text.

    The vocabulary is theirs and ends with their end token; our own end and padding rows after it are zero and unused.
    Weights are fp32, or with `storage` packed for use alone as they are read, one tensor after the other: in one of
    `kernels.quantisation.STORAGES`, or "file", which keeps a GGUF file's own precision as near as there are kernels.
    With `compact` they are for training on top of: frozen, matrices and rows in the 16 bit that the file has.

    Raises PlaitError naming the file, key or tensor where the model cannot be found, trusted or represented.
    """
    folder = find(name_or_folder)
    if folder.suffix == ".gguf":
        return _load_gguf(folder, device, storage)
    file, advice = folder / "config.json", folder / "generation_config.json"
    config = _object(file)
    if config.get("model_type") == "plait":
        return own.load(folder, device)
    described = imported(config, file)
    advised = _object(advice) if advice.is_file() else {}
    generation, ends = _sampling(advised, advice), _ends(config, advised, described.size, folder)
    weights = _Weights(folder, described.architecture.prefix)
    text = _read_text(folder, described.size)
    model = _build(described, weights, ends, storage, folder, compact)
    return _finished(Checkpoint(model, text, generation=generation, origin=folder), str(name_or_folder), device)


def _load_gguf(path: Path, device: torch.device | None, storage: str | None) -> Checkpoint:
    file = GGUF(path)
    config = file.config()
    described = imported(config, path)
    text = file.text()
    if text.size > described.size:
        raise PlaitError(f"{path}: the tokenizer knows {text.size} ids, and the table has {described.size} rows.")
    model = _build(described, file, _ends(config, {}, described.size, path), storage, path)
    return _finished(Checkpoint(model, text, origin=path), str(path), device)


def _finished(checkpoint: Checkpoint, name: str, device: torch.device | None) -> Checkpoint:
    checkpoint.training["imported from"] = name
    checkpoint.model.eval()
    if device is not None:
        checkpoint.model.to(device)
    return checkpoint


def _build(
    described: Imported, weights: _Weights | GGUF, ends: list[int], storage: str | None, where: Path,
    compact: bool = False,
) -> Multimodal:  # fmt: skip
    """The network with its weights. Everything is checked before the first one is read."""
    backbone, size, tied = described.backbone, described.size, described.tied
    plan = layout(described.architecture, backbone, size, tied, described.biases)
    head = Stored("lm_head.weight", (size, backbone.width))
    copied = tied and isinstance(weights, _Weights) and head.name in weights.files  # a tied head may be stored twice
    weights.check([part for parts in plan.values() for part in parts] + [head] * copied)
    end, more = (ends[0], ends[1:] or None) if ends else (None, None)
    vocabulary = Vocabulary(text=size, columns={}, levels={}, closers=[], end_id=end, more_ends=more)
    with shapes_only():
        model = Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=tied))
    if storage != "file":  # the file's own is as much as the file has, and is mapped
        check_memory(sum(p.numel() for p in model.parameters()), storage or "fp32", where)
    if copied and not torch.equal(weights.read(head), weights.read(plan["token_embedding.free"][0])):
        raise PlaitError(f"{where} has a {head.name} of its own, though config.json says tie_word_embeddings.")
    if storage is not None:
        _pack(model, plan, weights, storage, where)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if storage is not None and name.endswith(".free"):
            continue
        half = compact and parameter.ndim == 2 and isinstance(weights, _Weights)
        tensors[name] = _Rows(plan[name], parameter.shape, weights, backbone, half)[:]
    model.load_state_dict(tensors, assign=True, strict=storage is None)
    if backbone.position == "rotary":
        model.backbone.set_frequencies()
    return model.requires_grad_(storage is None)


def _pack(model: Multimodal, plan: Layout, weights: _Weights | GGUF, storage: str, where: Path) -> None:
    """Put packed layers in the place of a network's linear layers and tables."""

    def packed(name: str, shape: tuple[int, int], bias: Tensor | None = None) -> PackedLinear:
        parts = plan[name]
        kind = storage
        if storage == "file":  # of parts of several kinds, the one of the most bits
            kind = max((weights.storage(part) for part in parts), key=BYTES.__getitem__)
        try:
            return PackedLinear(_Rows(parts, torch.Size(shape), weights, model.config.backbone), bias, kind)
        except ValueError as error:
            raise PlaitError(f"{where}: {parts[0].name}: {error} Fetch the model again.") from error

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            bias = None
            if module.bias is not None:
                shape = module.bias.shape
                bias = _Rows(plan[f"{name}.bias"], shape, weights, model.config.backbone)[:]
            linear = packed(f"{name}.weight", (module.out_features, module.in_features), bias)
            setattr(model.get_submodule(parent), child, linear)
            release_memory()  # holes that parts on their way leave between packed layers
    for name, table in (("token_embedding", model.token_embedding), ("lm_head", model.lm_head)):
        if table is not None:
            rows, width = table.free.shape
            table.packed = packed(f"{name}.free", (rows, width))
            table.free = nn.Parameter(torch.empty(0, width), requires_grad=False)
            release_memory()


class _Rows:
    """One of our tensors, made of theirs when its rows are asked for: what packs it takes a few at a time. Rows beyond
    theirs are zero."""

    def __init__(
        self, parts: list[Stored], shape: torch.Size, weights: _Weights | GGUF, backbone: TransformerConfig,
        half: bool = False,
    ) -> None:  # fmt: skip
        self.parts, self.shape, self.weights, self.backbone, self.half = parts, shape, weights, backbone, half
        self.device = torch.device("cpu")

    def _places(self, rows: slice) -> list[tuple[Stored, slice]]:
        """The parts that rows lie in, and which rows of theirs they are."""
        start, stop, _ = rows.indices(self.shape[0])
        places, at = [], 0
        for part in self.parts:
            count = part.shape[1] if part.transposed else part.shape[0]
            first, last = max(start - at, 0), min(stop - at, count)
            if first < last:
                places.append((part, slice(first, last)))
            at += count
        return places

    def __getitem__(self, rows: slice) -> Tensor:
        values = [self._part(part, inner) for part, inner in self._places(rows)]
        start, stop, _ = rows.indices(self.shape[0])
        value = torch.cat(values) if len(values) > 1 else values[0] if values else torch.zeros(0, *self.shape[1:])
        missing = stop - start - len(value)
        return torch.cat((value, value.new_zeros(missing, *self.shape[1:]))) if missing else value

    def pieces(self, rows: slice) -> list[Tensor | Blocks]:
        """Rows as the file keeps them where a kernel reads that, without those beyond theirs."""
        pieces: list[Tensor | Blocks] = []
        for part, inner in self._places(rows):
            blocks = self.weights.blocks(part, inner, self._heads(part)) if isinstance(self.weights, GGUF) else None
            pieces.append(self._part(part, inner) if blocks is None else blocks)
        return pieces

    def _heads(self, part: Stored) -> int:
        return self.backbone.heads if "q_proj" in part.name else self.backbone.kv_heads

    def _part(self, part: Stored, rows: slice) -> Tensor:
        if isinstance(self.weights, GGUF):
            return self.weights.read(part, rows, self._heads(part)) + part.offset
        if part.transposed:
            value = self.weights.read(part, half=self.half).t()[rows].contiguous()
        else:
            value = self.weights.read(part, rows, self.half)
        return value + part.offset if part.offset else value
