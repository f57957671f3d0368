"""Adapters as PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, of the same function both ways.

PEFT has a pair of matrices for each of transformers' layers, we have one for each part of ours; `hf.architectures` says
which is which. What was trained beside low-rank updates (rows of new tokens, encoders) has no place in these files.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.core.errors import PlaitError
from plait.core.files import publish_folder, read_json, write_json
from plait.hf.architectures import Architecture, Layout, Stored, layout
from plait.hf.export import architecture_of, biases_of, exported_size, must_be_free
from plait.model import adapted
from plait.model.checkpoint import Checkpoint, find_checkpoint, verify
from plait.model.lora import Adapter, Update, parts_of, updates_of
from plait.model.multimodal import Multimodal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a configuration may ask for that changes the function, and the value that is read.
PLAIN: dict[str, Any] = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None,
    "layer_replication": None, "alora_invocation_tokens": None, "use_bdlora": None, "target_parameters": None,
}  # fmt: skip


def _plan(model: Multimodal) -> tuple[Architecture, Layout]:
    architecture, config = architecture_of(model), model.config.backbone
    size = exported_size(model.vocabulary)
    return architecture, layout(architecture, config, size, model.config.tied, biases_of(config, architecture))


def _module(part: Stored) -> str:
    return part.name.removesuffix(".weight")


def _ranges(plan: Layout) -> dict[str, tuple[str, int, int, int]]:
    """transformers' layer -> (our layer in the backbone, its first and one past its last output there, its inputs)."""
    ranges = {}
    for name, parts in plan.items():
        if not name.startswith("backbone.blocks.") or not name.endswith(".weight"):
            continue
        start = 0
        for part in parts:
            if len(part.shape) != 2:
                continue
            outputs, inputs = part.shape[::-1] if part.transposed else part.shape
            layer = name.removeprefix("backbone.").removesuffix(".weight")
            ranges[_module(part)] = layer, start, start + outputs, inputs
            start += outputs
    return ranges


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Adapter:
    """An adapter in PEFT's files, or the updates of a LoRA run, for a model.

    Raises PlaitError where it is none, is of another base, or is more than low-rank updates.
    """
    folder, model = Path(folder).expanduser(), checkpoint.model
    if (folder / "run.json").is_file() or (folder / adapted.FILE).is_file():
        return _of_run(find_checkpoint(folder) or folder, checkpoint)
    config_file, file = folder / CONFIG, folder / WEIGHTS
    if not config_file.is_file():
        raise PlaitError(f"{folder} holds no adapter: {CONFIG} is missing. Name a folder that PEFT or Plait wrote.")
    config = read_json(config_file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise PlaitError(f"{config_file} is not of LoRA, and adapters of other kinds are not read.")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, False, [], {}, plain):
            raise PlaitError(f"{config_file}: {key} is {config[key]!r}, which is not read. Merge the adapter in PEFT.")
    if not file.is_file():
        raise PlaitError(f"{file} is missing. Save the adapter as safetensors.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PlaitError(f"{file} is damaged or cut short: {error}. Fetch it again.") from error
    return _updates(tensors, config, file, _ranges(_plan(model)[1]), model.config.backbone.layers)


def _of_run(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """The updates of a checkpoint of ours. Raises PlaitError where it has none, or those of another base."""
    if not (folder / adapted.FILE).is_file():
        raise PlaitError(f"{folder} was not trained with --lora, so it holds no adapter. Name a run that was.")
    if wrong := verify(folder):
        raise PlaitError("; ".join(wrong) + ". Use another checkpoint of the run, or train again.")
    base = adapted.read_base(folder)
    if checkpoint.origin is not None and adapted.weight_sums(checkpoint.origin) != base.sha256:
        raise PlaitError(f"{folder} is an adapter of another base: {base.folder(folder)}.")
    tensors, config = load_file(folder / "model.safetensors"), checkpoint.model.config.backbone
    adapter: Adapter = {}
    for layer in sorted({name.rsplit(".down.", 1)[0] for name in tensors if ".down." in name}):
        module = layer.removeprefix("backbone.")
        outputs = sum(len(t) for name, t in tensors.items() if name.startswith(f"{layer}.up."))
        for i, part in enumerate(parts_of(config, module.rsplit(".", 1)[-1], outputs, base.rank, base.alpha)):
            down, up = tensors[f"{layer}.down.{i}"], tensors[f"{layer}.up.{i}"]
            adapter.setdefault(module, []).append(Update(part.start, part.stop, part.scale, down, up))
    return adapter


def _updates(
    tensors: dict[str, Tensor], config: dict[str, Any], file: Path, ranges: dict[str, tuple[str, int, int, int]],
    layers: int,
) -> Adapter:  # fmt: skip
    adapter: Adapter = {}
    for name in sorted(tensors):
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight", name)
        if match is None:
            raise PlaitError(f"{file}: {name} is no low-rank update. Merge the adapter in PEFT.")
        if match[2] == "B":
            continue
        module, down = match[1], tensors[name]
        up = tensors.get(name.replace(".lora_A.", ".lora_B."))
        place = ranges.get(module)
        if place is None or up is None:
            what = f"which this model of {layers} layers has not" if place is None else "without its lora_B"
            raise PlaitError(f"{file} updates {module}, {what}. It is an adapter of another base.")
        layer, start, stop, inputs = place
        if tuple(down.shape) != (len(down), inputs) or tuple(up.shape) != (stop - start, len(down)):
            raise PlaitError(
                f"{file}: the update of {module} is {list(up.shape)} by {list(down.shape)}, the layer "
                f"{stop - start} by {inputs}. It is an adapter of another base."
            )
        scale = _scale(config, module, len(down))
        adapter.setdefault(layer, []).append(Update(start, stop, scale, down.float(), up.float()))
    return adapter


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the low-rank updates of a model that is not merged, for PEFT. Raises PlaitError where it has none, or the
    folder cannot be written."""
    folder = Path(folder)
    must_be_free(folder)
    updates = updates_of(checkpoint.model.backbone)
    if not updates or checkpoint.base is None:
        raise PlaitError(
            "This model has no low-rank updates: only runs that were trained with --lora are written for PEFT."
        )
    architecture, plan = _plan(checkpoint.model)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for module, (layer, start, stop, _) in _ranges(plan).items():
        inside = [update for update in updates.get(layer, []) if start <= update.start and update.stop <= stop]
        if not inside:
            continue
        # Several parts of ours in one layer of theirs lie side by side, each in columns of its own.
        down = torch.cat([update.down for update in inside])
        up = torch.zeros(stop - start, len(down))
        column = 0
        for update in inside:
            width = len(update.down)
            up[update.start - start : update.stop - start, column : column + width] = update.up
            column += width
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.float().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.contiguous()
        if len(down) != checkpoint.base.rank:
            ranks[module], alphas[module] = len(down), inside[0].scale * len(down)
    names = sorted({module.rsplit(".", 1)[-1] for module in _ranges(plan)})
    name = checkpoint.base.name
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if name.startswith(".") else name,
        "r": checkpoint.base.rank,
        "lora_alpha": checkpoint.base.alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": architecture.model_type == "gpt2",
        "inference_mode": True,
    }
    with publish_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
