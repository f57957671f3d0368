"""Import and export against transformers itself, on tiny models with random weights made on the spot."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import plait
from plait.core import system
from plait.core.device import compiler
from plait.core.errors import PlaitError
from plait.hf import huggingface
from plait.hf.export import export_onnx, export_transformers
from plait.hf.gguf_files import WIDENED
from plait.hf.span_counter import channels_for, count_codes, widened
from plait.inference.grammar import Span
from plait.inference.prompts import Chat, Turn
from plait.kernels.linear import BLOCKS, Blocks, PackedLinear
from plait.kernels.linear import library as linear_library
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model import checkpoint as own
from plait.model.chat_template import TEMPLATE
from plait.model.checkpoint import Checkpoint
from plait.model.extend import extend
from plait.model.multimodal import ModelConfig, Multimodal
from plait.model.transformer import KVCache, TransformerConfig, View

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers", reason="pip install plait-ml[huggingface]")

WORDS = ["the cat sat on the mat", "a red heart in a green field", "twelve quick foxes jump", "naïve façade, 東京"] * 4
SIZE = 320
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
}
GPT2 = {
    "vocab_size": SIZE, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2,
    "eos_token_id": 256, "bos_token_id": None,
}  # fmt: skip
PHI = {
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 12.0],
    },
}  # fmt: skip
CASES = {
    "gpt2": ("GPT2", {**GPT2}),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 96}),
    "llama": ("Llama", {**SMALL, "num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
    "llama-linear": (
        "Llama", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "llama-dynamic": (
        "Llama", {**SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "llama-yarn": (
        "Llama",
        {**SMALL, "head_dim": 16, "attention_bias": True,
         "rope_parameters": {**YARN, "beta_fast": 8.0, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "qwen3-yarn": ("Qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    "qwen3-tied": (
        "Qwen3",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("Qwen2", {**SMALL, "num_key_value_heads": 2}),
    "qwen2-windows": (
        "Qwen2",
        {**SMALL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
         "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 32, "head_dim": 16}),
    "mistral-full": ("Mistral", {**SMALL, "num_key_value_heads": 4, "sliding_window": None}),
    "phi3-short": ("Phi3", {**SMALL, "num_key_value_heads": 2, **PHI, "original_max_position_embeddings": 400}),
    "phi3-long": (
        "Phi3",
        {**SMALL, "num_key_value_heads": 2, **PHI, "original_max_position_embeddings": 32, "sliding_window": 40},
    ),
    "smollm3": (
        "SmolLM3",
        {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "no_rope_layer_interval": 2, "pad_token_id": None,
         "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
    ),
    "gemma3": (
        "Gemma3Text",
        {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 20,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
         "query_pre_attn_scalar": 16,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
}  # fmt: skip


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Also norms and biases, which start as ones and zeros and would hide a wrong place."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    tokenizer = make_tokenizer()
    for seed, (name, (kind, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model, seed)
        found[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(found[name], max_shard_size="60KB" if name == "llama" else "1GB")
        tokenizer.save(str(found[name] / "tokenizer.json"))
    return found


@pytest.fixture(scope="session")
def theirs(folders):
    return {name: transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


def our_logits(model: Multimodal, ids: torch.Tensor, **more) -> torch.Tensor:
    hidden = model.backbone(torch.nn.functional.embedding(ids, model.token_embedding.table()), **more)
    return model.logits(hidden)


def greedy(model: Multimodal, ids: list[int], count: int) -> list[int]:
    """With a cache, over the text's ids, as a plain causal language model goes on."""
    config = model.config.backbone
    cache = KVCache(config, 1, len(ids) + count, torch.device("cpu"), torch.float32)
    found, new = list(ids), torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(count):
            view = View(cache, torch.tensor([0]), torch.tensor([new.shape[1]]), new.shape[1])
            new = our_logits(model, new, view=view)[:, -1:, : model.vocabulary.text].argmax(-1)
            found.append(int(new))
    return found


@pytest.mark.parametrize("name", CASES)
def test_import_gives_their_logits_and_their_text(name, folders, theirs):
    start = time.monotonic()
    checkpoint = huggingface.load(folders[name])
    assert time.monotonic() - start < 5
    model, reference = checkpoint.model, theirs[name]
    vocabulary = model.vocabulary
    assert (vocabulary.text, vocabulary.end, model.config.embed_dim, vocabulary.columns) == (SIZE, 256, 0, {})
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([150, 61, 1])
    ids = torch.randint(SIZE, (3, 150), generator=draw)
    mask = torch.arange(150) < lengths[:, None]
    with torch.inference_mode():
        wanted = reference(ids, attention_mask=mask.long()).logits
        got = our_logits(model, ids)[..., :SIZE]
        assert (got - wanted)[mask].abs().max() < 1e-4

        # The same through a cache, in three uneven steps, the rows being of different lengths.
        cache = KVCache(model.config.backbone, 3, 160, torch.device("cpu"), torch.float32)
        rows, at, steps = torch.arange(3), torch.zeros(3, dtype=torch.long), []
        for step in (40, 1, 109):
            count = (lengths - at).clamp(0, step)
            take = (at[:, None] + torch.arange(step)).clamp(max=149)
            out = our_logits(model, ids.gather(1, take), view=View(cache, rows, count, step))[..., :SIZE]
            real = torch.arange(step) < count[:, None]
            steps.append((out - wanted.gather(1, take[..., None].expand_as(out)))[real].abs().max())
            at += count
        assert max(steps) < 1e-4

    # Under LongRoPE a text that has become long is read anew, which is the engine's affair: here it begins long.
    prompt = checkpoint.text.encode("the cat" if name != "phi3-long" else "the cat sat on the mat " * 8)
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted_ids = reference.generate(torch.tensor([prompt]), **options)[0].tolist()
    assert greedy(model, prompt, 200) == wanted_ids
    assert checkpoint.text.decode(wanted_ids) == checkpoint.text.tokenizer.decode(wanted_ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["gpt2-untied", "llama-tied", "qwen3", "mistral", "phi3-long", "smollm3", "gemma3"])
