"""Text encoders as sentence-transformers runs them: a network of transformers, a way of pooling, sometimes a dense
layer, in the order of the folder's `modules.json`.

Shapes: N texts, L tokens, H width of the network, E width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.hub import explained, quiet

BATCH = 64  # texts at a time
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions count from the padding id
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "Tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU}


@dataclass(frozen=True)
class Recipe:
    """What a folder says beside its network."""

    pooling: tuple[str, ...] = ("mean",)  # their results side by side
    longest: int | None = None  # tokens of a text, its ends among them
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)  # name -> what is put in front of a text
    default_prompt: str | None = None
    dense: tuple[Path, ...] = ()  # folders of dense layers


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a folder; without sentence-transformers' files the mean over a text's tokens.

    Raises PlaitError naming the file that asks for what is not done here.
    """
    modules = folder / "modules.json"
    parts = read_json(modules) if modules.is_file() else []
    paths = [(str(part.get("type", "")).rsplit(".", 1)[-1], folder / str(part.get("path", ""))) for part in parts]
    if unknown := [kind for kind, _ in paths if kind not in ("Transformer", "Pooling", "Normalize", "Dense")]:
        raise PlaitError(
            f"{modules} names a module of type {unknown[0]}; known are Transformer, Pooling, Dense, Normalize."
        )
    pooling = next((path for kind, path in paths if kind == "Pooling"), folder / "1_Pooling") / "config.json"
    settings = _optional(folder / "sentence_bert_config.json")
    prompts = _optional(folder / "config_sentence_transformers.json")
    return Recipe(
        pooling=_pooling(pooling),
        longest=settings.get("max_seq_length"),
        lower=bool(settings.get("do_lower_case")),
        prompts={name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)},
        default_prompt=prompts.get("default_prompt_name"),
        dense=tuple(path for kind, path in paths if kind == "Dense"),
    )


def _optional(file: Path) -> dict[str, Any]:
    value = read_json(file) if file.is_file() else {}
    if not isinstance(value, dict):
        raise PlaitError(f"{file} must hold an object.")
    return value


def _pooling(file: Path) -> tuple[str, ...]:
    settings = _optional(file)
    if isinstance(settings.get("pooling_mode"), str):  # as sentence-transformers 5 writes it
        modes: tuple[str, ...] = (settings["pooling_mode"],)
    else:
        modes = tuple(name for key, name in _POOLING.items() if settings.get(key))
    if unknown := [mode for mode in modes if mode not in _POOLING.values()]:
        raise PlaitError(f"{file}: pooling_mode {unknown[0]!r} is not known. Known are {', '.join(_POOLING.values())}.")
    return modes or ("mean",)


class SentenceEncoder:
    """Texts to embeddings of unit length."""

    def __init__(self, folder: Path, network: nn.Module, tokenizer: Any, device: Device) -> None:
        self.network, self.tokenizer, self.device = network, tokenizer, device
        self.recipe = read_recipe(folder)
        self.dense = nn.ModuleList(_dense(path) for path in self.recipe.dense).to(device.torch).eval()
        config: Any = network.config
        places = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        places -= 2 if config.model_type in OFFSET else 0
        self.longest = min(self.recipe.longest or places, places, tokenizer.model_max_length)

    def embed(self, texts: list[str], prompt: str | None = None, batch_size: int = BATCH) -> np.ndarray:
        """(N, E) float32. Of a text longer than `longest` tokens the beginning counts, as in sentence-transformers.

        `prompt` is the name of one of the folder's prompts, as "query" or "passage"; its default where left out.
        """
        name = self.recipe.default_prompt if prompt is None else prompt
        if name is not None and name not in self.recipe.prompts:
            prompt_names = ", ".join(self.recipe.prompts) or "none"
            raise PlaitError(f"This model has no prompt '{name}'. Its prompts are {prompt_names}.")
        before = "" if name is None else self.recipe.prompts[name]
        texts = [before + text.strip() for text in texts]
        texts = [text.lower() for text in texts] if self.recipe.lower else texts
        ids = self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = self.tokenizer(
                [texts[place] for place in places], padding=True, truncation=True, max_length=self.longest,
                return_tensors="pt",
            )  # fmt: skip
            for place, vector in zip(places, self._batch(dict(inputs)), strict=True):
                vectors[place] = vector
        if not vectors:
            return np.zeros((0, 0), np.float32)
        return np.asarray(torch.stack(vectors).numpy(), np.float32)

    def _batch(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode(), self.device.autocast():
            inputs = {name: tensor.to(self.device.torch) for name, tensor in inputs.items()}
            hidden = self.network(**inputs).last_hidden_state.float()
            pooled = torch.cat([pool(hidden, inputs["attention_mask"], mode) for mode in self.recipe.pooling], -1)
            for layer in self.dense:
                pooled = layer(pooled)
        return nn.functional.normalize(pooled.float(), dim=-1).cpu()


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Hidden states (N, L, H) of the tokens that `mask` (N, L) marks to one vector each, (N, H)."""
    weight = mask.to(hidden.dtype)[..., None]
    if mode == "cls":
        first = mask.int().argmax(1)  # padding may stand on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if mode == "max":
        return hidden.masked_fill(weight == 0, -1e9).amax(1)
    if mode == "weightedmean":
        weight = weight * torch.arange(1, mask.shape[1] + 1, device=hidden.device)[:, None]
    count = weight.sum(1).clamp(min=1e-9)
    return (hidden * weight).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _dense(folder: Path) -> nn.Module:
    """A dense layer with its activation. Raises PlaitError where it cannot be read."""
    settings = _optional(folder / "config.json")
    activation = str(settings.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise PlaitError(f"{folder / 'config.json'}: activation_function {activation!r} is not known.")
    if not (folder / "model.safetensors").is_file():
        raise PlaitError(f"{folder / 'model.safetensors'} is missing. Fetch the model again.")
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    with explained(folder), quiet():
        tensors = {name.removeprefix("linear."): t for name, t in load_file(folder / "model.safetensors").items()}
        linear.load_state_dict(tensors)
    return nn.Sequential(linear.requires_grad_(False), _ACTIVATIONS[activation]())
