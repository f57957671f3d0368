"""Checkpoints of the Hugging Face ecosystem as our own: GPT-2, Llama and Qwen3 causal language models.

Everything that can be wrong is found from the headers before a weight is read, so a bad folder fails fast and whole.
No transformers here: a checkpoint is JSON and safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.core.dist import DISTRIBUTION
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.hub import find, no_safetensors, other_weights
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model import checkpoint as own
from plait.model.checkpoint import Checkpoint, GenerationConfig
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig, rotary_frequencies

FAMILIES = ("gpt2", "llama", "qwen3")
_BUFFERS = re.compile(
    r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$"
)  # older files keep constants among the weights
# What each kind of scaled rotary positions needs.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


# --- configuration ----------------------------------------------------------------------------------------------


def _refuse(file: Path, what: str) -> PlaitError:
    known = "GPT-2, Llama and Qwen3 language models"
    return PlaitError(
        f"{file}: {what}. Plait trains and runs {known} itself; others work through {DISTRIBUTION}[huggingface]."
    )


def _number(config: dict[str, Any], key: str, file: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive whole number.")
    return value


def backbone_config(config: dict[str, Any], file: Path) -> tuple[TransformerConfig, int, bool]:
    """(backbone, vocabulary size, tied head) from a `config.json` of transformers 4 or 5.

    Raises PlaitError naming the file and the key for what our backbone does not do.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _refuse(file, f"unknown architecture {family!r}")
    if config.get("quantization_config"):
        raise _refuse(file, "quantization_config is set: quantised weights cannot be read")
    for key, wanted in [("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                        ("add_cross_attention", False), ("use_sliding_window", False)]:  # fmt: skip
        if config.get(key, wanted) != wanted:
            raise _refuse(file, f"{key} = {config[key]} is not supported")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _refuse(file, f"layer_types is {str(kinds)[:80]}; only full attention is supported")
    if family == "gpt2":
        shape = _gpt2(config, file)
    else:
        shape = _llama(config, file)
    if shape["layers"] > 1024:
        raise PlaitError(f"{file}: {shape['layers']} layers cannot be meant.")
    if type(shape["norm_eps"]) is not float or not 0 < shape["norm_eps"] < 1:
        raise PlaitError(f"{file}: the norms' epsilon is {shape['norm_eps']!r}, and must lie between 0 and 1.")
    try:
        backbone = TransformerConfig.model_validate(shape)
    except ValidationError as error:
        raise PlaitError(f"{file} does not describe a model: {error.errors()[0]['msg']}.") from error
    return backbone, _number(config, "vocab_size", file), bool(config.get("tie_word_embeddings", family == "gpt2"))


def _gpt2(config: dict[str, Any], file: Path) -> dict[str, Any]:
    width, heads = _number(config, "n_embd", file), _number(config, "n_head", file)
    activation = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(
        config.get("activation_function", "gelu_new")
    )
    if activation is None:
        raise _refuse(file, f"activation_function = {config['activation_function']!r} is not supported")
    if width % heads:
        raise PlaitError(f"{file}: n_embd ({width}) must be a multiple of n_head ({heads}).")
    return {
        "width": width,
        "layers": _number(config, "n_layer", file),
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // heads,
        "hidden": _number(config, "n_inner", file, 4 * width),
        "max_length": _number(config, "n_positions", file),
        "position": "learned",
        "norm": "layer",
        "activation": activation,
        "qk_norm": False,
        "qkv_bias": True,
        "bias": True,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _llama(config: dict[str, Any], file: Path) -> dict[str, Any]:
    if config.get("hidden_act", "silu") != "silu":
        raise _refuse(file, f"hidden_act = {config['hidden_act']!r} is not supported")
    width, heads = _number(config, "hidden_size", file), _number(config, "num_attention_heads", file)
    qwen = config["model_type"] == "qwen3"
    attention_bias = bool(config.get("attention_bias"))
    theta, scaling = _rope(config, file)
    return {
        "width": width,
        "layers": _number(config, "num_hidden_layers", file),
        "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads", file, 32 if qwen else heads),
        "head_width": _number(config, "head_dim", file, 128 if qwen else max(width // heads, 1)),
        "hidden": _number(config, "intermediate_size", file),
        "max_length": _number(config, "max_position_embeddings", file),
        "qk_norm": qwen,
        "qkv_bias": attention_bias,
        "bias": attention_bias or bool(config.get("mlp_bias")),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def _rope(config: dict[str, Any], file: Path) -> tuple[float, dict[str, float | int | str] | None]:
    """(theta, the scaling or None), from `rope_parameters` (transformers 5) or the two older keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise PlaitError(f"{file}: rope_parameters must be an object.")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE or any(isinstance(value, dict) for value in rope.values()):
        raise _refuse(file, f"rotary positions of type {kind!r} are not supported; known are {', '.join(_ROPE)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refuse(file, "partial_rotary_factor is not supported")
    longest = config.get("max_position_embeddings")
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    rope = {**rope, "original_max_position_embeddings": trained}
    if kind == "yarn":
        rope = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
        rope["attention_factor"] = _attention_factor(rope, file)
    numbers = {"rope_theta": theta, **{key: rope.get(key) for key in _ROPE[kind]}}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive number.")
    scaling = {"rope_type": kind, **{key: rope[key] for key in _ROPE[kind]}}
    if kind == "yarn":
        scaling["truncate"] = int(rope.get("truncate", True))
    return float(theta), None if kind == "default" else scaling


def _attention_factor(rope: dict[str, Any], file: Path) -> float:
    """What YaRN multiplies rotated queries and keys by: as given, or from the factor and its two scales."""
    numbers: dict[str, Any] = {key: rope.get(key) for key in ("factor", "attention_factor", "mscale", "mscale_all_dim")}
    for key, value in numbers.items():
        if (value is not None or key == "factor") and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive number.")
    if numbers["attention_factor"] is not None:
        return float(numbers["attention_factor"])
    above, below = 1.0, 0.0
    if numbers["mscale"] and numbers["mscale_all_dim"]:
        above, below = numbers["mscale"], numbers["mscale_all_dim"]
    growth = 0.1 * math.log(max(numbers["factor"], 1))
    return float((above * growth + 1) / (below * growth + 1))


# --- weights ----------------------------------------------------------------------------------------------------

Part = tuple[str, tuple[int, ...]]  # a tensor of theirs and its shape


def layout(
    family: str, config: TransformerConfig, vocabulary: int, tied: bool, attention_bias: bool, mlp_bias: bool
) -> dict[str, list[Part]]:
    """Our tensor -> theirs, to be stacked row on row; an empty list stands for zeros that they do not store.

    GPT-2's weights lie transposed inside the blocks: inputs first.
    """
    c, found = config, dict[str, list[Part]]()
    if family == "gpt2":
        for i in range(c.layers):
            ours, theirs = f"backbone.blocks.{i}.", f"transformer.h.{i}."
            for part, name, inputs, outputs in [
                ("qkv", "attn.c_attn", c.width, 3 * c.width),
                ("attention_out", "attn.c_proj", c.width, c.width),
                ("feed_in", "mlp.c_fc", c.width, c.hidden),
                ("feed_out", "mlp.c_proj", c.hidden, c.width),
            ]:
                found[f"{ours}{part}.weight"] = [(f"{theirs}{name}.weight", (inputs, outputs))]
                found[f"{ours}{part}.bias"] = [(f"{theirs}{name}.bias", (outputs,))]
            for part, name in [("attention_norm", "ln_1"), ("feed_norm", "ln_2")]:
                for kind in ("weight", "bias"):
                    found[f"{ours}{part}.{kind}"] = [(f"{theirs}{name}.{kind}", (c.width,))]
        for kind in ("weight", "bias"):
            found[f"backbone.final_norm.{kind}"] = [(f"transformer.ln_f.{kind}", (c.width,))]
        found["backbone.positions"] = [("transformer.wpe.weight", (c.max_length, c.width))]
        found["token_embedding.free"] = [("transformer.wte.weight", (vocabulary, c.width))]
    else:
        queries, keys = c.heads * c.head_width, c.kv_heads * c.head_width
        for i in range(c.layers):
            ours, theirs = f"backbone.blocks.{i}.", f"model.layers.{i}."
            for part, names, inputs, bias in [
                ("qkv", [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
                 c.width, attention_bias),
                ("attention_out", [("self_attn.o_proj", c.width)], queries, attention_bias),
                ("feed_in", [("mlp.gate_proj", c.hidden), ("mlp.up_proj", c.hidden)], c.width, mlp_bias),
                ("feed_out", [("mlp.down_proj", c.width)], c.hidden, mlp_bias),
            ]:  # fmt: skip
                found[f"{ours}{part}.weight"] = [(f"{theirs}{name}.weight", (out, inputs)) for name, out in names]
                if bias:
                    found[f"{ours}{part}.bias"] = [(f"{theirs}{name}.bias", (out,)) for name, out in names]
                elif c.bias and part != "qkv":
                    found[f"{ours}{part}.bias"] = []
            found[f"{ours}attention_norm.weight"] = [(f"{theirs}input_layernorm.weight", (c.width,))]
            found[f"{ours}feed_norm.weight"] = [(f"{theirs}post_attention_layernorm.weight", (c.width,))]
            if c.qk_norm:
                for part in ("q_norm", "k_norm"):
                    found[f"{ours}{part}.weight"] = [(f"{theirs}self_attn.{part}.weight", (c.head_width,))]
        found["backbone.final_norm.weight"] = [("model.norm.weight", (c.width,))]
        found["token_embedding.free"] = [("model.embed_tokens.weight", (vocabulary, c.width))]
    if not tied:
        found["lm_head.free"] = [("lm_head.weight", (vocabulary, c.width))]
    return found


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

    def check(self, wanted: Iterable[Part]) -> None:
        """Raises PlaitError where a tensor is missing, too many, of another shape or not of floats."""
        shapes = dict(wanted)
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


def _fold(tensors: dict[str, Tensor], backbone: TransformerConfig) -> TransformerConfig:
    """YaRN's attention factor into what makes queries and keys, so that rotation alone remains."""
    scaling = backbone.rope_scaling
    if scaling is None or scaling.get("attention_factor", 1.0) == 1.0:
        return backbone
    factor, rows = float(scaling["attention_factor"]), (backbone.heads + backbone.kv_heads) * backbone.head_width
    for name, tensor in tensors.items():
        if backbone.qk_norm and name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] = tensor * factor
        elif not backbone.qk_norm and ".qkv." in name:
            tensors[name] = torch.cat((tensor[:rows] * factor, tensor[rows:]))
    return backbone.model_copy(update={"rope_scaling": {**scaling, "attention_factor": 1.0}})


def load(name_or_folder: str | Path, device: torch.device | None = None) -> Checkpoint:
    """A GPT-2, Llama or Qwen3 language model as a Plait checkpoint that reads and writes text, in fp32.

    The vocabulary is theirs and ends with their end token; our own end and padding rows after it are zero and unused.
    Raises PlaitError naming the file, key or tensor where the model cannot be found, trusted or represented.
    """
    folder = find(name_or_folder)
    file, advice = folder / "config.json", folder / "generation_config.json"
    config = _object(file)
    if config.get("model_type") == "plait":
        return own.load(folder, device)
    backbone, size, tied = backbone_config(config, file)
    advised = _object(advice) if advice.is_file() else {}
    generation, ends = _sampling(advised, advice), _ends(config, advised, size, folder)
    family = config["model_type"]
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    plan = layout(family, backbone, size, tied, *biases)
    weights = _Weights(folder, "transformer." if family == "gpt2" else "model.")
    head = "lm_head.weight"
    copied = tied and head in weights.files  # a tied head may be stored twice
    weights.check([part for parts in plan.values() for part in parts] + ([(head, (size, backbone.width))] * copied))
    text = _read_text(folder, size)
    end, more = (ends[0], ends[1:] or None) if ends else (None, None)
    vocabulary = Vocabulary(text=size, columns={}, levels={}, closers=[], end_id=end, more_ends=more)

    def build(backbone: TransformerConfig) -> Multimodal:
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            return Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=tied))

    tensors = {}
    for name, wanted in build(backbone).state_dict().items():
        parts = [weights.read(part) for part, _ in plan[name]] or [torch.zeros(wanted.shape)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if family == "gpt2" and name.startswith("backbone.blocks.") and value.ndim == 2:
            value = value.t().contiguous()
        if name.endswith(".free"):
            value = F.pad(value, (0, 0, 0, vocabulary.size - size))
        tensors[name] = value
    if copied and not torch.equal(weights.read(head), tensors["token_embedding.free"][:size]):
        raise PlaitError(f"{folder} has a {head} of its own, though config.json says tie_word_embeddings.")
    backbone = _fold(tensors, backbone)
    model = build(backbone)
    model.load_state_dict(tensors, assign=True)
    if backbone.position == "rotary":
        model.backbone.frequencies = rotary_frequencies(backbone)
    model.eval()
    if device is not None:
        model.to(device)
    return Checkpoint(model, text, generation=generation, training={"imported from": str(name_or_folder)})
