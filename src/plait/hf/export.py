"""The text-and-codes backbone in the forms that others run: a transformers causal language model, and ONNX.

Both read and write token ids, codes included; the encoders and codecs stay behind, and the model card says so.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from plait.core.device import exact_products
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import publish_folder, write_atomic, write_json
from plait.hf.architectures import ARCHITECTURES, Architecture, Biases, layout
from plait.modalities.base import END, PAD, Vocabulary
from plait.model.checkpoint import Checkpoint, save
from plait.model.multimodal import Multimodal
from plait.model.transformer import TransformerConfig

ONNX_TOLERANCE = 1e-4
MIN_P = 0.02  # of the likeliest id's probability: what plain sampling leaves out


# --- a folder of our own --------------------------------------------------------------------------------------------


def export_folder(checkpoint: Checkpoint, folder: Path, run_card: str = "") -> None:
    """Write a checkpoint for use alone, readable for every user of the machine: no state of training, and no codecs of
    media that the model never writes; `run_card` joins its README. Raises PlaitError where the folder cannot be
    written."""
    must_be_free(folder)
    unused = tuple(f"modalities.{name}.codec." for name in checkpoint.model.config.read_only)
    tensors = {name: value for name, value in checkpoint.model.state_dict().items() if not name.startswith(unused)}
    save(checkpoint, folder, tensors, lambda written: add_to_card(written, run_card))
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def add_to_card(folder: Path, more: str) -> None:
    """Add to the README of an export; one that has none gets it."""
    if more:
        path = folder / "README.md"
        before = path.read_text(encoding="utf-8") + "\n" if path.is_file() else ""
        write_atomic(path, before + more)


# --- transformers -----------------------------------------------------------------------------------------------


def export_transformers(checkpoint: Checkpoint, folder: Path) -> str:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load offline; returns its `model_type`.

    Ids are those of the vocabulary; rows of codes are made whole. Raises PlaitError where no architecture of
    transformers computes the same, or the folder cannot be written.
    """
    must_be_free(folder)
    model = checkpoint.model
    architecture = architecture_of(model)
    size = exported_size(model.vocabulary)
    tokenizer, names = extended_tokenizer(checkpoint)
    with publish_folder(folder) as temporary:
        write_json(temporary / "config.json", _config(checkpoint, architecture, size))
        write_json(temporary / "generation_config.json", _generation(checkpoint, size))
        save_file(tensors_of(model, architecture, size), temporary / "model.safetensors", metadata={"format": "pt"})
        write_atomic(temporary / "tokenizer.json", tokenizer)
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(checkpoint, names))
        write_atomic(
            temporary / "README.md", card(checkpoint, f"a causal language model of type `{architecture.model_type}`")
        )
    return architecture.model_type


def must_be_free(folder: Path) -> None:
    """Raises PlaitError where a folder exists and is not empty."""
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise PlaitError(f"{folder} exists and is not an empty folder. Name a new one, or delete it first.")


def architecture_of(model: Multimodal) -> Architecture:
    """Which architecture of transformers computes the same as this backbone.

    Raises PlaitError naming the switch that none of them has.
    """
    c = model.config.backbone
    if c.position == "learned":
        return ARCHITECTURES[_like_gpt2(c)]
    if c.norm != "rms" or not c.gated:
        raise _refused(
            f"no architecture has position {c.position}, norm {c.norm} and activation {c.activation} together"
        )
    if c.activation == "geglu_tanh":
        gemma = c.post_norm and c.qk_norm and c.local_rope_theta and c.embed_scale == math.sqrt(c.width)
        if not gemma or c.layers_without_rotary or c.qkv_bias or c.bias:
            raise _refused("Gemma 3 has GeGLU with all of its norms, windows and scaled embeddings, and no biases")
        return ARCHITECTURES["gemma3_text"]
    if c.post_norm or c.embed_scale != 1.0 or c.local_rope_theta:
        raise _refused("post_norm, embed_scale and local_rope_theta go with activation geglu_tanh")
    return ARCHITECTURES[_like_llama(model)]


