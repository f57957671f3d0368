"""LoRA between Plait and PEFT: adapters as PEFT's files, read and written with equal outputs, side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import plait
from plait.chat import general
from plait.chat.session import Session
from plait.core.config import Recipe
from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.hf.catalogue import models
from plait.inference.base import Model
from plait.inference.model import attach_adapters, load
from plait.inference.prompts import Chat, Turn
from plait.model.adapted import load_adapted
from plait.training import kept_replies
from plait.training.tasks import derive
from test_huggingface import CASES, CHATML, make_tokenizer, randomise

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Plait = Callable[..., int]
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with random weights in bf16."""
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    torch.manual_seed(1)
    config = transformers.Qwen2Config(**CASES["qwen2"][1])
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, 1)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def theirs(base: Path, **settings: object) -> torch.nn.Module:
    """PEFT's model of a base, with random updates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "init_lora_weights": False, **settings})
    )
    return model.eval()


def logits(model: Model, ids: list[int]) -> torch.Tensor:
    """Of the engine, at the last place."""
    ours = model.plait_model
    assert ours is not None
    from plait.inference.requests import Request
    from plait.model.multimodal import Sequence

    request = Request(
        Sequence().read_ids(ids), max_new_tokens=1, logprobs=True, top_logprobs=9999, adapter=ours.adapter
    )
    top = ours.engine.run([request])[0].samples[0].top
    assert top is not None
    return torch.tensor(top[0].logprobs)[torch.tensor(top[0].ids).argsort()]


def chances(model: Model, ids: list[int]) -> torch.Tensor:
    """Logarithms of the chances of text, after each place: (L, V)."""
    assert model.plait_model is not None
    network, size = model.plait_model.checkpoint.model, model.plait_model.checkpoint.text.size
    with torch.inference_mode():
        hidden = network.backbone(network.token_embedding.table()[ids][None].float())
        return network.logits(hidden)[0, :, :size].float().log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 2}},
    ],
)
def test_peft_adapters_are_read(base: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    network = theirs(base, **settings)
    network.save_pretrained(tmp_path / "adapter")
    model = load(base, "cpu", "fp32")
    ids = model.plait_model.checkpoint.text.encode(PROMPT)
    plain = logits(model, ids)
    twin = attach_adapters(model, {"mine": tmp_path / "adapter"})[0]
    with torch.inference_mode():
        wanted = network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = logits(twin, ids)
    assert torch.allclose(found, wanted[: len(found)], atol=2e-4) and not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(logits(model, ids), plain)  # the base beside it is as it was
    named = load(tmp_path / "adapter", "cpu", "fp32")  # which says what it belongs to
    assert torch.allclose(logits(named, ids), found, atol=1e-5)
    plait.export(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        assert torch.allclose(merged(torch.tensor([ids])).logits[0, -1].log_softmax(-1), wanted, atol=2e-4)


def test_requests_of_several_adapters_share_a_batch(base: Path, tmp_path: Path) -> None:
    folders = {}
    for name, targets in {"a": ["q_proj", "down_proj"], "b": ["o_proj", "gate_proj"]}.items():
        theirs(base, target_modules=targets).save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    model = load(base, "cpu", "fp32")
    twins = attach_adapters(model, folders)
    ours = [model.plait_model, *twins]
    engine = ours[0].engine
    ids = ours[0].checkpoint.text.encode(PROMPT)
    from plait.model.multimodal import Sequence

    def request(one, length):
        return one.request(Sequence().read_ids(ids), "text", max_new_tokens=length, temperature=0)

    alone = [engine.run([request(one, 12)])[0].samples[0].ids for one in ours]
    together = engine.run([request(one, 12 - 3 * i) for i, one in enumerate(ours)])
    assert [len(result.samples[0].ids) for result in together] == [12, 9, 6]
    assert all(
        result.samples[0].ids == one[: 12 - 3 * i] for i, (result, one) in enumerate(zip(together, alone, strict=True))
    )
    assert len({tuple(one) for one in alone}) == 3


def test_a_lora_run_is_written_for_peft(base: Path, tmp_path: Path, plait: Plait) -> None:
    lines = [json.dumps({"text": f"the fox jumps over {i} lazy dogs and a quick brown hen"}) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps({"training": {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "lora": {"rank": 3, "alpha": 6}}})
    )
    run = tmp_path / "run"
    assert plait("prepare", tmp_path / "texts.jsonl", "-o", tmp_path / "data", "--workers", 0) == 0
    assert plait("train", tmp_path / "data", "-o", run, "--recipe", recipe, "--init-from", base) == 0
    assert plait("export", run, "--to", "peft", "-o", tmp_path / "adapter") == 0
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "last").resolve().iterdir())
    assert size < (base / "model.safetensors").stat().st_size
    model = load(run, "cpu", "fp32")
    ids = model.plait_model.checkpoint.text.encode(PROMPT)
    found = logits(model, ids)
    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        before = network(torch.tensor([ids])).logits[0, -1]
        network = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
        wanted = network(torch.tensor([ids])).logits[0, -1]
    count = model.plait_model.checkpoint.model.vocabulary.text
    wanted, found = (x[:count] - x[:count].logsumexp(0) for x in (wanted, found))
    assert torch.allclose(found, wanted, atol=2e-4)
    assert not torch.allclose(before[:count] - before[:count].logsumexp(0), wanted, atol=1e-2)
    apart = load(base, "cpu", "fp32", adapter=run)  # the run's updates beside the base's own weights
    apart = logits(apart, ids)[:count]
    assert torch.allclose(apart - apart.logsumexp(0), found, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "qwen3"])
def test_gguf_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    kind, settings = CASES[name]
    torch.manual_seed(4)
    settings = {**settings, "rope_scaling": None, "rope_parameters": None} if name == "llama" else settings
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in settings.items() if v is not None})
    network = transformers.AutoModelForCausalLM.from_config(config)
    randomise(network, 4)
    network.save_pretrained(tmp_path / "base")
    make_tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    plait.export(tmp_path / "base", tmp_path / "out", to="gguf")
    first, second = load(tmp_path / "base", "cpu", "fp32"), load(tmp_path / "out" / "model.gguf", "cpu", "fp32")
    ids = first.plait_model.checkpoint.text.encode(PROMPT)
    assert second.plait_model.checkpoint.text.encode(PROMPT) == ids
    one, other = logits(first, ids), logits(second, ids)
    assert torch.allclose(one, other, atol=2e-2) and (one - other).abs().mean() < 2e-3


@pytest.fixture
def chat_model(base: Path, tmp_path: Path) -> Path:
    """The base with a chat template, and beside it `talks.jsonl`, eight conversations."""
    folder = shutil.copytree(base, tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    talk = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a quick brown hen"}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(8)))
    return folder


def test_a_lora_run_of_a_chat_model_keeps_its_template(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "QUESTIONS", general.QUESTIONS[:2])
    folder, tokenizer = chat_model, Tokenizer.from_file(str(chat_model / "tokenizer.json"))
    options = {"steps": 2, "batch_size": 2, "init_from": str(folder), "lora": True}
    run = plait.train(tmp_path / "talks.jsonl", tmp_path / "run", progress=False, **options)
    for said in ("the fox", "the <|im_end|> fox"):  # what a user spells is never a token of the template
        prompts = [Chat(one).prompt([Turn("user", [said])]) for one in (plait.load(folder), run.model())]
        assert prompts[0].context.ids == prompts[1].context.ids and prompts[0].stop == prompts[1].stop
        assert prompts[0].context.ids.count(tokenizer.token_to_id("<|im_end|>")) == 1
    assert isinstance("".join(Session(Chat(run.model())).say("the fox", max_new_tokens=3)), str)


def test_what_the_base_replies_is_kept(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base answers by itself; the divergence of what is trained is that of whole distributions, and pulls back."""
    folder = chat_model
    monkeypatch.setattr(general, "QUESTIONS", general.QUESTIONS[:3])
    monkeypatch.setattr(kept_replies, "TOP", 10**6)
    found = {}
    for keep in (0.0, 30.0):
        recipe = {
            "training": {
                "steps": 12, "batch_size": 2, "learning_rate": 0.02, "precision": "fp32",
                "lora": {"keep": keep},
            },
            "model": {"init_from": str(folder)},
        }  # fmt: skip
        run = plait.train(tmp_path / "talks.jsonl", tmp_path / f"run{keep:g}", recipe=recipe, progress=False)
        assert (run.folder / kept_replies.FILE).exists() == bool(keep)
        found[keep] = run.model()
    written = kept_replies.BaseReplies.read(run.folder)
    assert written is not None and run.metadata["prepared"] > written.seconds > 0
    replies = written.replies
    plain = plait.load(folder)
    question = Chat(plain).prompt([Turn("user", [general.QUESTIONS[0]])]).context
    assert replies[0].ids[: replies[0].start] == question.ids
    apart = {}
    for keep, model in found.items():
        values = []
        for reply in replies:
            was, now = (chances(one, reply.ids)[reply.start - 1 : -1] for one in (plain, model))
            assert reply.ids[reply.start] == int(was[0].argmax())
            values.append((was.exp() * (was - now)).sum(-1))
        apart[keep] = torch.cat(values).mean()
    assert apart[30.0] < 0.5 * apart[0.0]

    checkpoint = load_adapted(run.best, merge=False)
    kept = kept_replies.KeptReplies(replies, checkpoint.model, Device("cpu", torch.float32), 1.0, 0)
    monkeypatch.setattr(kept_replies, "EACH", len(replies))
    updates = [p for name, p in checkpoint.model.named_parameters() if ".down." in name or ".up." in name]
    for update in updates:
        update.requires_grad_(True)
    assert kept.backward(0) == pytest.approx(float(apart[30.0]), rel=0.02)
    assert all(update.grad is not None for update in updates)


