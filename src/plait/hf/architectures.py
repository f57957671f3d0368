"""The decoder-only architectures of transformers that run in our backbone: what their `config.json` means, where their
tensors go, and the way back. An architecture is an entry of `ARCHITECTURES`; docs/how-to/huggingface.md says how
to add one.

Nothing here reads a weight: a configuration becomes a `TransformerConfig` and a plan of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plait.core.dist import DISTRIBUTION
from plait.core.errors import PlaitError
from plait.model.transformer import LayerType, TransformerConfig

Config = dict[str, Any]  # a config.json
Fields = dict[str, Any]  # of a TransformerConfig
Names = tuple[tuple[str, str], ...]  # (ours, theirs)


@dataclass(frozen=True)
class Biases:
    """Which projections of theirs have a bias."""

    qkv: bool = False
    attention_out: bool = False
    feed: bool = False


@dataclass(frozen=True)
class Stored:
    """A tensor as their files have it, and what makes it ours: `value + offset`, transposed where inputs come first."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    offset: float = 0.0


Layout = dict[str, list[Stored]]  # our tensor -> theirs, row on row; an empty list stands for zeros they do not store


@dataclass(frozen=True)
class Architecture:
    """How an architecture maps to the backbone."""

    model_type: str
    class_name: str
    read: Callable[[Config, Path], Fields]
    biases: Callable[[Config], Biases]
    write: Callable[[TransformerConfig], Config]  # what its config.json has beside what all have
    prefix: str = "model."
    tied: bool = False  # where config.json does not say
    fused: bool = False  # queries, keys and values are one tensor, and so are gate and up
    norm_offset: float = 0.0  # norms multiply by the weight plus this
    block_norms: Names = (("attention_norm", "input_layernorm"), ("feed_norm", "post_attention_layernorm"))


# --- what a config.json says --------------------------------------------------------------------------------------


class UnsupportedError(PlaitError):
    """A configuration that transformers may know and our backbone does not compute."""


def refuse(file: Path, what: str) -> UnsupportedError:
    """The error for a checkpoint that none of our architectures computes; `what` says why."""
    names = ", ".join(a.class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for a in _ALL)
    return UnsupportedError(
        f"{file}: {what}. Plait runs {names} itself; others work through {DISTRIBUTION}[huggingface]."
    )