def test_the_front_door_continues_texts_as_they_do(name, folders, theirs):
    """Two of unequal lengths in one batch, past every window and LongRoPE's trained length."""
    model = plait.load(folders[name], device="cpu", precision="fp32")
    text = model.checkpoint.text
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": 256, "pad_token_id": 0}
    wanted = []
    for prompt in ("the cat", "twelve quick foxes jump on the mat"):
        ids = text.encode(prompt)
        new = theirs[name].generate(torch.tensor([ids]), **options)[0].tolist()[len(ids) :]
        wanted.append(new[: new.index(256)] if 256 in new else new)
    contexts = [model.context("the cat"), model.context("twelve quick foxes jump on the mat")]
    results = model.engine.run([model.request(context, "text", max_new_tokens=200) for context in contexts])
    assert [result.samples[0].ids for result in results] == wanted
    assert model.generate("the cat", max_new_tokens=200) == text.decode(text.encode("the cat") + wanted[0])


def test_a_text_begins_and_ends_as_theirs_does(folders, tmp_path):
    """With Llama's beginning of text, several ends and a chat template, which is kept wherever the model goes."""
    folder = shutil.copytree(folders["llama-tied"], tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    begin, stop = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    settings = {"chat_template": template, "eos_token": "</s>", "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = theirs("the cat").input_ids
    assert prompt[0] == begin
    free = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0].tolist()
    ends = [stop, free[len(prompt) + 20]]  # one that it is sure to write
    edit_json(folder / "generation_config.json", eos_token_id=ends)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert wanted[-1] == ends[1] and len(wanted) <= len(prompt) + 21

    ours = plait.load(folder, device="cpu", precision="fp32")
    export_transformers(ours.checkpoint, tmp_path / "back")
    own.save(ours.checkpoint, tmp_path / "kept")
    for place in (folder, tmp_path / "kept", tmp_path / "back"):
        model = plait.load(place, device="cpu", precision="fp32")
        text = model.checkpoint.text
        assert model.generate("the cat", max_new_tokens=40) == "the cat" + text.decode(wanted[len(prompt) : -1])
        assert (text.chat_template, text.start, text.settings["bos_token"]) == (template, [begin], "<s>")
        again = transformers.PreTrainedTokenizerFast.from_pretrained(place)
        assert again("the cat").input_ids == prompt
        assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi"


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "llama-yarn", "qwen2-windows", "mistral", "phi3-long", "smollm3", "gemma3"]
)
def test_an_import_is_saved_read_and_given_back(name, folders, theirs, tmp_path):
    checkpoint = huggingface.load(folders[name])
    own.save(checkpoint, tmp_path / "ours")
    again = huggingface.load(tmp_path / "ours")  # also this front door reads our own folders
    export_transformers(again, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for tensor, value in theirs[name].state_dict().items():
        returned = back.pop(tensor, theirs[name].get_input_embeddings().weight)
        # Gemma's norms multiply by one plus what is stored.
        assert torch.equal(returned, value) or ("norm" in tensor and (returned - value).abs().max() < 2e-7), tensor
    assert not any(bool(value.any()) for value in back.values())  # a bias of zeros adds nothing
    reader = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.arange(150)[None]
    with torch.inference_mode():
        assert (reader(ids).logits - theirs[name](ids).logits).abs().max() < 1e-4


def test_older_spellings_are_read(folders, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling; OpenAI's GPT-2 has no prefix, and constants among weights."""
    old = shutil.copytree(folders["llama"], tmp_path / "llama")
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    (old / "config.json").write_text(json.dumps(config))
    first, second = huggingface.load(folders["llama"]), huggingface.load(old)
    assert torch.equal(first.model.backbone.frequencies, second.model.backbone.frequencies)

    old = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(old / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file({k: v.half() for k, v in tensors.items()}, old / "model.safetensors")
    model = huggingface.load(old).model
    ids = torch.arange(40)[None]
    assert (our_logits(model, ids) - our_logits(huggingface.load(folders["gpt2"]).model, ids)).abs().max() < 0.1


def kept_as(name: str, kind: str) -> str:
    """As llama.cpp mixes types: values in more bits than queries and keys."""
    return {"Q5_0": "Q8_0", "Q8_0": "F16"}.get(kind, kind) if "v_proj" in name else kind


def write_gguf(folder: Path, path: Path, arch: str, kind: str) -> None:
    """As llama.cpp's converter does it, of matrices whose rows are whole blocks."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1e6 if arch == "gemma3" else config["rope_parameters"]["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    ids = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    names = [*sorted(ids, key=ids.get), *(f"[unused{n}]" for n in range(SIZE - len(ids)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name == "<|endoftext|>" or "unused" in name else 1 for name in names])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(256)
    codes = {name: code for code, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(codes[arch], config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.float()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else pairs
            value = value.view(count, 2, len(value) // count // 2, -1).transpose(1, 2).reshape(value.shape)
        value = value + 1 if arch == "gemma3" and "norm" in name else value
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        quantise = value.ndim == 2 and kind != "F32"
        code = gguf.GGMLQuantizationType[kept_as(name, kind) if quantise else "F32"]
        writer.add_tensor(theirs, gguf.quantize(value.numpy(), code) if quantise else value.numpy(), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q5_0", "Q8_0"])
def test_blocks_are_widened_as_the_package_does(kind):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    rows = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    data = gguf.quantize(rows, number)
    assert np.array_equal(WIDENED[kind](data.ravel()).reshape(rows.shape), gguf.dequantize(data, number))


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_packed_as_their_weights_are(kind):
    """From bytes of a file and from the package's floats: within a step, and those of Q5_0 to the bit."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (70, 2 * size), np.uint8)
    scales = generator.normal(0.0, 0.01, (70, 2, 2)).astype(np.float16).view(np.uint8)
    places = {"Q4_K": [0, 2], "Q6_K": [208]}.get(kind, [0])  # of numbers in fp16 in a block
    for at in (start + place for start in (0, size) for place in places):
        data[:, at : at + 2] = scales[:, at // size, :2]

    class File:
        shape, device = torch.Size((70, 2 * block)), torch.device("cpu")

        def pieces(self, rows):
            return [Blocks(kind, data[:40][rows]), Blocks(kind, data[40:][rows])]

    plain = torch.from_numpy(gguf.dequantize(data, number)).view(70, -1)
    if kind == "Q5_0":
        assert torch.equal(PackedLinear(File(), None, "int5").dense(), plain)
    for storage, steps in (("int8", 127), ("int5", 16), ("int4", 15)):
        blocks, floats = PackedLinear(File(), None, storage), PackedLinear(plain, None, storage)
        step = plain.view(70, -1, 32).abs().amax(-1, keepdim=True) * 2 / steps
        apart = (blocks.dense() - floats.dense()).view(70, -1, 32).abs()
        assert (apart <= 1.1 * step).all() and (apart == 0).float().mean() > (0.3 if storage == "int5" else 0.99)
    data[5, places[0] : places[0] + 2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        PackedLinear(File(), None, "int8")


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", "F32"), ("qwen2", "Q8_0"), ("gemma3", "Q4_0"), ("qwen3", "F16"), ("llama", "Q5_0")],
)
def test_a_gguf_file_is_read_and_kept_packed(arch, kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install plait-ml[huggingface]")
    class_name, settings = CASES[{"llama": "llama-linear", "qwen3": "qwen3-tied"}.get(arch, arch)]
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
    rope = {} if arch == "gemma3" else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    more = (
        {"layer_types": None, "num_hidden_layers": 6, "rope_parameters": None, "query_pre_attn_scalar": 32}
        if arch == "gemma3"
        else {}
    )
    settings = {**settings, **wide, **rope, **more, "attention_bias": False}
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{class_name}Config")(**settings))
    randomise(model, 5)
    model.save_pretrained(tmp_path / "theirs")
    make_tokenizer().save(str(tmp_path / "theirs" / "tokenizer.json"))
    edit_config(tmp_path / "theirs", head_dim=32)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "theirs", file, arch, kind)

    # The weights as the file has them, in transformers' model.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and kind != "F32":
                code = gguf.GGMLQuantizationType[kept_as(name, kind)]
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), code), code)
                parameter.copy_(torch.from_numpy(rounded).view(parameter.shape))
    ids = torch.randint(SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model.eval()(ids).logits
        ours = huggingface.load(file)
        got = our_logits(ours.model, ids)[..., :SIZE]
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert ours.text.encode("the cat sat") == make_tokenizer().encode("the cat sat").ids
    assert ours.model.vocabulary.end == 256

    for precision, limit in (("bf16", 0.1), ("fp16", 0.01), ("int8", 0.2), ("auto", 0.4)):
        kept = plait.load(file, device="cpu", precision=precision).checkpoint.model
        apart = (our_logits(kept, ids)[..., :SIZE] - wanted).abs().max() / wanted.abs().max()
        assert apart < limit, precision  # which no NaN is

    packed = plait.load(file, device="cpu")
    assert packed.checkpoint.model.token_embedding.packed is not None
    table = packed.checkpoint.model.token_embedding.table()[:SIZE]
    reference = model.get_input_embeddings().weight
    assert (table - reference).abs().max() < 0.06 * reference.abs().max()  # of 4 bits, a step is a fifteenth
    assert packed.generate("the cat", max_new_tokens=4).startswith("the cat")
    if kind == "Q5_0" and linear_library() is not None:
        block, layer = packed.checkpoint.model.backbone.blocks[0], model.model.layers[0]
        assert (block.qkv.storage, block.attention_out.storage) == ("int8", "int5")
        assert torch.equal(block.attention_out.dense(), layer.self_attn.o_proj.weight)
        parts = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
        assert (block.qkv.dense() - torch.cat(parts)).abs().max() < 0.01 * parts[0].abs().max()

    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(PlaitError, match="cut short"):
        plait.load(file)


# --- what must be refused -----------------------------------------------------------------------------------------


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_config(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", **changes)


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path, keep: float) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * keep)])


