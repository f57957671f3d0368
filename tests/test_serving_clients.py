"""What clients send beside what a server needs: taken, and named in a header; refused only where it must be."""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from plait.server.limits import new_key
from server import Server, is_error, write_text_model

HI = [{"role": "user", "content": "the cat"}]
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"type": "function", "function": {"name": "read", "strict": None, "parameters": PATH}}


def _png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Client -> (fields of the request, those that have no effect).
CHAT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, set()),
    "usage in a stream": ({"stream": True, "stream_options": {"include_usage": True, "new": 1}}, set()),
    "effort": ({"reasoning": {"effort": "low"}, "reasoning_effort": "low", "verbosity": "low"},
                  {"reasoning", "reasoning_effort", "verbosity"}),
    "ids of a chat": ({"chat_id": "x", "session_id": "y", "features": {"web_search": False}, "params": {}},
                      {"chat_id", "session_id", "features", "params"}),
    "more tokens than there is room for": ({"max_tokens": 2048, "temperature": 0}, set()),
    "both names": ({"max_tokens": 5, "max_completion_tokens": 5}, set()),
    "no bound": ({"max_tokens": -1, "top_k": -1, "ignore_eos": False}, set()),
    "empty lists": ({"stop": [], "tools": [], "prompt_cache_key": "x"}, {"prompt_cache_key"}),
    "tools that may be left": ({"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
                               {"tools"}),
    "penalties": ({"presence_penalty": 0, "frequency_penalty": 0.5, "logit_bias": {"1": 2}, "n": 1, "user": "656"},
                  {"presence_penalty", "frequency_penalty", "logit_bias", "user"}),
    "vllm": ({"top_k": 20, "min_p": 0.0, "repetition_penalty": 1.1, "min_tokens": 1,
              "chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs"}),
    "llama.cpp": ({"cache_prompt": True, "repeat_penalty": 1.1, "typical_p": 1}, {"cache_prompt", "typical_p"}),
    "ollama": ({"keep_alive": "5m", "options": {"num_ctx": 4096}}, {"keep_alive", "options"}),
    "a grammar of another server": ({"guided_decoding_backend": "x", "chat_template": "{{x}}"},
                                    {"guided_decoding_backend", "chat_template"}),
    "odd names": ({"x-odd[0]": 1, "ab\r\nset-cookie: x": 1}, {"x-odd[0]"}),
    "nulls": (dict.fromkeys(("temperature", "top_p", "stop", "n", "stream", "stream_options", "response_format",
                             "max_tokens", "modalities", "audio", "column", "seed", "logprobs", "tools")), set()),
    "stream options without a stream": ({"stream_options": {"include_usage": True}}, set()),
    "history": ({"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {**HI[0], "name": "Ada"}, {"role": "assistant", "content": "sat", "reasoning_content": "", "audio": None},
        {"role": "assistant", "content": ""}, {"role": "user", "content": [{"type": "input_text", "text": "on?"}]},
    ]}, set()),
}  # fmt: skip


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("clients") / "letters")