def test_the_base_is_asked_where_that_is_of_use(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "QUESTIONS", general.QUESTIONS[:3])
    dataset = plait.prepare(tmp_path / "talks.jsonl", tmp_path / "data", progress=False)
    stages, said = [], []

    def ask(base: Path, processes: int = 1) -> bool:
        recipe = Recipe.model_validate({"training": {"lora": {}}, "model": {"init_from": str(base)}})
        kept = general.ask_the_base(
            dataset, tmp_path / "run", recipe, "cpu", processes, lambda *news: stages.append(news[1:3]), said.append
        )
        assert kept == (tmp_path / "run" / kept_replies.FILE).exists()
        rate = derive(dataset, recipe, kept).recipe.training.learning_rate
        assert rate == (5e-4 if kept else 3e-4)
        return kept

    assert not ask(chat_model, processes=2) and said.pop() == kept_replies.SEVERAL
    assert ask(chat_model) and stages == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert ask(chat_model) and len(stages) == 4  # which are kept already
    weights = load_file(chat_model / "model.safetensors")
    save_file({**weights, "model.norm.weight": -weights["model.norm.weight"]}, chat_model / "model.safetensors")
    assert ask(chat_model) and len(stages) == 8  # another model under the same name
    broken = torch.zeros_like(weights["model.norm.weight"])  # which says one token again and again
    save_file({**weights, "model.norm.weight": broken}, chat_model / "model.safetensors")
    assert not ask(chat_model) and "replies to 0 of 3" in said.pop()
    (chat_model / "tokenizer_config.json").unlink()
    assert not ask(chat_model) and "template" in said.pop()


def test_adapters_that_cannot_be_used(base: Path, tmp_path: Path) -> None:
    model = load(base, "cpu", "fp32")
    theirs(base, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    theirs(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    config = transformers.Qwen2Config(**{**CASES["qwen2"][1], "hidden_size": 32, "num_attention_heads": 2})
    other = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(config), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "dora": "use_dora is True", "cut": "cut short", "other": "of another base", "empty": "holds no adapter",
    }.items():  # fmt: skip
        with pytest.raises(PlaitError, match=message):
            attach_adapters(model, {"x": tmp_path / name})


def test_models_on_this_machine_are_listed(
    base: Path, plait: Plait, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    found = models([base.parent], cache=False)
    parameters = transformers.AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert [(one.model_type, one.licence) for one in found] == [("qwen2", "apache-2.0")]
    assert found[0].parameters >= parameters and found[0].memory(16) == 2 * found[0].parameters
    assert "generate" in found[0].verbs and "train --init-from --lora" in found[0].verbs
    assert plait("models", "--models", base.parent, "--no-cache") == 0
    assert "apache-2.0" in capsys.readouterr().out
    assert plait("models", "--models", tmp_path / "nowhere") == 1
