"""Texts that the server writes: log probabilities that align with them, and texts held to a schema or a grammar."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.inference.model import PlaitModel
from server import Server, is_error, write_imports, write_text_model

transformers = pytest.importorskip("transformers")
PROMPT = "the café sat"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {**write_imports(folder), "letters": write_text_model(folder / "letters")}


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(tmp_path_factory.mktemp("log") / "log", *models.values()) as running:
        yield running


def complete(server: Server, model: str, **body: Any) -> dict[str, Any]:
    status, made = server.post("/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 20, **body})
    assert status == 200, made
    choice: dict[str, Any] = made["choices"][0]
    return choice


# --- log probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bytes", "pieces", "letters"])
def test_tokens_are_the_text(server: Server, model: str) -> None:
    for seed in range(12):
        body = {"temperature": 1.5, "seed": seed, "logprobs": 2, "echo": seed % 2 == 0}
        choice = complete(server, model, **body)
        text, found = choice["text"], choice["logprobs"]
        assert "".join(found["tokens"]) == text
        pairs = list(zip(found["text_offset"], found["tokens"], strict=True))
        assert all(text[at : at + len(token)] == token for at, token in pairs)
        lines = server.ask("POST", "/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 20, **body,
                                                       "stream": True})[2].decode().split("\n\n")  # fmt: skip
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        for name in ("tokens", "text_offset", "top_logprobs"):
            every = [value for part in streamed for value in part[name]]
            # That a character stays cut is known only when the end comes.
            assert every[:-1] == found[name][: len(every)][:-1] and len(every) > 3
        chat = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 1.5,
                "seed": seed, "logprobs": True, "top_logprobs": 3}  # fmt: skip
        status, made = server.post("/v1/chat/completions", chat)
        assert status == 200, made
        choice = made["choices"][0]
        tokens = choice["logprobs"]["content"]
        spelt = bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace")
        pieces = "".join(token["token"] for token in tokens)
        assert pieces.strip().startswith(choice["message"]["content"].strip())
        if "\ufffd" not in spelt:  # tokenizers do not agree on how many marks stand for what is no character
            assert spelt.strip() == pieces.strip()
        assert all(len(token["top_logprobs"]) == 3 for token in tokens)
        assert all(t["top_logprobs"][0]["logprob"] >= t["logprob"] - 1e-5 for t in tokens)


@pytest.mark.parametrize("model", ["bytes", "pieces"])
def test_prompts_are_scored_as_transformers_does(server: Server, models: dict[str, Path], model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[model])
    network = transformers.AutoModelForCausalLM.from_pretrained(models[model]).eval()
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    with torch.inference_mode():
        scores = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(scores[i, id_]) for i, id_ in enumerate(ids[1:])]
    for most in (0, 1):
        choice = complete(server, model, prompt=ids, max_tokens=most, logprobs=2, echo=True)
        found = choice["logprobs"]
        assert choice["finish_reason"] in ("length", "stop") and choice["text"].startswith(PROMPT)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
        assert len(found["tokens"]) == len(ids) + most
        for i, top in enumerate(found["top_logprobs"][1 : len(ids)]):
            assert max(top.values()) == pytest.approx(float(scores[i].max()), abs=1e-4)
    assert complete(server, model, max_tokens=0)["text"] == ""


def test_tokens_there_and_back(server: Server, models: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["bytes"])
    status, made = server.post("/tokenize", {"model": "bytes", "prompt": PROMPT})
    assert status == 200 and made["tokens"] == tokenizer.encode(PROMPT) and made["count"] == len(made["tokens"])
    assert server.post("/detokenize", {"model": "bytes", "tokens": made["tokens"]})[1]["prompt"] == PROMPT
    assert server.post("/detokenize", {"model": "bytes", "tokens": [999_999]})[0] == 400


# --- constraints ------------------------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose texts are bounded, so that a model that knows nothing comes to their end."""
    kinds = ["string", "integer", "boolean", "enum", "null", "pattern", *(["object", "array", "any"] * (depth < 3))]
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "object":
        names = rng.sample(["name", "größe", "tags", 'a "quoted" one', "x", "y_1"], rng.randint(1, 4))
        return {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names, "additionalProperties": False}  # fmt: skip
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": 1, "maxItems": rng.randint(1, 3)}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
    if kind == "enum":
        return {"enum": rng.sample(["red", "blue", 1, 2.5, None, True, "é"], 3)}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-c]{2,4}(-[0-9]{1,2})?$"}
    return {"string": {"type": "string", "maxLength": rng.randint(1, 6)}, "null": {"type": "null"},
            "integer": {"type": "integer", "minimum": -5, "maximum": rng.randint(1, 900)},
            "boolean": {"type": "boolean"}}[kind]  # fmt: skip