def number(config: Config, key: str, file: Path, default: int | None = None) -> int:
    """A positive whole number. Raises PlaitError where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive whole number.")
    return value


def _layers(config: Config, key: str, file: Path) -> int:
    layers = number(config, key, file)
    if layers > 1024:
        raise PlaitError(f"{file}: {layers} layers cannot be meant.")
    return layers


@dataclass(frozen=True)
class Imported:
    """A configuration as ours."""

    architecture: Architecture
    backbone: TransformerConfig
    size: int  # of the vocabulary
    tied: bool  # whether one table reads and predicts
    biases: Biases


def imported(config: Config, file: Path) -> Imported:
    """What a `config.json` of transformers 4 or 5 describes.

    Raises PlaitError naming the file and the key for what our backbone does not do.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise refuse(file, f"unknown architecture {config.get('model_type')!r}")
    if config.get("quantization_config"):
        raise refuse(file, "quantization_config is set: quantised weights cannot be read")
    for key, required in [("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                        ("add_cross_attention", False), ("use_bidirectional_attention", False),
                        ("final_logit_softcapping", None), ("attn_logit_softcapping", None)]:  # fmt: skip
        if config.get(key) not in (None, required):
            raise refuse(file, f"{key} = {config[key]} is not supported")
    fields = architecture.read(config, file)
    if type(fields["norm_eps"]) is not float or not 0 < fields["norm_eps"] < 1:
        raise PlaitError(f"{file}: the norms' epsilon is {fields['norm_eps']!r}, and must lie between 0 and 1.")
    biases = architecture.biases(config)
    try:
        backbone = TransformerConfig.model_validate(
            {**fields, "qkv_bias": biases.qkv, "bias": biases.attention_out or biases.feed}
        )
    except ValidationError as error:
        raise PlaitError(f"{file} does not describe a model: {error.errors()[0]['msg']}.") from error
    tied = config.get("tie_word_embeddings")
    tied = architecture.tied if tied is None else bool(tied)
    return Imported(architecture, backbone, number(config, "vocab_size", file), tied, biases)


def _gpt2(config: Config, file: Path) -> Fields:
    width, heads = number(config, "n_embd", file), number(config, "n_head", file)
    activation = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(
        config.get("activation_function", "gelu_new")
    )
    if activation is None:
        raise refuse(file, f"activation_function = {config['activation_function']!r} is not supported")
    if width % heads:
        raise PlaitError(f"{file}: n_embd ({width}) must be a multiple of n_head ({heads}).")
    _layer_types(config, file, _layers(config, "n_layer", file))
    return {
        "width": width,
        "layers": _layers(config, "n_layer", file),
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // heads,
        "hidden": number(config, "n_inner", file, 4 * width),
        "max_length": number(config, "n_positions", file),
        "position": "learned",
        "norm": "layer",
        "activation": activation,
        "qk_norm": False,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _rotary(config: Config, file: Path, kv_heads: int | None = None, head_width: int | None = None) -> Fields:
    """What all but GPT-2 have; `kv_heads` and `head_width` are the class's own defaults where it has some."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise refuse(file, f"hidden_act = {activation!r} is not supported")
    return {"activation": "swiglu", **_shape(config, file, kv_heads, head_width), **_rope(config, file)}


def _shape(config: Config, file: Path, kv_heads: int | None, head_width: int | None) -> Fields:
    width, heads = number(config, "hidden_size", file), number(config, "num_attention_heads", file)
    return {
        "width": width,
        "layers": _layers(config, "num_hidden_layers", file),
        "heads": heads,
        "kv_heads": number(config, "num_key_value_heads", file, heads if kv_heads is None else kv_heads),
        "head_width": number(config, "head_dim", file, head_width or max(width // heads, 1)),
        "hidden": number(config, "intermediate_size", file),
        "max_length": number(config, "max_position_embeddings", file),
        "qk_norm": False,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
    }


def _layer_types(config: Config, file: Path, layers: int) -> list[LayerType] | None:
    """`layer_types` in our words; None where there are none."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    layer_types: dict[str, LayerType] = {"full_attention": "full", "sliding_attention": "sliding"}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in layer_types for kind in kinds):
        raise refuse(file, f"layer_types is {str(kinds)[:80]}; known are {layers} of {', '.join(layer_types)}")
    return [layer_types[kind] for kind in kinds]


def _windows(config: Config, file: Path, layers: int, sliding: list[LayerType]) -> Fields:
    """The windows of layers: of `layer_types`, else `sliding`. Empty where no layer has one."""
    kinds = _layer_types(config, file, layers) or sliding
    if "sliding" not in kinds:
        return {}
    return {"layer_types": kinds, "sliding_window": number(config, "sliding_window", file)}


def _llama(config: Config, file: Path) -> Fields:
    fields = _rotary(config, file)
    return {**fields, **_windows(config, file, fields["layers"], [])}


def _qwen(config: Config, file: Path) -> Fields:
    three = config["model_type"] == "qwen3"
    fields = _rotary(config, file, kv_heads=32, head_width=128 if three else None)
    fields["qk_norm"] = three
    if not config.get("use_sliding_window"):
        if "sliding" in (_layer_types(config, file, fields["layers"]) or []):
            raise refuse(file, "layer_types names sliding layers, and use_sliding_window is not set")
        return fields
    first = number({"max_window_layers": config.get("max_window_layers", 28) + 1}, "max_window_layers", file) - 1
    sliding: list[LayerType] = ["sliding" if layer >= first else "full" for layer in range(fields["layers"])]
    return {**fields, **_windows({"sliding_window": 4096, **config}, file, fields["layers"], sliding)}


def _mistral(config: Config, file: Path) -> Fields:
    fields = _rotary(config, file, kv_heads=8)
    if config.get("sliding_window", 4096) is None:
        return {**fields, **_windows(config, file, fields["layers"], [])}
    every: list[LayerType] = ["sliding"] * fields["layers"]
    return {**fields, **_windows({"sliding_window": 4096, **config}, file, fields["layers"], every)}


def _phi3(config: Config, file: Path) -> Fields:
    fields = _rotary(config, file)
    if config.get("sliding_window") is None:
        return fields
    every: list[LayerType] = ["sliding"] * fields["layers"]
    return {**fields, **_windows(config, file, fields["layers"], every)}


def _smollm3(config: Config, file: Path) -> Fields:
    fields = _rotary({"rope_theta": 2_000_000.0, **config}, file, kv_heads=4)
    layers = fields["layers"]
    uses_rope = config.get("no_rope_layers")  # 1 where a layer has rotary positions
    if uses_rope is None:
        interval = number(config, "no_rope_layer_interval", file, 4)
        uses_rope = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(uses_rope, list) or len(uses_rope) < layers or not set(uses_rope) <= {0, 1}:
        raise PlaitError(f"{file}: no_rope_layers must hold {layers} times 0 or 1.")
    without = [layer for layer in range(layers) if not uses_rope[layer]]
    sliding: list[LayerType] = ["full"] * layers
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        sliding = ["sliding" if layer in without else "full" for layer in range(layers)]
    return {**fields, "layers_without_rotary": without, **_windows(config, file, layers, sliding)}


def _gemma3(config: Config, file: Path) -> Fields:
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise refuse(file, f"hidden_activation = {activation!r} is not supported")
    fields = _shape(config, file, 4, 256)
    if config.get("query_pre_attn_scalar", fields["head_width"]) != fields["head_width"]:
        raise refuse(file, f"query_pre_attn_scalar = {config['query_pre_attn_scalar']} is not the head's width")
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    full = {"rope_theta": 1_000_000.0, **config, "rope_parameters": rope.get("full_attention")}
    if _rope({**config, "rope_parameters": local, "rope_scaling": None}, file)["rope_scaling"] is not None:
        raise refuse(file, "scaled rotary positions of sliding layers are not supported")
    layers, pattern = fields["layers"], number(config, "sliding_window_pattern", file, 6)
    sliding: list[LayerType] = ["sliding" if (layer + 1) % pattern else "full" for layer in range(layers)]
    return {
        **fields,
        **_rope(full, file),
        **_windows({"sliding_window": 4096, **config}, file, layers, sliding),
        "local_rope_theta": float(local.get("rope_theta", 10_000.0)),
        "activation": "geglu_tanh",
        "qk_norm": True,
        "post_norm": True,
        "embed_scale": math.sqrt(fields["width"]),
    }


# What each kind of scaled rotary positions needs.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("original_max_position_embeddings", "attention_factor"),
}


def _rope(config: Config, file: Path) -> Fields:
    """Theta and scaling, from `rope_parameters` (transformers 5) or the two older keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise PlaitError(f"{file}: rope_parameters must be an object.")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in _ROPE or any(isinstance(value, dict) for value in rope.values()):
        raise refuse(file, f"rotary positions of type {kind!r} are not supported; known are {', '.join(_ROPE)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise refuse(file, "partial_rotary_factor is not supported")
    longest = config.get("max_position_embeddings")
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    rope = {**rope, "original_max_position_embeddings": trained}
    if kind == "yarn":
        rope = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
        rope["attention_factor"] = _yarn_factor(rope, file)
    if kind == "longrope":
        rope["attention_factor"] = _longrope_factor(rope, longest, file)
    numbers: dict[str, Any] = {"rope_theta": theta, **{key: rope.get(key) for key in _ROPE[kind]}}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive number.")
    scaling = {"rope_type": kind, **{key: rope[key] for key in _ROPE[kind]}}
    if kind == "yarn":
        scaling["truncate"] = int(rope.get("truncate", True))
    if kind == "longrope":
        scaling |= {key: _factors(rope, key, config, file) for key in ("short_factor", "long_factor")}
    return {"rope_theta": float(numbers["rope_theta"]), "rope_scaling": None if kind == "default" else scaling}


def _factors(rope: Config, key: str, config: Config, file: Path) -> list[float]:
    """LongRoPE's divisors of the frequencies, one a pair of a head's width."""
    values, heads = rope.get(key), number(config, "num_attention_heads", file)
    width = number(config, "head_dim", file, max(number(config, "hidden_size", file) // heads, 1))
    good = isinstance(values, list) and all(type(v) in (int, float) and 0 < v < math.inf for v in values)
    if not good or not isinstance(values, list) or len(values) != width // 2:
        raise PlaitError(f"{file}: {key} of rope_parameters must hold {width // 2} positive numbers.")
    return [float(value) for value in values]


def _longrope_factor(rope: Config, longest: object, file: Path) -> float:
    """What LongRoPE multiplies turned queries and keys by."""
    if isinstance(rope.get("attention_factor"), int | float):
        return float(rope["attention_factor"])
    trained: object = rope["original_max_position_embeddings"]
    if type(trained) is not int or type(longest) is not int or trained < 2:
        raise PlaitError(f"{file}: original_max_position_embeddings is {trained!r}, and must be a whole number.")
    factor = float(rope.get("factor") or longest / trained)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _yarn_factor(rope: Config, file: Path) -> float:
    """What YaRN multiplies turned queries and keys by: as given, or from the factor and its two scales."""
    numbers: Config = {key: rope.get(key) for key in ("factor", "attention_factor", "mscale", "mscale_all_dim")}
    for key, value in numbers.items():
        good = isinstance(value, int | float) and 0 <= value < math.inf
        if not good and (value is not None or key == "factor"):
            raise PlaitError(f"{file}: {key} is {value!r}, and must be a positive number.")
    if numbers["attention_factor"] is not None:
        return float(numbers["attention_factor"])
    above, below = 1.0, 0.0
    if numbers["mscale"] and numbers["mscale_all_dim"]:
        above, below = numbers["mscale"], numbers["mscale_all_dim"]
    growth = 0.1 * math.log(max(numbers["factor"], 1))
    return float((above * growth + 1) / (below * growth + 1))


# --- and back -----------------------------------------------------------------------------------------------------


def _write_gpt2(c: TransformerConfig) -> Config:
    return {
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.max_length,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[c.activation],
        "layer_norm_epsilon": c.norm_eps,
        "attn_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
    }


def _write_rotary(c: TransformerConfig) -> Config:
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": rope,
        # The same as readers before transformers 5 want it.
        "rope_theta": c.rope_theta,
        **({"rope_scaling": c.rope_scaling} if c.rope_scaling else {}),
    }


def _written_types(c: TransformerConfig) -> Config:
    """The windows of layers as Qwen, SmolLM3 and Gemma have them."""
    kinds = {"full": "full_attention", "sliding": "sliding_attention"}
    return {"layer_types": [kinds[c.layer_type(i)] for i in range(c.layers)], "sliding_window": c.sliding_window}


def _write_llama(c: TransformerConfig) -> Config:
    return {**_write_rotary(c), "attention_bias": c.qkv_bias or c.bias, "mlp_bias": c.bias}


def _write_qwen(c: TransformerConfig) -> Config:
    config = _write_rotary(c)
    if c.qk_norm:
        config["attention_bias"] = c.qkv_bias or c.bias
    if c.layer_types is not None:
        config |= {**_written_types(c), "use_sliding_window": True}
    return config


def _write_mistral(c: TransformerConfig) -> Config:
    return {**_write_rotary(c), "sliding_window": c.sliding_window}


def _write_phi3(c: TransformerConfig) -> Config:
    config = {**_write_rotary(c), "sliding_window": c.sliding_window}
    config |= {"original_max_position_embeddings": c.trained_length or c.max_length}
    config |= {"resid_pdrop": c.dropout, "embd_pdrop": 0.0}
    return config


def _write_smollm3(c: TransformerConfig) -> Config:
    uses_rope = [int(layer not in c.layers_without_rotary) for layer in range(c.layers)]
    config = {
        **_write_rotary(c),
        "no_rope_layers": uses_rope,
        "attention_bias": c.qkv_bias or c.bias,
        "mlp_bias": c.bias,
    }
    if c.layer_types is not None:
        config |= {**_written_types(c), "use_sliding_window": True}
    return config


def _write_gemma3(c: TransformerConfig) -> Config:
    config = {**_write_rotary(c), **_written_types(c)}
    local = {"rope_type": "default", "rope_theta": c.local_rope_theta}
    del config["hidden_act"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "rope_local_base_freq": c.local_rope_theta,
        "query_pre_attn_scalar": c.head_width,
    }


# --- tensors ------------------------------------------------------------------------------------------------------


def layout(architecture: Architecture, c: TransformerConfig, size: int, tied: bool, biases: Biases) -> Layout:
    """Where every tensor of our backbone and its tables of `size` ids lies in their files."""
    plan = _gpt2_layout(c, size) if architecture.model_type == "gpt2" else _rotary_layout(architecture, c, size, biases)
    if not tied:
        plan["lm_head.free"] = [Stored("lm_head.weight", (size, c.width))]
    return plan


def _gpt2_layout(c: TransformerConfig, size: int) -> Layout:
    plan: Layout = {}
    for i in range(c.layers):
        plait_prefix, hf_prefix = f"backbone.blocks.{i}.", f"transformer.h.{i}."
        for part, name, inputs, outputs in [
            ("qkv", "attn.c_attn", c.width, 3 * c.width),
            ("attention_out", "attn.c_proj", c.width, c.width),
            ("feed_in", "mlp.c_fc", c.width, c.hidden),
            ("feed_out", "mlp.c_proj", c.hidden, c.width),
        ]:
            plan[f"{plait_prefix}{part}.weight"] = [
                Stored(f"{hf_prefix}{name}.weight", (inputs, outputs), transposed=True)
            ]
            plan[f"{plait_prefix}{part}.bias"] = [Stored(f"{hf_prefix}{name}.bias", (outputs,))]
        for part, name in [("attention_norm", "ln_1"), ("feed_norm", "ln_2")]:
            for kind in ("weight", "bias"):
                plan[f"{plait_prefix}{part}.{kind}"] = [Stored(f"{hf_prefix}{name}.{kind}", (c.width,))]
    for kind in ("weight", "bias"):
        plan[f"backbone.final_norm.{kind}"] = [Stored(f"transformer.ln_f.{kind}", (c.width,))]
    plan["backbone.positions"] = [Stored("transformer.wpe.weight", (c.max_length, c.width))]
    plan["token_embedding.free"] = [Stored("transformer.wte.weight", (size, c.width))]
    return plan


@dataclass(frozen=True)
class _LinearTensors:
    """One of our four matrices of a block, and the ones of theirs that it is made of: (name, outputs)."""

    ours: str
    theirs: list[tuple[str, int]]
    inputs: int
    bias: bool


def _linear_tensors(architecture: Architecture, c: TransformerConfig, biases: Biases) -> list[_LinearTensors]:
    queries, keys = c.heads * c.head_width, c.kv_heads * c.head_width
    qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
    feed = [("mlp.gate_proj", c.hidden), ("mlp.up_proj", c.hidden)]
    if architecture.fused:
        qkv, feed = [("self_attn.qkv_proj", queries + 2 * keys)], [("mlp.gate_up_proj", 2 * c.hidden)]
    return [
        _LinearTensors("qkv", qkv, c.width, biases.qkv),
        _LinearTensors("attention_out", [("self_attn.o_proj", c.width)], queries, biases.attention_out),
        _LinearTensors("feed_in", feed, c.width, biases.feed),
        _LinearTensors("feed_out", [("mlp.down_proj", c.width)], c.hidden, biases.feed),
    ]


def _rotary_layout(architecture: Architecture, c: TransformerConfig, size: int, biases: Biases) -> Layout:
    plan: Layout = {}
    offset = architecture.norm_offset
    for i in range(c.layers):
        plait_prefix, hf_prefix = f"backbone.blocks.{i}.", f"model.layers.{i}."
        for product in _linear_tensors(architecture, c, biases):
            plan[f"{plait_prefix}{product.ours}.weight"] = [
                Stored(f"{hf_prefix}{name}.weight", (outputs, product.inputs)) for name, outputs in product.theirs
            ]
            if product.bias:
                plan[f"{plait_prefix}{product.ours}.bias"] = [
                    Stored(f"{hf_prefix}{name}.bias", (outputs,)) for name, outputs in product.theirs
                ]
            elif c.bias and product.ours != "qkv":
                plan[f"{plait_prefix}{product.ours}.bias"] = []
        for part, name in architecture.block_norms:
            plan[f"{plait_prefix}{part}.weight"] = [Stored(f"{hf_prefix}{name}.weight", (c.width,), offset=offset)]
        for part in ("q_norm", "k_norm") if c.qk_norm else ():
            plan[f"{plait_prefix}{part}.weight"] = [
                Stored(f"{hf_prefix}self_attn.{part}.weight", (c.head_width,), offset=offset)
            ]
    plan["backbone.final_norm.weight"] = [Stored("model.norm.weight", (c.width,), offset=offset)]
    plan["token_embedding.free"] = [Stored("model.embed_tokens.weight", (size, c.width))]
    return plan


# --- the architectures --------------------------------------------------------------------------------------------


def _told_biases(config: Config) -> Biases:
    attention = bool(config.get("attention_bias"))
    return Biases(attention, attention, bool(config.get("mlp_bias")))


def _no_biases(config: Config) -> Biases:
    return Biases()


_GEMMA_NORMS = (
    ("attention_norm", "input_layernorm"), ("attention_post_norm", "post_attention_layernorm"),
    ("feed_norm", "pre_feedforward_layernorm"), ("feed_post_norm", "post_feedforward_layernorm"),
)  # fmt: skip
_ALL = (
    Architecture(
        "gpt2", "GPT2LMHeadModel", _gpt2, lambda _: Biases(True, True, True), _write_gpt2, prefix="transformer.",
        tied=True,
    ),
    Architecture("llama", "LlamaForCausalLM", _llama, _told_biases, _write_llama),
    Architecture("mistral", "MistralForCausalLM", _mistral, _no_biases, _write_mistral),
    Architecture("phi3", "Phi3ForCausalLM", _phi3, _no_biases, _write_phi3, fused=True),
    Architecture("qwen2", "Qwen2ForCausalLM", _qwen, lambda _: Biases(qkv=True), _write_qwen),
    Architecture("qwen3", "Qwen3ForCausalLM", _qwen, _told_biases, _write_qwen),
    Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, _told_biases, _write_smollm3, tied=True),
    Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma3, _told_biases, _write_gemma3, tied=True, norm_offset=1.0,
        block_norms=_GEMMA_NORMS,
    ),
)  # fmt: skip
ARCHITECTURES = {architecture.model_type: architecture for architecture in _ALL}
