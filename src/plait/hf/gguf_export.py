"""A model as a GGUF file, for llama.cpp and its kin, written through the `gguf` package: weights in F16, norms and
biases in F32, a byte-level BPE tokenizer, the chat template and the ids that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import publish_folder
from plait.hf.architectures import Architecture, layout
from plait.hf.export import (
    architecture_of,
    biases_of,
    ends_of,
    exported_size,
    extended_tokenizer,
    must_be_free,
    tensors_of,
)
from plait.model.checkpoint import Checkpoint
from plait.model.transformer import TransformerConfig

FILE = "model.gguf"
WRITTEN = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # ours -> theirs
NORMAL, CONTROL = 1, 3  # types of tokens


def export_gguf(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `model.gguf` into a new folder. Raises PlaitError where the architecture, its positions or its tokenizer
    have no form there that is written."""
    must_be_free(folder)
    gguf: Any = import_extra("gguf", "huggingface", "Export to GGUF")
    architecture, config = architecture_of(checkpoint.model), checkpoint.model.config.backbone
    if architecture.model_type not in WRITTEN:
        raise _refused(f"its architecture is {architecture.model_type}; written are {', '.join(WRITTEN)}")
    if config.rope_scaling is not None or config.layer_types is not None:
        raise _refused("its rotary positions are scaled, or layers have windows")
    tokenizer, names = extended_tokenizer(checkpoint)
    with publish_folder(folder) as temporary:
        writer = gguf.GGUFWriter(temporary / FILE, WRITTEN[architecture.model_type])
        writer.add_file_type(1)  # mostly F16
        write_shape(writer, config, architecture.model_type)
        _write_tokenizer(writer, tokenizer, checkpoint, names)
        _write_tensors(writer, gguf, checkpoint, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _refused(why: str) -> PlaitError:
    return PlaitError(f"This model cannot be written as GGUF: {why}. --to transformers writes it.")


def write_shape(writer: Any, config: TransformerConfig, model_type: str) -> None:
    """The sizes of a network into a `gguf.GGUFWriter`; `model_type` is transformers' name of its architecture."""
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    if model_type == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_width)


def _write_tokenizer(writer: Any, tokenizer_json: str, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    content = json.loads(tokenizer_json)
    if content["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(content.get("decoder")):
        raise _refused("its tokenizer is no byte-level BPE")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    size = exported_size(checkpoint.model.vocabulary)
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    by_id = {id: token for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(json.dumps(content.get("pre_tokenizer"))))
    writer.add_token_list([by_id.get(id, f"[UNUSED{id}]") for id in range(size)])
    writer.add_token_types([CONTROL if id in special or id not in by_id else NORMAL for id in range(size)])
    writer.add_token_merges(merges)
    ends = ends_of(checkpoint)
    ends = ends if isinstance(ends, list) else [ends]
    turn_end = checkpoint.text.settings.get("eos_token")
    turn_id = None if turn_end is None else tokenizer.token_to_id(turn_end)
    first = turn_id if turn_id in ends else ends[0]
    writer.add_eos_token_id(first)
    if further_ends := [id for id in ends if id != first]:
        writer.add_eot_token_id(further_ends[0])
    writer.add_add_bos_token(bool(checkpoint.text.start) and not checkpoint.model.vocabulary.columns)
    if checkpoint.text.start:
        writer.add_bos_token_id(checkpoint.text.start[0])
    if checkpoint.text.chat_template is not None:
        writer.add_chat_template(checkpoint.text.chat_template)


def _splitting(pre_tokenizer: str) -> str:
    """llama.cpp's name of the way in which texts are cut before merges."""
    if "{1,3}" in pre_tokenizer:
        return "llama-bpe"
    if "(?i:'s" in pre_tokenizer:
        return "qwen2"
    return "gpt-2"


def _write_tensors(writer: Any, gguf: Any, checkpoint: Checkpoint, architecture: Architecture) -> None:
    model, config = checkpoint.model, checkpoint.model.config.backbone
    size = exported_size(model.vocabulary)
    gguf_architecture = WRITTEN[architecture.model_type]
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_architecture)
    tensor_names = gguf.get_tensor_name_map(code, config.layers)
    values = tensors_of(model, architecture, size)
    plan = layout(architecture, config, size, model.config.tied, biases_of(config, architecture))
    for part in [part for parts in plan.values() for part in parts]:
        name = tensor_names.get_name(part.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise _refused(f"there is no name for {part.name}")
        value = values.pop(part.name)
        value = value.t() if part.transposed else value
        if gguf_architecture == "llama" and ".q_proj." in part.name:
            value = _turned(value, config.heads)
        if gguf_architecture == "llama" and ".k_proj." in part.name:
            value = _turned(value, config.kv_heads)
        kind = np.float16 if value.ndim == 2 else np.float32
        writer.add_tensor(name, np.ascontiguousarray(value.numpy(), kind))


def _turned(value: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp turns them: neighbours where transformers turns halves."""
    width = value.shape[0] // heads
    return value.view(heads, 2, width // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