def check_schemas(folder: Path, count: int) -> None:
    """In one batch, beside a free text that must not notice."""
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    model = plait.load(folder)
    assert isinstance(model, PlaitModel)
    rng = random.Random(count)
    schemas = [random_schema(rng) for _ in range(count)]
    context = model.context("the cat")
    free = model.request(context, "text", seed=1, temperature=1.0, max_new_tokens=40)
    alone = model.engine.run([free])[0].samples[0].ids
    requests = [
        model.request(context, "text", seed=i, temperature=1.0, constraint=model.constraint(schema=schema))
        for i, schema in enumerate(schemas)
    ]
    results = model.engine.run([*requests, free])
    assert results[-1].samples[0].ids == alone
    for schema, result in zip(schemas, results, strict=False):
        sample = result.samples[0]
        if sample.finish == "end":  # else it did not fit into the model's context
            assert jsonschema_rs.is_valid(schema, json.loads(sample.text or "")), (schema, sample.text)
    assert sum(result.samples[0].finish == "end" for result in results[:-1]) >= 0.9 * count


def test_schemas(models: dict[str, Path]) -> None:
    check_schemas(models["letters"], 20)
    check_schemas(models["pieces"], 10)


@pytest.mark.slow
def test_many_schemas(models: dict[str, Path]) -> None:
    for name in models:
        check_schemas(models[name], 200)


def test_constraints_of_python(models: dict[str, Path]) -> None:
    model = plait.load(models["bytes"])
    assert isinstance(model, PlaitModel)
    assert model.generate("the", choice=["yes", "no, never"], seed=3, do_sample=True) in ("yes", "no, never")
    found = model.generate("the", regex="[ab]{3,5}c", n=3)
    assert all(3 <= len(text) - 1 <= 5 and set(text[:-1]) <= set("ab") and text[-1] == "c" for text in found)
    assert model.generate("the", grammar='root ::= "x" [0-9] [0-9] "z"')[::3] == "xz"
    with pytest.raises(plait.PlaitError, match="one constraint"):
        model.generate("the", regex="a", choice=["a"])
    for wrong in ({"regex": "(a"}, {"grammar": "root ::= x"}, {"choice": []}, {"schema": {"type": "nope"}},
                  {"schema": {"$ref": "https://example.org/x"}}, {"regex": "a" * 70_000}):  # fmt: skip
        with pytest.raises(plait.PlaitError):
            model.generate("the", **wrong)
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(plait.PlaitError, match="deeper"):
        model.generate("the", schema=deep)


CAT = {"type": "object", "properties": {"cat": {"type": "boolean"}}, "required": ["cat"], "additionalProperties": False}
HELD: list[tuple[dict[str, Any], set[str] | None]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": CAT}}},
     {'{"cat": true}', '{"cat": false}'}),
    ({"response_format": {"type": "json_object"}}, None),
    ({"structured_outputs": {"json": CAT}}, {'{"cat": true}', '{"cat": false}'}),
    ({"guided_json": json.dumps(CAT)}, {'{"cat": true}', '{"cat": false}'}),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
    ({"guided_regex": "(yes|no)!"}, {"yes!", "no!"}),
    ({"grammar": 'root ::= "on" | "off"'}, {"on", "off"}),
    ({"json_schema": CAT}, {'{"cat": true}', '{"cat": false}'}),
]  # fmt: skip


@pytest.mark.parametrize(("how", "wanted"), HELD)
def test_constraints_over_http(server: Server, how: dict[str, Any], wanted: set[str] | None) -> None:
    chat = {"model": "pieces", "messages": [{"role": "user", "content": "a cat?"}], "temperature": 1, "seed": 4, **how}
    for path, body in (("chat/completions", chat), ("completions", {**chat, "prompt": "a cat?", "max_tokens": 100})):
        status, headers, answer = server.ask("POST", f"/v1/{path}", body)
        choice = json.loads(answer)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert status == 200 and "response_format" not in headers.get("x-plait-ignored", "")
        assert text.startswith("{") if wanted is None else text in wanted and choice["finish_reason"] == "stop", text


def test_constraints_of_strangers(server: Server) -> None:
    for how in (
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "yaml"}},
        {"guided_regex": "(a"},
        {"grammar": "root ::= x"},
        {"guided_regex": "a" * 70_000},
        {"guided_regex": "(((a{1,99}){1,99}){1,99}){1,99}" * 50},
        {"guided_json": {"$ref": "file:///etc/passwd"}},
        {"guided_json": "{", "max_tokens": 2},
        {"guided_json": {"type": "string"}, "guided_regex": "a"},
    ):
        status, _, answer = server.ask("POST", "/v1/completions", {"model": "bytes", "prompt": "a", **how})
        assert status == 400 and is_error(status, answer), (how, answer)