@pytest.fixture(scope="module")
def server(trained: Path, letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lenient")
    with Server.start(folder / "log", trained, f"text={letters}", "--alias", "gpt-4o=text") as running:
        yield running


@pytest.mark.parametrize("name", CHAT)
def test_what_can_be_ignored_is(server: Server, name: str) -> None:
    more, ignored = CHAT[name]
    body = {"model": "gpt-4o", "messages": HI, "max_tokens": 8, **more}
    status, headers, answer = server.ask("POST", "/chat/completions", body)
    assert status == 200, answer
    assert set(filter(None, headers.get("x-plait-ignored", "").split(", "))) == ignored


def test_ignored_fields_are_counted(server: Server) -> None:
    before = server.metric("plait_ignored_fields_total")
    server.post("/v1/completions", {"model": "text", "prompt": "a", "suffix": "b", "best_of": 3, "max_tokens": 2,
                                    "stop": list("defghi")})  # fmt: skip
    assert server.metric("plait_ignored_fields_total") == before + 2


def test_media_in_other_spellings(server: Server) -> None:
    url = _png()
    found = []
    for part in (
        {"type": "image_url", "image_url": {"url": url, "detail": "original"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}},
    ):
        status, made = server.post("/v1/chat/completions", {"model": "run", "messages": [
            {"role": "user", "content": [part]}]})  # fmt: skip
        assert status == 200, made
        found.append(made["choices"][0]["message"]["content"])
    assert len(set(found)) == 1
    drawn = {"model": "run", "prompt": "red bar", "size": "1024x1024", "quality": "hd", "style": "vivid", "seed": 1}
    status, headers, answer = server.ask("POST", "/v1/images/generations", {**drawn, "response_format": "url"})
    assert status == 200 and headers["x-plait-ignored"] == "quality, size, style"
    made = json.loads(answer)
    assert made["size"] == "16x16" and made["data"][0]["url"].startswith("data:image/png")
    assert server.ask("POST", "/v1/audio/speech", {"model": "run", "input": "red bar", "voice": "alloy"})[0] == 200


def test_responses(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "text", "input": [{"role": "user", "content": [{"type": "input_text", "text": "the cat"}]}]}
    whole = client.responses.create(**asked, instructions="be brief", max_output_tokens=8)
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    reply = client.chat.completions.create(model="text", messages=talk, max_tokens=8)
    assert whole.output_text == reply.choices[0].message.content and whole.status == "incomplete"
    assert whole.usage.total_tokens == reply.usage.total_tokens
    with client.responses.stream(**asked, instructions="be brief", max_output_tokens=8) as stream:
        events = list(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[0].type == "response.created"
    schema = {"type": "object", "properties": {"cat": {"type": "boolean"}}, "required": ["cat"],
              "additionalProperties": False}  # fmt: skip
    held = client.responses.create(model="text", input="a cat?", text={
        "format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})  # fmt: skip
    assert set(json.loads(held.output_text)) == {"cat"} and held.status == "completed"
    seen = client.responses.create(model="run", input=[{"role": "user", "content": [
        {"type": "input_image", "image_url": _png(), "detail": "auto"}]}])  # fmt: skip
    assert seen.output_text
    assert server.post("/v1/responses", {**asked, "previous_response_id": "x"})[0] == 400


NULLS = [
    ("embeddings", {"input": "x", "encoding_format": None, "dimensions": None, "user": None}),
    ("audio/speech", {"input": "red bar", "response_format": None, "stream_format": None, "voice": None}),
    ("plait/classify", {"input": "red bar", "top": None, "labels": None, "column": None}),
    ("plait/explain", {"input": "red bar", "method": None, "seed": None, "image": None, "steps": None}),
    ("chat/completions", {"messages": HI, "modalities": ["audio"], "audio": {"voice": None, "format": None}}),
    ("images/generations", {"prompt": "red bar", "response_format": None, "n": None, "size": None}),
]


@pytest.mark.parametrize(("path", "body"), NULLS)
def test_null_is_as_if_it_were_not_there(server: Server, path: str, body: dict[str, Any]) -> None:
    status, _, answer = server.ask("POST", f"/v1/{path}", {"model": "run", **body})
    assert status == 200, answer


def test_many_embeddings(server: Server) -> None:
    texts = [f"red {i}" for i in range(2048)]
    status, made = server.post("/v1/embeddings", {"model": "run", "input": texts, "encoding_format": "float"})
    assert status == 200 and [one["index"] for one in made["data"]] == list(range(2048))
    one = server.post("/v1/embeddings", {"model": "run", "input": texts[7]})[1]["data"][0]["embedding"]
    assert made["data"][7]["embedding"] == pytest.approx(one, abs=1e-5)


def test_strict_keys_rates_and_reload(letters: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    alice, bob = new_key(keys, "alice"), new_key(keys, "bob", rate=2)
    with Server.start(tmp_path / "log", f"text={letters}", "--strict", "--api-key-file", keys, key=alice) as server:
        body = {"model": "text", "prompt": "a", "max_tokens": 2}
        assert server.post("/v1/completions", {**body, "user": "x"})[0] == 200
        for wrong in ({"wished": 1}, {"frequency_penalty": 0.5}, {"suffix": "b"}):
            status, made = server.post("/v1/completions", {**body, **wrong})
            assert status == 400 and made["error"]["code"] == "unknown_field" and next(iter(wrong)) in str(made)
        assert server.post("/v1/completions", {**body, "model": "gpt-4o-mini"})[0] == 404
        assert server.ask("GET", "/v1/models", headers={"x-api-key": alice}, key=" ")[0] == 401  # two keys
        used = [server.ask("POST", "/v1/completions", body, key=bob) for _ in range(3)]
        assert [status for status, _, _ in used] == [200, 200, 429] and is_error(429, used[2][2])
        assert 1 <= int(used[2][1]["retry-after"]) <= 30
        server.key = ""
        assert server.ask("GET", "/v1/models", headers={"x-api-key": alice})[0] == 200
        keys.write_text("".join(line for line in keys.open() if line.startswith("bob")))
        server.process.send_signal(signal.SIGHUP)
        while server.ask("GET", "/v1/models", headers={"x-api-key": alice})[0] == 200:
            pass
        assert server.ask("GET", "/v1/models", headers={"x-api-key": alice})[0] == 401


def test_one_model_has_any_name(letters: Path, tmp_path: Path) -> None:
    with Server.start(tmp_path / "log", letters) as server:
        for name in ({}, {"model": "gpt-4o-mini"}, {"model": None}, {"model": "letters"}):
            status, headers, answer = server.ask("POST", "/v1/completions", {**name, "prompt": "a", "max_tokens": 2})
            assert status == 200 and json.loads(answer)["model"] == "letters"
            assert ("model" in headers.get("x-plait-ignored", "")) == (name.get("model") == "gpt-4o-mini")
