"""llama.cpp as a peer, where `llama-cpp-python` and `gguf` can be imported: our weights as a GGUF file, one native
call a step for all rows, greedy."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.core import isa
from plait.hf.gguf_export import write_shape
from plait.model.checkpoint import Checkpoint

NAMES = {  # Qwen3's in transformers -> GGUF's
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Checkpoint, path: Path, precision: str) -> None:
    """A Qwen3 without a tokenizer; matrices in `precision`, norms in fp32."""
    import gguf
    from training import as_transformers

    c, vocabulary = checkpoint.model.config.backbone, checkpoint.model.vocabulary
    writer = gguf.GGUFWriter(path, "qwen3")
    write_shape(writer, c, "qwen3")
    writer.add_vocab_size(vocabulary.size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in as_transformers(checkpoint).state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[part]}"
        else:
            stem = NAMES[stem]
        if precision == "bf16" and tensor.ndim == 2:
            values = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(f"{stem}.weight", values, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(f"{stem}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A loaded model with a context of `rows` sequences."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, precision: str, rows: int) -> LlamaCpp | None:
        """None, with a line that says why, where the packages are not there."""
        if isa.cap() is not None:
            print(f"llama.cpp is left out: {isa.VARIABLE} does not cap it.\n")
            return None
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            print(f"llama.cpp is left out: {error}. To include it: pip install llama-cpp-python gguf\n")
            return None
        return cls(llama_cpp, checkpoint, precision, rows)

    def __init__(self, library: Any, checkpoint: Checkpoint, precision: str, rows: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(checkpoint, path, precision)
            config = checkpoint.model.config.backbone
            self._open(library, path, rows, config.max_length, checkpoint.model.vocabulary.size)

    @classmethod
    def of_file(cls, path: Path, rows: int, length: int) -> LlamaCpp:
        """A GGUF file with a context of `rows` sequences of so many tokens. Raises ImportError without llama.cpp."""
        import llama_cpp

        made = cls.__new__(cls)
        made._open(llama_cpp, path, rows, length, 0)
        made.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(made.model))
        return made

    def _open(self, library: Any, path: Path, rows: int, length: int, size: int) -> None:
        self.library, self.rows, self.size = library, rows, size
        self.quiet = library.llama_log_callback(lambda level, text, data: None)  # kept, or it is collected
        library.llama_log_set(self.quiet, None)
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.use_mmap = False
        self.model = library.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        settings = library.llama_context_default_params()
        settings.n_seq_max = rows
        settings.n_ctx = rows * length
        settings.n_batch = settings.n_ubatch = 2048
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.batch = library.llama_batch_init(2048, 0, 1)

    def _read(self, rows: list[list[int]], start: int) -> list[int]:
        """Read so many ids a row from position `start`; returns the likeliest next id of each."""
        batch, last, at = self.batch, [], 0
        for row, ids in enumerate(rows):
            for offset, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, start + offset, 1
                batch.seq_id[at][0] = row
                batch.logits[at] = offset == len(ids) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for place in last:
            logits = self.library.llama_get_logits_ith(self.context, place)
            pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
            found.append(int(np.ctypeslib.as_array(pointer, (self.size,)).argmax()))
        return found

    def write(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Greedy continuations of prompts of one length."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        chosen = self._read(prompts, 0)
        written = [[token] for token in chosen]
        for step in range(count - 1):
            chosen = self._read([[token] for token in chosen], len(prompts[0]) + step)
            for row, token in zip(written, chosen, strict=True):
                row.append(token)
        return written

    def close(self) -> None:
        """Free what it holds."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)