def lie(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_slow(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.json")


NORM = "model.norm.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold an object"),
    "architecture": (lambda f: edit_config(f, model_type="mamba"), "unknown architecture 'mamba'"),
    "no architecture": (lambda f: edit_config(f, model_type=None), "unknown architecture None"),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantised"),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "axial", "rope_theta": 1e4}), "'axial'"),
    "longrope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "short_factor",
    ),
    "yarn": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "factor is None"),
    "rope number": (lambda f: edit_config(f, rope_parameters={"rope_theta": "big"}), "rope_theta is 'big'"),
    "llama3 rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "llama3"}), "factor is None"),
    "window": (
        lambda f: edit_config(
            f, use_sliding_window=True, sliding_window=-3, layer_types=["sliding_attention", "full_attention"]
        ),
        "sliding_window is -3",
    ),
    "layer types": (lambda f: edit_config(f, layer_types=["chunked_attention"] * 2), "chunked_attention"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), "hidden_act"),
    "epsilon": (lambda f: edit_config(f, rms_norm_eps=0), "epsilon is 0"),
    "layer types are a number": (lambda f: edit_config(f, layer_types=7), "layer_types is 7"),
    "width": (lambda f: edit_config(f, hidden_size=-5), "hidden_size is -5"),
    "width is text": (lambda f: edit_config(f, hidden_size="48"), "hidden_size is '48'"),
    "heads": (lambda f: edit_config(f, num_key_value_heads=3), "multiple of kv_heads"),
    "layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "layers cannot be meant"),
    "end": (lambda f: edit_config(f, eos_token_id=99_999), "eos_token_id is 99999"),
    "another width": (lambda f: edit_config(f, intermediate_size=81), "mlp.gate_proj.weight has shape"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"lacks tensor {NORM}"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update({"odd": torch.ones(2)})), "unknown tensor model.odd"),
    "misshapen": (lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(7)})), f"{NORM} has shape"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "is of type I8"),
    "not finite": (lambda f: edit_tensors(f, lambda t: t[NORM].fill_(torch.nan)), f"{NORM} holds values"),
    "cut in the data": (lambda f: cut(f, 0.7), "model.safetensors is damaged"),
    "cut in the header": (lambda f: cut(f, 0.001), "model.safetensors is damaged"),
    "empty": (lambda f: cut(f, 0), "model.safetensors is damaged"),
    "header length": (lie, "model.safetensors is damaged"),
    "pickle": (only_bin, "pytorch_model.bin, a format that can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "slow tokenizer": (only_slow, "only a slow tokenizer"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer"),
    "sampling": (
        lambda f: (f / "generation_config.json").write_text('{"do_sample": true, "top_p": "x"}'),
        "generation_config.json is wrong",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_refused_by_name(fault, folders, tmp_path):
    spoil, message = BAD[fault]
    folder = shutil.copytree(folders["qwen3"], tmp_path / "spoilt")
    spoil(folder)
    start = time.monotonic()
    with pytest.raises(PlaitError) as error:
        huggingface.load(folder)
    assert message in str(error.value) and str(folder) in str(error.value)
    assert time.monotonic() - start < 5


def test_bad_shards_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    shards = json.loads(whole)["weight_map"]
    assert len(set(shards.values())) > 2
    first, last = sorted(set(shards.values()))[0], sorted(set(shards.values()))[-1]
    for text, message in [
        ("[]", "has no weight_map"),
        (whole.replace(last, "../" + last), "not a file of this folder"),
        (whole.replace(last, "lost.safetensors"), "lost.safetensors is missing"),
        (json.dumps({"weight_map": dict.fromkeys(shards, first)}), f"{first} lacks tensor"),
    ]:
        index.write_text(text)
        with pytest.raises(PlaitError, match=message):
            huggingface.load(folder)
    index.write_text(whole)
    (folder / last).write_bytes((folder / last).read_bytes()[:-1])
    with pytest.raises(PlaitError, match=f"{last} is damaged"):
        huggingface.load(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of containers are Linux's")
def test_too_little_memory_is_told_before_loading(folders, tmp_path, monkeypatch):
    """In a container that leaves too little: which precision would fit, or that none does."""
    folder = folders["qwen3"]
    weights = sum(p.numel() for p in huggingface.load(folder).model.parameters())
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("0")
    for size, precision, message in (
        (4.5, "fp32", None), (3.0, "fp32", "With --precision bf16"), (1.5, "fp32", "With --precision int8"),
        (3.0, "bf16", None), (1.5, "int8", None), (0.1, "int8", "Even int4 takes"),
    ):  # fmt: skip
        (tmp_path / "memory.max").write_text(str(int(size * weights)))
        if message is None:
            plait.load(folder, "cpu", precision)
            continue
        with pytest.raises(PlaitError, match=message):
            plait.load(folder, "cpu", precision)


def test_a_tied_head_that_differs_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(SIZE, 48)}))
    with pytest.raises(PlaitError, match="tie_word_embeddings"):
        huggingface.load(folder)