def _like_gpt2(c: TransformerConfig) -> str:
    if c.norm != "layer" or c.gated:
        raise _refused(
            f"no architecture has position {c.position}, norm {c.norm} and activation {c.activation} together"
        )
    if c.qk_norm:
        raise _refused("GPT-2 has no qk_norm")
    if c.layer_types is not None:
        raise _refused("GPT-2 has no sliding windows")
    if c.kv_heads != c.heads or c.heads * c.head_width != c.width:
        raise _refused("GPT-2 has no grouped heads, and heads x head_width is its width")
    return "gpt2"


def _like_llama(model: Multimodal) -> str:
    """The architecture of a backbone with rotary positions, RMS norms and SwiGLU."""
    c = model.config.backbone
    every_slides = c.layer_types is not None and set(c.layer_types) == {"sliding"}
    if c.layers_without_rotary:
        if c.qk_norm:
            raise _refused("SmolLM3 has layers without rotary positions, and no qk_norm")
        return "smollm3"
    if c.qk_norm:
        biases = [
            p for name, p in model.backbone.named_parameters() if name.endswith(("feed_in.bias", "feed_out.bias"))
        ]
        if any(bool(p.any()) for p in biases):
            raise _refused("Qwen3's feed-forward layers have no bias, and this model's do (bias: true)")
        return "qwen3"
    if c.trained_length is not None:
        if c.qkv_bias or c.bias or (c.layer_types is not None and not every_slides):
            raise _refused("Phi-3 has LongRoPE, no biases, and a window in every layer or in none")
        return "phi3"
    if c.qkv_bias and not c.bias:
        return "qwen2"
    if c.layer_types is not None:
        if c.qkv_bias or c.bias or not every_slides:
            raise _refused("Mistral has a window in every layer, and no biases")
        return "mistral"
    if c.width % c.heads:
        raise _refused(f"Llama wants width ({c.width}) to be a multiple of heads ({c.heads})")
    return "llama"


def _refused(why: str) -> PlaitError:
    return PlaitError(
        f"This model cannot be exported to transformers: {why}. Exported are rotary + rms + swiglu (Qwen3 with "
        "qk_norm, Llama without) and learned + layer + gelu (GPT-2); ONNX takes them all."
    )


def exported_size(vocabulary: Vocabulary) -> int:
    """How many ids an export has: all, but for an import that was not extended, whose last two were never used."""
    added = vocabulary.columns or vocabulary.levels or vocabulary.turns
    plain = not added and vocabulary.end_id is not None
    return vocabulary.text if plain else vocabulary.size


def biases_of(c: TransformerConfig, architecture: Architecture) -> Biases:
    """Theirs come for all projections of a part or none, the rest being zero."""
    if architecture.model_type == "qwen2":
        return Biases(qkv=True)
    return Biases(c.qkv_bias or c.bias, c.qkv_bias or c.bias, c.bias and architecture.model_type != "qwen3")


def ends_of(checkpoint: Checkpoint) -> int | list[int]:
    """The ids that end a text, and a reply written by the chat template: the tokenizer's own end, as `<|im_end|>`."""
    vocabulary, text = checkpoint.model.vocabulary, checkpoint.text
    ends = [vocabulary.end, *(vocabulary.more_ends or [])]
    turn_end = text.tokenizer.token_to_id(text.settings.get("eos_token", ""))
    if text.chat_template is not None and turn_end is not None and turn_end not in ends:
        ends.append(turn_end)
    return ends if len(ends) > 1 else ends[0]


def _config(checkpoint: Checkpoint, architecture: Architecture, size: int) -> dict[str, Any]:
    model, vocabulary = checkpoint.model, checkpoint.model.vocabulary
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "dtype": "float32",
        "vocab_size": size,
        "tie_word_embeddings": model.config.tied,
        "bos_token_id": None,
        "eos_token_id": ends_of(checkpoint),
        "pad_token_id": vocabulary.pad if size > vocabulary.pad else None,
        **architecture.write(model.config.backbone),
    }


