"""GGUF files, as llama.cpp reads and writes them: configuration, tokenizer, chat template and weights of one file.

Tensors are read a few rows at a time with the `gguf` package, so that a model takes the memory of what is kept of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.hf.architectures import ARCHITECTURES, Config, Stored
from plait.hf.hub import explained, quiet
from plait.kernels.linear import BLOCKS, Blocks
from plait.modalities.text import TOKENS, Text

# Our name of an architecture -> llama.cpp's. Mistral's files call themselves llama.
NAMES = {
    "gpt2": "gpt2", "llama": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3",
    "gemma3_text": "gemma3",
}  # fmt: skip
# The type of a tensor -> how its weights are kept where the file's own precision is asked for.
STORAGE = {
    "F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "int8", "Q6_K": "int8", "Q5_K": "int8", "Q5_0": "int5",
    "Q5_1": "int8", "Q4_K": "int4", "Q4_0": "int4", "Q4_1": "int4",
}  # fmt: skip


class GGUF:
    """One file, opened: what it says and its tensors."""

    def __init__(self, path: Path) -> None:
        """Raises PlaitError where the file cannot be read, is cut short, or is of an architecture that does not run
        here."""
        self.path = path
        self.library = import_extra("gguf", "huggingface", path.name)
        try:
            reader = _reader(self.library)(path)
        except (ValueError, OSError, IndexError, struct.error, OverflowError, MemoryError) as error:
            raise PlaitError(f"{path} is no GGUF file that can be read, or is cut short: {error}.") from error
        self.fields: dict[str, Any] = reader.plain_fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        size = path.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise PlaitError(f"{path} is cut short: tensor {tensor.name} ends beyond its end. Fetch it again.")
            if tensor.tensor_type.name not in STORAGE:
                raise PlaitError(
                    f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which is not read. Read are "
                    f"{', '.join(STORAGE)}."
                )
        self.name = str(self.fields.get("general.architecture"))
        kinds = [model_type for model_type, gguf_name in NAMES.items() if gguf_name == self.name]
        if not kinds:
            readable = ", ".join(sorted(set(NAMES.values())))
            raise PlaitError(f"{path}: unknown architecture '{self.name}'. GGUF files of {readable} are read.")
        self.model_type = kinds[0]
        code = next(code for code, name in self.library.MODEL_ARCH_NAMES.items() if name == self.name)
        self.names = self.library.get_tensor_name_map(code, self._fact("block_count"))

    def _fact(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(f"{self.name}.{key}", default)
        if value is None:
            raise PlaitError(f"{self.path} lacks {self.name}.{key}.")
        return value

    def config(self) -> Config:
        """What the folder's config.json would say."""
        heads, width = self._fact("attention.head_count"), self._fact("embedding_length")
        epsilon = self._fact("attention.layer_norm_rms_epsilon", self._fact("attention.layer_norm_epsilon", 1e-5))
        head_width = self._fact("attention.key_length", width // heads)
        config: Config = {
            "model_type": self.model_type,
            "vocab_size": self.tensors["token_embd.weight"].shape.tolist()[-1],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "eos_token_id": self._ends(),
        }
        if self.model_type == "gpt2":
            return config | {
                "n_embd": width, "n_layer": self._fact("block_count"), "n_head": heads,
                "n_positions": self._fact("context_length"), "n_inner": self._fact("feed_forward_length"),
                "layer_norm_epsilon": epsilon,
            }  # fmt: skip
        config |= {
            "hidden_size": width,
            "num_hidden_layers": self._fact("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._fact("attention.head_count_kv", heads),
            "head_dim": head_width,
            "intermediate_size": self._fact("feed_forward_length"),
            "max_position_embeddings": self._fact("context_length"),
            "rms_norm_eps": float(np.float64(f"{np.float32(epsilon):.8g}")),
            "sliding_window": self.fields.get(f"{self.name}.attention.sliding_window"),
            "attention_bias": self.model_type != "qwen2" and "blk.0.attn_q.bias" in self.tensors,
        }
        theta = float(self._fact("rope.freq_base", 10_000.0))
        scaling = self._scaling(config["max_position_embeddings"])
        if self.model_type == "gemma3_text":
            full = {"rope_type": "default", **scaling, "rope_theta": theta}
            local = {"rope_type": "default", "rope_theta": 10_000.0}
            return config | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
        return config | {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}

    def _scaling(self, longest: int) -> Config:
        """Of rotary positions, by key or by tensors of factors."""
        trained = self.fields.get(f"{self.name}.rope.scaling.original_context_length", longest)
        if "rope_factors_short.weight" in self.tensors:
            factors = {f"{k}_factor": self._rows(f"rope_factors_{k}.weight").tolist() for k in ("short", "long")}
            return {"rope_type": "longrope", "original_max_position_embeddings": trained, **factors}
        if "rope_freqs.weight" in self.tensors:  # Llama 3's divisors of frequencies, the same at any length
            divisors = self._rows("rope_freqs.weight").tolist()
            return {"rope_type": "longrope", "original_max_position_embeddings": longest, "attention_factor": 1.0,
                    "short_factor": divisors, "long_factor": divisors}  # fmt: skip
        kind = self.fields.get(f"{self.name}.rope.scaling.type", "none")
        if kind in ("linear", "yarn"):
            factor = self._fact("rope.scaling.factor")
            return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": trained}
        return {}

    def _ends(self) -> list[int]:
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        return list(dict.fromkeys(int(self.fields[key]) for key in keys if key in self.fields))

    def text(self) -> Text:
        """The tokenizer and chat template, made by transformers of the file's vocabulary."""
        import_extra("transformers", "huggingface", f"The tokenizer of {self.path.name}")
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

        with explained(self.path), quiet():
            architecture, vocabulary, settings = get_gguf_tokenizer(str(self.path))
            tokenizer: Tokenizer = convert_gguf_tokenizer(architecture, vocabulary)[0]
        text_settings = {
            name: settings[name] for name in (*TOKENS, "chat_template") if isinstance(settings.get(name), str)
        }
        first = text_settings.get("bos_token")
        if settings.get("add_bos_token") and first is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
            )
        else:
            tokenizer.post_processor = None
        return Text(tokenizer, text_settings)

    # --- tensors ---------------------------------------------------------------------------------------------------

    def _named(self, part: Stored) -> str | None:
        """The file's name of a tensor of transformers'."""
        name = self.names.get_name(part.name, try_suffixes=(".weight", ".bias"))
        return None if name is None else str(name)

    def check(self, parts: Sequence[Stored]) -> None:
        """Raises PlaitError where a tensor is missing or of another shape."""
        for part in parts:
            name = self._named(part)
            if name not in self.tensors:
                raise PlaitError(f"{self.path} lacks tensor {name or part.name}. Fetch it again.")
            shape = tuple(reversed(self.tensors[name].shape.tolist()))
            expected = part.shape[::-1] if part.transposed else part.shape
            if shape != expected:
                raise PlaitError(f"{self.path}: tensor {name} has shape {list(shape)}, its keys say {list(expected)}.")

    def storage(self, part: Stored) -> str:
        """How the file keeps a tensor, in our words."""
        return STORAGE[self.tensors[str(self._named(part))].tensor_type.name]

    def read(self, part: Stored, rows: slice = slice(None), heads: int = 1) -> Tensor:
        """Rows of a tensor in fp32, (out, in). llama.cpp turns pairs of neighbours where transformers turns halves:
        queries and keys of Llamas, of so many heads, are put back in order."""
        value = self._widened(str(self._named(part)), self._data(part, rows, heads))
        if self.model_type == "gemma3_text" and part.offset:
            return value - part.offset  # llama.cpp has added it already
        return value

    def blocks(self, part: Stored, rows: slice, heads: int = 1) -> Blocks | None:
        """Rows of a tensor as they lie in the file; None where no kernel packs blocks of its type."""
        kind = self.tensors[str(self._named(part))].tensor_type.name
        return Blocks(kind, self._data(part, rows, heads)) if kind in BLOCKS and not part.offset else None

    def _data(self, part: Stored, rows: slice, heads: int) -> np.ndarray:
        """(rows, bytes of a row), in transformers' order."""
        name = str(self._named(part))
        if self.name == "llama" and part.name.endswith(("q_proj.weight", "k_proj.weight")):
            data = self._bytes(name)
            width = len(data) // heads
            return data.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(data.shape)[rows]
        return self._bytes(name, rows)

    def _bytes(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """(rows, bytes of a row), as they lie in the file."""
        tensor = self.tensors[name]
        height = int(tensor.shape[-1])
        start, stop, _ = rows.indices(height)
        size = tensor.n_bytes // height
        data = np.fromfile(self.path, np.uint8, size * (stop - start), offset=int(tensor.data_offset) + size * start)
        return data.reshape(stop - start, size)

    def _rows(self, name: str) -> Tensor:
        return self._widened(name, self._bytes(name))

    def _widened(self, name: str, data: np.ndarray) -> Tensor:
        """Rows of a tensor, (rows, bytes of a row), in fp32."""
        tensor = self.tensors[name]
        shape = tuple(reversed(tensor.shape.tolist()))
        if (widen := WIDENED.get(tensor.tensor_type.name)) is not None:
            values = widen(data)
        else:
            values = self.library.dequantize(data.ravel() if len(shape) == 1 else data, tensor.tensor_type)
        value = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(len(data), *shape[1:])
        if not all_finite(value):
            raise PlaitError(f"{self.path}: tensor {name} holds values that are not finite. Fetch it again.")
        return value


def _widen_q5_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: a scale in fp16, the fifth bit of each, four bits of each. The package does it 16 rows at a
    time, with numbers of 32 bits between, and takes 2.5 times as long."""
    blocks = data.reshape(-1, 22)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    values = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    values <<= 4
    values[:, :16] |= blocks[:, 6:] & 15
    values[:, 16:] |= blocks[:, 6:] >> 4
    signed = values.view(np.int8)
    signed -= 16
    return np.multiply(signed, scales, dtype=np.float32).ravel()


def _widen_q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: a scale in fp16, eight bits of each."""
    blocks = data.reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return np.multiply(blocks[:, 2:].view(np.int8), scales, dtype=np.float32).ravel()


WIDENED = {"Q5_0": _widen_q5_0, "Q8_0": _widen_q8_0}  # the types that most weights of small models have


def all_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. A sum tells in one pass, but that it may overflow itself."""
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())


def _reader(library: Any) -> Any:
    """The package's reader, but that it passes over long arrays of strings, which it reads one by one."""

    class Reader(library.GGUFReader):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.plain_fields = {
                name: field.contents()
                for name, field in self.fields.items()
                if field.types and field.types[0] is not library.GGUFValueType.ARRAY
            }

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            types = library.GGUFValueType
            if raw_type == types.ARRAY:
                inner, count = (int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0]))
                if inner == types.STRING:
                    end = orig_offs + 12
                    view = memoryview(self.data)
                    for _ in range(count):
                        end += 8 + struct.unpack_from("<Q", view, end)[0]
                    return end - orig_offs, [], [], [types.ARRAY, types.STRING]
                size = np.dtype(self.gguf_scalar_to_np[types(inner)]).itemsize
                return 12 + size * count, [], [], [types.ARRAY, types(inner)]
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


assert set(NAMES) <= set(ARCHITECTURES)
