"""A real server in a process of its own, for tests, and plain HTTP to talk to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.modalities.text import Text
from plait.model import checkpoint as checkpoints
from plait.model.checkpoint import Checkpoint
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import TransformerConfig

WORDS = ["the cat sat on the mat", "a dog ran in the park", "birds sing at dawn"] * 4


def write_text_model(folder: Path) -> Path:
    """A tiny language model with random weights that never ends by itself."""
    torch.manual_seed(0)
    text = Text.train(WORDS, 300)
    backbone = TransformerConfig(
        width=32, layers=2, heads=2, kv_heads=2, head_width=16, hidden=64, max_length=256
    )  # fmt: skip
    vocabulary = {"text": text.size, "columns": {}, "levels": {}, "closers": []}
    model = Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0))
    with torch.no_grad():  # logits far enough apart that rounding decides nothing
        for parameter in model.output_embedding.parameters():
            parameter.mul_(40)
    checkpoints.save(Checkpoint(model.eval(), text), folder)
    return folder


def write_imports(folder: Path) -> dict[str, Path]:
    """Two checkpoints of Hugging Face with random weights: tokens of bytes, and SentencePiece's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    texts = ["the cat sat on the mat", "der Bär läuft", "café naïve", "한국어 문장", "Việt Nam đẹp"] * 20
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    size = plain.get_vocab_size()
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(folder / "bytes")  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>").save_pretrained(folder / "bytes")

    marked = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    marked.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    hexes = [f"<0x{byte:02X}>" for byte in range(256)]
    marked.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *hexes], show_progress=False,
    ))  # fmt: skip
    state = json.loads(marked.to_str())  # the bytes are tokens like others
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in hexes]
    marked = Tokenizer.from_str(json.dumps(state))
    config = LlamaConfig(
        vocab_size=marked.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "pieces")
    PreTrainedTokenizerFast(
        tokenizer_object=marked, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "pieces")
    return {"bytes": folder / "bytes", "pieces": folder / "pieces"}


# As Qwen's and Hermes' templates show tools and spell calls.
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role }}{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    """{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_caller(folder: Path, template: str = TOOL_TEMPLATE) -> Path:
    """A checkpoint of Hugging Face with random weights, whose chat template knows tools."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.train_from_iterator([*WORDS, template] * 4, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", split_special_tokens=False)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path
    key: str = ""

    @classmethod
    def start(cls, log: Path, *arguments: object, key: str = "", optimised: bool = False) -> Server:
        """`plait serve ... --port 0`, once it takes requests."""
        command = [sys.executable, *(["-O"] if optimised else []), "-m", "plait", "serve", *map(str, arguments)]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=out, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving at "), log.read_text()
        return cls(process, line.split()[2].removesuffix("/v1"), log, key)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        if key is None and self.key:
            given.setdefault("Authorization", f"Bearer {self.key}")
        elif key:
            given["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """(status, JSON) of a POST."""
        status, _, answer = self.ask("POST", path, body, **options)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def stop(self) -> int:
        """Send SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def is_error(status: int, body: bytes) -> bool:
    """Whether an answer has OpenAI's error shape."""
    error = json.loads(body)
    fields = set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}
    return 400 <= status < 600 and fields and isinstance(error["error"]["message"], str)