@torch.no_grad()
def tensors_of(model: Multimodal, architecture: Architecture, size: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that transformers gives them."""
    c = model.config.backbone
    plait_tensors = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    plait_tensors["token_embedding.free"] = model.token_embedding.table()[:size]
    if model.lm_head is not None:
        plait_tensors["lm_head.free"] = model.lm_head.table()[:size]
    tensors = {}
    for name, parts in layout(architecture, c, size, model.config.tied, biases_of(c, architecture)).items():
        value, start = plait_tensors.get(name), 0
        for part in parts:
            if value is None:  # a bias that they have and we do not
                tensors[part.name] = torch.zeros(part.shape)
                continue
            rows = part.shape[1] if part.transposed else part.shape[0]
            piece = value[start : start + rows].float() - part.offset
            tensors[part.name] = piece.t() if part.transposed else piece
            start += rows
    return {name: value.detach().float().cpu().contiguous().clone() for name, value in tensors.items()}


def _generation(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    vocabulary, sampling = checkpoint.model.vocabulary, checkpoint.generation
    values: dict[str, Any] = {
        "eos_token_id": ends_of(checkpoint),
        "pad_token_id": vocabulary.pad if size > vocabulary.pad else vocabulary.end,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.temperature > 0:
        values |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    if vocabulary.levels:  # what our grammar makes impossible is improbable here; this takes the rest
        values["min_p"] = MIN_P
    if never := [id for id in (vocabulary.pad, vocabulary.special(END)) if id < size and id != vocabulary.end]:
        values["suppress_tokens"] = never
    return values


# --- tokenizer --------------------------------------------------------------------------------------------------


def extended_tokenizer(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """(`tokenizer.json` with every id of the vocabulary, our special names -> their names in it).

    Special tokens and codes are added tokens after the text's. A name that the text tokenizer has already, as GPT-2
    has its end, gets `plait:` in front. Raises PlaitError where the ids cannot be kept.
    """
    vocabulary, text = checkpoint.model.vocabulary, checkpoint.text
    content = json.loads(text.tokenizer.to_str())
    existing = text.tokenizer.get_vocab(with_added_tokens=True)
    used = set(existing.values())
    added = {f"<|unused:{id}|>": id for id in range(vocabulary.text) if id not in used}
    names = {}
    if exported_size(vocabulary) > vocabulary.text:
        for id, name in enumerate(vocabulary.names(), vocabulary.text):
            names[name] = name if name not in existing else f"<|plait:{name[2:]}"
            added[names[name]] = id
    content["added_tokens"] += [
        {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for name, id in added.items()
    ]  # fmt: skip
    if vocabulary.columns and text.start:  # what was trained on records never saw an import's beginning of text
        content["post_processor"] = None
    result = json.dumps(content, ensure_ascii=False)
    check = Tokenizer.from_str(result)
    if misplaced := [name for name, id in added.items() if check.token_to_id(name) != id]:
        raise PlaitError(f"The text tokenizer leaves gaps in its ids, so that {misplaced[0]} cannot keep its own.")
    return result, names


def _tokenizer_config(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Any]:
    model = checkpoint.model
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.backbone.max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    if names:
        config["pad_token"] = names[PAD]
    end_id = model.vocabulary.end_id
    end = names.get(END) if end_id is None else checkpoint.text.tokenizer.id_to_token(end_id)
    # Of an import, its chat template and the names of its special tokens too, among them the end of its turns.
    return {**({} if end is None else {"eos_token": end}), **checkpoint.text.settings, **config}


def card(checkpoint: Checkpoint, what: str) -> str:
    """The README of an exported model, as the Hugging Face hub shows it."""
    vocabulary = checkpoint.model.vocabulary
    id_ranges = "\n".join(f"| {name} | {start} | {stop - 1} |" for name, (start, stop) in vocabulary.id_ranges.items())
    openers = ", ".join(f"`<|{column}|>`" for column in vocabulary.columns) or "none"
    return f"""---
library_name: transformers
---
# The backbone of a Plait model

This is {what}. It reads and writes **text and codes, not pixels or audio**: the encoders and codecs that turn
images and audio clips into embeddings, and codes into images and audio clips, are in the Plait checkpoint it came from.

| ids of | first | last |
| --- | ---: | ---: |
{id_ranges}

Openers of spans: {openers}. A special token is read where its name stands, as a chat template writes it; of text that
others wrote, read names as plain characters: `tokenizer(text, split_special_tokens=True)`. A name that the text's
tokenizer had before has `plait:` in front, `<|plait:pad|>`. Outside Plait no grammar keeps the spans well formed:
`plait export` has fitted one vector a space on top, which changes no probability within a space, and where the
architecture is Qwen3 has added a block that counts the codes of a span, one span of each space in a sequence.
`generation_config.json` asks for `min_p`.
"""


# --- ONNX -------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Token ids (B, L) to logits (B, L, V), all rows made whole."""

    def __init__(self, model: Multimodal, size: int) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.rows = nn.Parameter(model.token_embedding.table().detach()[:size])
        self.lm_head = self.rows if model.lm_head is None else nn.Parameter(model.lm_head.table().detach()[:size])

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.backbone(F.embedding(ids, self.rows))
        return hidden @ self.lm_head.t()


def export_onnx(checkpoint: Checkpoint, folder: Path) -> float:
    """Write `model.onnx` (`input_ids` (B, L) int64 -> `logits` (B, L, V), both dimensions free) and `tokenizer.json`.

    Attention is causal, so inputs padded on the right need no mask. The file is run with onnxruntime on other shapes
    than it was traced with; returns the largest difference of a logit. Raises PlaitError where onnxruntime is not
    installed, the difference is above 1e-4 or the folder cannot be written.
    """
    must_be_free(folder)
    onnxruntime = import_extra("onnxruntime", "onnx", "Export to ONNX")
    model = checkpoint.model
    size = exported_size(model.vocabulary)
    place, training = next(model.parameters()).device, model.training
    plain = Logits(model, size).cpu().eval()
    rng = torch.Generator().manual_seed(0)
    longest = model.config.backbone.max_length
    try:
        with publish_folder(folder) as temporary:
            file = temporary / "model.onnx"
            _trace(plain, torch.randint(size, (2, min(7, longest)), generator=rng), file)
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            worst = 0.0
            for shape in [(1, 1), (3, min(33, longest))]:
                ids = torch.randint(size, shape, generator=rng)
                with torch.inference_mode(), exact_products(torch.device("cpu")):
                    expected = plain(ids).numpy()
                (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
                worst = max(worst, float(np.abs(logits - expected).max()))
            if not worst <= ONNX_TOLERANCE:
                raise PlaitError(f"The ONNX model's logits differ by {worst:.2g} from ours; nothing was written.")
            write_atomic(temporary / "tokenizer.json", extended_tokenizer(checkpoint)[0])
            what = "an ONNX file, `input_ids` (batch, length) to `logits` (batch, length, ids), padded on the right"
            write_atomic(temporary / "README.md", card(checkpoint, what).replace("transformers", "onnx", 1))
    finally:
        model.to(place).train(training)
    return worst


def _trace(plain: nn.Module, ids: Tensor, file: Path) -> None:
    """By the exporter that traces: the newer one needs onnxscript, and fixes lengths at our choice of kernel."""
    free = {0: "batch", 1: "length"}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                (ids,),
                str(file),
                dynamo=False,
                opset_version=17,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_axes={"input_ids": free, "logits": free},
            )
    except (RuntimeError, TypeError) as error:
        raise PlaitError(f"torch {torch.__version__} cannot export this model to ONNX: {error}") from error
    finally:
        quiet.setLevel(level)