def test_an_unreachable_name_fails_fast(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:1"):
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            start = time.monotonic()
            with pytest.raises(PlaitError, match=r"'nobody/nothing' is not a local folder.*cannot be reached"):
                huggingface.load("nobody/nothing")
            assert time.monotonic() - start < 5
    (tmp_path / "file").write_text("")
    for name, message in [("./no/such/folder", "no folder"), ("a--b", "not a name"), (tmp_path / "file", "is a file")]:
        with pytest.raises(PlaitError, match=message):
            huggingface.load(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: what a model holds, and its files."""

    models: ClassVar[dict[str, Path]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        folder = self.models.get("/".join(path[:2]))
        files = sorted(file.name for file in folder.iterdir()) if folder else []
        status, headers, body = 200, {"X-Repo-Commit": "a" * 40}, b""
        if not files:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif path[2:3] == ["resolve"] and path[-1] in files:
            body = (folder / path[-1]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        elif path[2:3] == ["tree"]:
            body = json.dumps(
                [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
            ).encode()
        elif path[2:3] in ([], ["revision"]):
            siblings = [{"rfilename": file} for file in files]
            body = json.dumps({"id": "/".join(path[:2]), "sha": "a" * 40, "siblings": siblings}).encode()
        else:
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_name_is_fetched_once_and_then_read_from_the_cache(monkeypatch, tmp_path, folders):
    import huggingface_hub

    pickled = shutil.copytree(folders["gpt2"], tmp_path / "pickled")
    only_bin(pickled)
    (tmp_path / "one").mkdir()
    extra = shutil.copytree(folders["llama"], tmp_path / "one" / "tiny")
    (extra / "consolidated.safetensors").write_bytes(b"not wanted")
    monkeypatch.setattr(Hub, "models", {"some/tiny": extra, "some/pickled": pickled})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        fetched = huggingface.load("some/tiny")
        with pytest.raises(PlaitError, match="'some/nothing' is neither a local folder nor a model of"):
            huggingface.load("some/nothing")
        with pytest.raises(PlaitError, match=r"some/pickled has its weights only as pytorch_model\.bin"):
            huggingface.load("some/pickled")
        server.shutdown()
        thread.join()
    assert not list((tmp_path / "cache").rglob("consolidated*")) and not list((tmp_path / "cache").rglob("*.bin"))
    again = huggingface.load("some/tiny")
    local = huggingface.load(folders["llama"])
    for name, value in local.model.state_dict().items():
        assert torch.equal(fetched.model.state_dict()[name], value)
        assert torch.equal(again.model.state_dict()[name], value)
    # A download that broke off is not taken for a model.
    next((tmp_path / "cache").rglob("model-00002*.safetensors")).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PlaitError, match=r"the cache lacks model-00002.*cannot be reached"):
        huggingface.load("some/tiny")


# --- growing ------------------------------------------------------------------------------------------------------

COLUMNS = {"image": "image", "en": "text", "audio": "audio"}
LEVELS = {"image": [4, 3], "audio": [5, 3]}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-tied"])
def test_extending_keeps_the_old_model_and_adds_middling_rows(name, folders):
    torch.manual_seed(0)
    source = huggingface.load(folders[name])
    old = source.model
    wide = Vocabulary(text=SIZE, columns=COLUMNS, levels=LEVELS, closers=["audio"], end_id=256)
    settings = {"image": {"levels": LEVELS["image"]}, "audio": {"levels": LEVELS["audio"]}}
    config = ModelConfig(
        backbone=old.config.backbone, vocabulary=wide, embed_dim=16, tied=old.config.tied, modalities=settings
    )
    grown = extend(source, config)
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        logits = our_logits(grown, ids)
        assert torch.equal(logits[..., :SIZE], our_logits(old, ids)[..., :SIZE])
    for rows in [grown.token_embedding] if old.config.tied else [grown.token_embedding, grown.lm_head]:
        table, known = rows.table(), rows.free[:SIZE]
        new = table[SIZE:]
        assert new.std(0).min() > 0 and (new.mean(0) - known.mean(0)).abs().max() < 0.5 * known.std()
        assert new.std(0).mean() < known.std(0).mean()

    # With an end of our own, and without the ids that the tokenizer does not have: as training asks for it.
    ours = wide.model_copy(update={"text": source.text.size, "end_id": None})
    short = extend(source, config.model_copy(update={"vocabulary": ours}))
    assert torch.equal(short.token_embedding.free[ours.end], old.token_embedding.free[256])
    assert torch.equal(our_logits(short, ids)[..., : ours.text], our_logits(old, ids)[..., : ours.text])

    # What was grown can be grown again: rows go with their names, not with their ids.
    swapped = config.model_copy(
        update={
            "vocabulary": wide.model_copy(
                update={"columns": {"de": "text", **COLUMNS}, "levels": {"audio": [5, 3], "image": [6, 3]}}
            ),
            "modalities": {"audio": settings["audio"], "image": {"levels": [6, 3]}},
        }
    )
    again = extend(grown, swapped)
    start, stop = swapped.vocabulary.id_ranges["audio"]
    first, last = wide.id_ranges["audio"]
    assert (
        torch.equal(again.token_embedding.of_type("audio"), grown.token_embedding.of_type("audio"))
        and stop - start == last - first
    )
    assert torch.equal(
        again.token_embedding.free[swapped.vocabulary.opener("en")], grown.token_embedding.free[wide.opener("en")]
    )
    assert torch.equal(again.project.weight, grown.project.weight)
    for key, value in grown.modalities["audio"].state_dict().items():
        assert torch.equal(again.modalities["audio"].state_dict()[key], value)


def test_extending_refuses_another_backbone_or_vocabulary(folders):
    source = huggingface.load(folders["gpt2-untied"])
    config = source.model.config
    for change, message in [
        ({"backbone": config.backbone.model_copy(update={"layers": 3})}, "layers is 2, the recipe's 3"),
        ({"backbone": config.backbone.model_copy(update={"max_length": 600})}, "512 positions"),
        ({"vocabulary": config.vocabulary.model_copy(update={"text": 400})}, "text vocabulary"),
        ({"vocabulary": config.vocabulary.model_copy(update={"text": 290})}, "text vocabulary"),
        ({"vocabulary": config.vocabulary.model_copy(update={"end_id": 7})}, "text vocabulary"),
        ({"tied": True}, "head of its own"),
    ]:
        with pytest.raises(PlaitError, match=message):
            extend(source, config.model_copy(update=change))


# --- export -------------------------------------------------------------------------------------------------------

SWITCHES = {
    "qwen3": {},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama-bias": {"qk_norm": False, "bias": True,
                   "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    "gpt2": {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "qk_norm": False, "kv_heads": 4,
             "head_width": 12},
    "gpt2-bias": {"position": "learned", "norm": "layer", "activation": "gelu", "qk_norm": False, "kv_heads": 4,
                  "head_width": 12, "qkv_bias": True, "bias": True},
}  # fmt: skip


def make_plait(switches: dict, tied: bool = False) -> Checkpoint:
    torch.manual_seed(3)
    text = Text.train(WORDS, 300)
    backbone = TransformerConfig(
        **{
            "width": 48,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_width": 16,
            "hidden": 80,
            "max_length": 256,
            **switches,
        }
    )
    vocabulary = Vocabulary(text=text.size, columns=COLUMNS, levels=LEVELS, closers=["audio"])
    settings = {"image": {"levels": LEVELS["image"]}, "audio": {"levels": LEVELS["audio"]}}
    model = Multimodal(
        ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=16, tied=tied, modalities=settings)
    ).eval()
    randomise(model.backbone, 5)
    return Checkpoint(model, text)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_runs_what_we_trained(name, tied, tmp_path):
    checkpoint = make_plait(SWITCHES[name], tied)
    model, vocabulary = checkpoint.model, checkpoint.model.vocabulary
    assert export_transformers(checkpoint, tmp_path / "out") == name.split("-")[0]
    assert "not pixels or audio" in (tmp_path / "out" / "README.md").read_text()
    reader = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert reader.config.vocab_size == vocabulary.size and reader.dtype is torch.float32
    ids = torch.randint(vocabulary.size, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (reader(ids).logits - our_logits(model, ids)).abs().max() < 1e-4

    prompt = [*checkpoint.text.encode("the cat"), vocabulary.opener("image")]
    transformers.set_seed(0)
    out = reader.generate(torch.tensor([prompt]), max_new_tokens=200, min_new_tokens=200)[0].tolist()
    assert len(out) == len(prompt) + 200 and max(out) < vocabulary.size and vocabulary.pad not in out

    # And what it wrote comes back through our own door.
    back = huggingface.load(tmp_path / "out").model
    with torch.inference_mode():
        assert (our_logits(back, ids)[..., : vocabulary.size] - our_logits(model, ids)).abs().max() < 1e-4


def test_the_exported_tokenizer_has_our_ids_and_plain_user_text(tmp_path, folders):
    checkpoint = make_plait({})
    vocabulary, text = checkpoint.model.vocabulary, checkpoint.text
    export_transformers(checkpoint, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == vocabulary.size
    names = vocabulary.names()
    assert tokenizer.convert_tokens_to_ids(names) == list(range(vocabulary.text, vocabulary.size))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (vocabulary.end, vocabulary.pad)
    for sample in [*WORDS, "e\u0301 <|image|> <|image:3|> <|endoftext|>", "<|/audio|>", " "]:
        plain = tokenizer(sample, split_special_tokens=True).input_ids
        assert plain == text.encode(sample) and max(plain) < vocabulary.text
        assert tokenizer.decode(text.encode(sample)) == text.decode(text.encode(sample))

    # An import whose tokenizer is shorter than its vocabulary, and has an end token of its own.
    source = huggingface.load(folders["gpt2"])
    wide = Vocabulary(text=SIZE, columns={"image": "image"}, levels={"image": [4, 3]}, closers=[], end_id=256)
    backbone = source.model.config.backbone
    settings = {"image": {"levels": [4, 3]}}
    config = ModelConfig(backbone=backbone, vocabulary=wide, embed_dim=0, tied=True, modalities=settings)
    export_transformers(Checkpoint(extend(source, config), source.text), tmp_path / "grown")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert len(tokenizer) == wide.size and tokenizer.convert_tokens_to_ids("<|image|>") == wide.opener("image")
    assert tokenizer.convert_tokens_to_ids("<|plait:endoftext|>") == SIZE
    assert tokenizer.convert_tokens_to_ids("<|image:11|>") == wide.size - 1


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_export_chats_in_plain_transformers_and_ends_where_ours_ends(folders, tmp_path):
    """A template of special tokens, whose end of a turn is missing from generation_config.json, as in real folders."""
    folder = shutil.copytree(folders["qwen2"], tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    messages = [{"role": "user", "content": "the cat"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]

    # What it would write at some place becomes the end of a turn: the rows of the two are swapped.
    reader = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    free = reader.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    place = max(free.index(id) for id in free)
    assert place > 3

    def swap(tensors: dict) -> None:
        rows = tensors["lm_head.weight"]
        rows[[free[place], end]] = rows[[end, free[place]]]

    edit_tensors(folder, swap)
    model = plait.load(folder, device="cpu", precision="fp32")
    asked = Chat(model).prompt([Turn("user", ["the cat"])])
    assert asked.context.ids == prompt[0].tolist()
    ours = model.continue_text([asked.context], stop=list(asked.stop), max_new_tokens=100)[0]
    assert ours == model.checkpoint.text.decode(free[:place])

    export_transformers(model.checkpoint, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    reader = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert torch.equal(again, prompt)
    reply = reader.generate(again, max_new_tokens=100, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert reply == [*free[:place], end]
    assert theirs.decode(reply, skip_special_tokens=True) == ours


def test_an_export_of_our_own_turns_is_read_through_its_template(tmp_path):
    """Trained on conversations, with tokens for who speaks."""
    checkpoint = make_plait({})
    vocabulary = checkpoint.model.vocabulary.model_copy(update={"turns": ["system", "user", "assistant", "tool"]})
    config = checkpoint.model.config.model_copy(update={"vocabulary": vocabulary})
    checkpoint.text.settings["chat_template"] = TEMPLATE
    checkpoint = Checkpoint(extend(checkpoint, config), checkpoint.text)
    export_transformers(checkpoint, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "the cat"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text, end = checkpoint.text.encode("the cat"), vocabulary.end
    assert ids == [vocabulary.opener("user"), *text, end, vocabulary.opener("assistant")]
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == end == tokenizer.eos_token_id


def test_what_no_architecture_computes_is_refused(tmp_path):
    for switches, message in [
        ({"norm": "layer"}, "position rotary, norm layer"),
        ({"bias": True}, "Qwen3's feed-forward"),
        ({"position": "learned", "norm": "layer", "activation": "gelu"}, "no qk_norm"),
        ({"position": "learned", "norm": "layer", "activation": "gelu", "qk_norm": False}, "grouped heads"),
        ({"qk_norm": False, "heads": 5, "kv_heads": 1}, "multiple of heads"),
    ]:
        checkpoint = make_plait(switches)
        for name, parameter in checkpoint.model.named_parameters():
            if name.endswith("bias"):
                parameter.data += 0.1
        with pytest.raises(PlaitError, match=message):
            export_transformers(checkpoint, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("mine")
    for export in (export_transformers, export_onnx):
        with pytest.raises(PlaitError, match="not an empty folder"):
            export(make_plait({}), tmp_path / "full")
    assert (tmp_path / "full" / "letters.txt").read_text() == "mine"


@pytest.mark.parametrize("switches", [{}, SWITCHES["gpt2"], {"norm": "layer", "activation": "gelu", "qk_norm": False}])
def test_onnx_gives_the_same_logits(switches, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install plait-ml[onnx]")
    checkpoint = make_plait(switches)
    assert export_onnx(checkpoint, tmp_path / "out") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in [(1, 3), (4, 90), (2, 256)]:
        ids = torch.randint(checkpoint.model.vocabulary.size, shape)
        with torch.inference_mode():
            wanted = our_logits(checkpoint.model, ids).numpy()
        assert abs(session.run(None, {"input_ids": ids.numpy()})[0] - wanted).max() < 1e-4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_counting_forbids_what_the_grammar_does_and_changes_nothing_else():
    model = make_plait({"kv_heads": 4}).model
    vocabulary, old = model.vocabulary, model.config.backbone.width
    spans = {
        "text": Span("text", 0, vocabulary.text + 1, vocabulary.end),
        "image": Span("image", *vocabulary.id_ranges["image"], None, least=9, limit=9),
        "audio": Span("audio", *vocabulary.id_ranges["audio"], vocabulary.closer("audio"), unit=2, least=2, limit=40),
    }
    (image, audio), closer = (vocabulary.id_ranges[name] for name in ("image", "audio")), vocabulary.closer("audio")
    groups = [vocabulary.id_ranges["text"], image, (audio[0], closer), (closer, closer + 1)]
    draw = np.random.default_rng(0)
    wanted = []  # an opener's sequence, and for each place after the opener the groups that are impossible
    for column, (start, stop), limit in (("image", image, 9), ("audio", (audio[0], closer), 40)):
        ids = [*draw.integers(0, 256, 5), vocabulary.opener(column), *draw.integers(start, stop, limit)]
        impossible = []
        for n in range(limit + 1):
            if column == "image":
                impossible.append({1, 2, 3} if n == limit else {0, 2, 3})
            else:
                impossible.append({0, 1, 2} if n == limit else {0, 1} if n and n % 2 == 0 else {0, 1, 3})
        wanted.append((torch.tensor(ids)[None], impossible))
    with torch.inference_mode():
        wide = widened(model, channels_for(model.config, spans, len(groups)))
        plain = [our_logits(wide, ids)[0] for ids, _ in wanted]
        count_codes(wide, old, spans, groups, [ids[0].tolist() for ids, _ in wanted])
        for (ids, impossible), before in zip(wanted, plain, strict=True):
            assert (before - our_logits(model, ids)[0]).abs().max() < 1e-4
            added = our_logits(wide, ids)[0] - before
            text = vocabulary.id_ranges["text"][1]
            assert added[:5, :text].abs().max() < 1e-4 and added[:5, text:].max() < -20  # the prompt
            for row, lost in zip(added[5:], impossible, strict=True):
                end = row[vocabulary.end].clone()
                if 0 not in lost:  # nothing of text but the end, after a whole image
                    assert abs(end) < 1 and row[: vocabulary.text].max() < -20
                row[: vocabulary.id_ranges["text"][1]] = end
                for number, (start, stop) in enumerate(groups):
                    part = row[start:stop]
                    assert part.max() - part.min() < 1e-3
                    assert part.max() < -20 if number in lost else part.abs().max() < 1


@pytest.mark.parametrize("name", ["gpt2-bias", "llama-bias"])
def test_where_nothing_can_be_counted_the_model_stays(name):
    model = make_plait(SWITCHES[name], tied=True).model
    spans = {"image": Span("image", *model.vocabulary.id_ranges["image"], None, least=9, limit=9)}
    assert channels_for(model.config, spans, 4) == 0
    ids = torch.randint(model.vocabulary.size, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (our_logits(widened(model, 0), ids) - our_logits(model, ids)).abs().max() < 1e-4


def test_an_exported_run_keeps_its_spans_without_our_grammar(trained, request, tmp_path):
    plait_command = request.getfixturevalue("plait")  # the package has the name here
    assert plait_command("export", trained, "-o", tmp_path / "out") == 0
    mine = plait.load(trained, device="cpu", precision="fp32")
    model, vocabulary = mine.checkpoint.model, mine.vocabulary
    reader = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.randint(vocabulary.size, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = reader(ids).logits, our_logits(model, ids)
    for token_type, (
        start,
        stop,
    ) in vocabulary.id_ranges.items():  # within a space nothing moved, but its closer as one
        stop -= token_type in vocabulary.closers
        pair = [logits[..., start:stop].log_softmax(-1) for logits in (theirs, ours)]
        assert (pair[0] - pair[1]).abs().max() < 1e-4
    transformers.set_seed(0)
    for column, token_type in vocabulary.columns.items():
        context = [*tokenizer("red disc").input_ids, vocabulary.opener(column)]
        made = reader.generate(torch.tensor([context] * 16), max_new_tokens=60, pad_token_id=vocabulary.pad)
        start, stop = vocabulary.id_ranges[token_type]
        wrong = total = 0
        for row in made[:, len(context) :].tolist():
            row = row[: row.index(vocabulary.end)] if vocabulary.end in row else row
            total += len(row)
            wrong += sum(not start <= token < stop for token in row)
        assert not wrong, (column, wrong, total)
