"""The server as clients meet it: a real one in its own process, real clients, a model trained in this session."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from huggingface_hub import InferenceClient
from PIL import Image

import plait as api
from conftest import EN, make_image, tone
from server import Server, is_error, write_text_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    text = write_text_model(folder / "letters")
    with Server.start(folder / "log", trained, f"text={text}") as running:
        yield running


@pytest.fixture(scope="module")
def media() -> tuple[str, str]:
    """(a data: URL of a red bar, base64 of its tone)."""
    rng, buffer = np.random.default_rng(7), io.BytesIO()
    make_image(2, rng).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return url, base64.b64encode(tone(2, rng)).decode()


async def got(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


async def every(stream: Any) -> list[Any]:
    return [event async for event in stream] if hasattr(stream, "__aiter__") else list(stream)


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
def test_openai_client(kind: Any, server: Server, media: tuple[str, str], trained: Path) -> None:
    """Every route, streaming and not."""
    client = kind(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asyncio.run(_routes(client, *media, api.load(trained)))


async def _routes(client: Any, image: str, audio: str, local: Any) -> None:
    assert [model.id for model in (await got(client.models.list())).data] == ["run", "text"]
    assert (await got(client.models.retrieve("run"))).columns["en"] == "text"

    # Chat: what an image and an audio clip are called, as the local model says.
    see = {"type": "image_url", "image_url": {"url": image}}
    hear = {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
    for part, raw in ((see, image.split(",")[1]), (hear, audio)):
        chat = {"model": "run", "messages": [{"role": "user", "content": [part]}], "logprobs": True, "temperature": 0}
        reply = await got(client.chat.completions.create(**chat))
        wanted = local.generate([base64.b64decode(raw)], to="en")
        assert reply.choices[0].message.content == wanted and reply.choices[0].finish_reason == "stop"
        tokens = reply.choices[0].logprobs.content
        assert "".join(t.token for t in tokens) == wanted and all(t.logprob <= 0 for t in tokens)
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 2
        chunks = await every(
            await got(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
        assert chunks[-1].usage == reply.usage and chunks[-2].choices[0].finish_reason == "stop"
        told = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert [t.token for t in told] == [t.token for t in tokens]
    zh = await got(client.chat.completions.create(**chat, extra_body={"column": "zh"}))
    assert zh.choices[0].message.content == local.generate([base64.b64decode(audio)], to="zh")

    # Chat that draws and speaks: the same seed, the same as the local model draws.
    drawn = await got(client.chat.completions.create(
        model="run", messages=[{"role": "user", "content": "red bar"}], modalities=["text", "image", "audio"],
        audio={"voice": "default", "format": "wav"}, seed=3, n=2,
    ))  # fmt: skip
    messages = [choice.message for choice in drawn.choices]
    images = [_png(message.images[0]["image_url"]["url"].split(",")[1]) for message in messages]
    for a, b in zip(images, local.generate(["red bar"], to="image", n=2, seed=3), strict=True):
        assert np.array_equal(a, np.asarray(b))
    assert soundfile.read(io.BytesIO(base64.b64decode(messages[0].audio.data)))[1] == 8000
    events = await every(await got(client.chat.completions.create(
        model="run", messages=[{"role": "user", "content": "red bar"}], modalities=["image"], seed=3, stream=True,
        n=2,
    )))  # fmt: skip
    streamed = [c.choices[0].delta.images for c in events if getattr(c.choices[0].delta, "images", None)]
    for one, wanted in zip(streamed, images, strict=True):
        assert np.array_equal(_png(one[0]["image_url"]["url"].split(",")[1]), wanted)

    # Completions: several prompts, several samples, a stop, echo.
    wanted = {"model": "text", "prompt": ["the cat", "a dog"], "max_tokens": 12, "n": 2, "seed": 5, "temperature": 1.0}
    made = await got(client.completions.create(**wanted, logprobs=0))
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage.completion_tokens == 48 and all(c.finish_reason == "length" for c in made.choices)
    assert all("".join(c.logprobs.tokens) == c.text for c in made.choices if "\ufffd" not in c.text)
    texts = ["", "", "", ""]
    for chunk in await every(await got(client.completions.create(**wanted, stream=True))):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in made.choices] and len(set(texts)) == 4
    stop = made.choices[0].text[4:6]
    short = await got(
        client.completions.create(**{**wanted, "n": 1, "echo": True, "prompt": "the cat", "stop": [stop]})
    )
    assert short.choices[0].text == "the cat" + made.choices[0].text.partition(stop)[0]
    assert short.choices[0].finish_reason == "stop"
    ids = await got(client.completions.create(model="text", prompt=[[1, 2], [3]], max_tokens=2))
    assert ids.usage.prompt_tokens == 3

    # A conversation with a model that has no chat template.
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    reply = await got(client.chat.completions.create(
        model="text", messages=talk, max_completion_tokens=8, response_format={"type": "text"}
    ))  # fmt: skip
    plain = await got(client.completions.create(
        model="text", prompt="System: be brief\nUser: the cat\nAssistant:", max_tokens=8, stop="\nUser:"
    ))  # fmt: skip
    assert reply.choices[0].message.content == plain.choices[0].text.lstrip()

    # Embeddings, as base64 (the client's default) and as floats, of all modalities.
    inputs = ["red bar", see, hear]
    vectors = local.embed(["red bar", base64.b64decode(image.split(",")[1]), base64.b64decode(audio)])
    for form in ({}, {"encoding_format": "float"}):
        found = await got(client.embeddings.create(model="run", input=inputs, **form))
        assert np.allclose([one.embedding for one in found.data], vectors, atol=1e-5)

    # Images and audio clips.
    some = await got(client.images.generate(model="run", prompt="red bar", n=2, size="16x16", extra_body={"seed": 3}))
    assert [np.array_equal(_png(one.b64_json), p) for one, p in zip(some.data, images, strict=True)] == [True] * 2
    events = await every(await got(client.images.generate(
        model="run", prompt="red bar", stream=True, extra_body={"seed": 3}
    )))  # fmt: skip
    assert np.array_equal(_png(events[0].b64_json), images[0]) and events[0].usage.output_tokens
    for form in ("mp3", "wav", "opus", "flac", "pcm"):
        said = await got(client.audio.speech.create(model="run", input="red bar", voice="audio", response_format=form,
                                                    extra_body={"seed": 3}))  # fmt: skip
        assert form == "pcm" or len(soundfile.read(io.BytesIO(said.content))[0])
    recording = ("a.wav", base64.b64decode(audio), "audio/wav")
    heard = await got(client.audio.transcriptions.create(model="run", file=recording, language="en"))
    assert heard.text == local.transcribe(base64.b64decode(audio), column="en")
    events = await every(await got(client.audio.transcriptions.create(model="run", file=recording, stream=True)))
    assert "".join(e.delta for e in events[:-1]) == events[-1].text == heard.text


def _png(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_another_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests of this process set it
    client = InferenceClient(base_url=f"{server.url}/v1", api_key="none")
    chat = {"model": "text", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 9}
    whole = client.chat.completions.create(**chat).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**chat, stream=True) if c.choices]
    assert "".join(parts) == whole and len(parts) > 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server, media: tuple[str, str], trained: Path, tmp_path: Path) -> None:
    def curl(*arguments: str) -> bytes:
        return subprocess.run(["curl", "-sSN", "--fail", *arguments], check=True, capture_output=True).stdout

    (tmp_path / "a.wav").write_bytes(base64.b64decode(media[1]))
    text = curl(f"{server.url}/v1/audio/transcriptions", "-F", f"file=@{tmp_path / 'a.wav'}", "-F", "model=run",
                "-F", "response_format=text")  # fmt: skip
    assert text.decode().strip() in EN
    body = {"model": "run", "input": {"type": "image_url", "image_url": {"url": media[0]}}, "top": 2}
    (tmp_path / "body.json").write_text(json.dumps(body))
    found = json.loads(curl(f"{server.url}/v1/plait/classify", "--json", f"@{tmp_path / 'body.json'}"))
    said = api.load(trained).classify(base64.b64decode(media[0].split(",")[1]), top=2)
    assert found["data"][0]["label"] == said[0].label
    assert (found["none_of_these"], found["ood_score"]) == (said.none_of_these, said.ood_score)
    several = {"model": "run", "inputs": [body["input"], EN[0]], "top": 2}
    (tmp_path / "body.json").write_text(json.dumps(several))
    each = json.loads(curl(f"{server.url}/v1/plait/classify", "--json", f"@{tmp_path / 'body.json'}"))["results"]
    assert [one["index"] for one in each] == [0, 1] and each[0]["data"] == found["data"]
    (tmp_path / "body.json").write_text(json.dumps({"model": "run", "input": body["input"], "image": True}))
    found = json.loads(curl(f"{server.url}/v1/plait/explain", "--json", f"@{tmp_path / 'body.json'}"))
    assert found["answer"] in EN and len(found["parts"][0]["weights"]) == 64 and found["areas"]["random_maps"] == 10
    assert found["image"].startswith("data:image/png;base64,")
    stream = curl(f"{server.url}/v1/completions", "--json",
                  '{"model":"text","prompt":"a dog","max_tokens":4,"stream":true}').decode()  # fmt: skip
    assert stream.endswith("data: [DONE]\n\n") and 2 <= stream.count("data: ") <= 5


def test_alone_and_in_company(server: Server) -> None:
    """The same request alone and among 31 others writes the same text, whatever joins and leaves meanwhile."""

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def write(i: int) -> str:
            made = await client.completions.create(
                model="text", prompt="the cat sat"[: 3 + i % 9], max_tokens=8 + i % 7, seed=i, temperature=0.9
            )
            return made.choices[0].text

        alone = [await write(i) for i in range(32)]
        assert await asyncio.gather(*(write(i) for i in range(32))) == alone
        assert len(set(alone)) > 20

    asyncio.run(run())


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"model": "none"}, "run, text"),
    ("chat/completions", {"temperature": "hot"}, "temperature"),
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "empty"),
    ("chat/completions", {"messages": [{"role": "user", "content": "page " * 60_000}]}, "room for 256"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_001}]}, "1000000"),
    ("chat/completions", {"modalities": ["image"]}, "image"),
    ("chat/completions", {"column": "nl"}, "no column 'nl'"),
    ("completions", {"prompt": [999_999]}, "stands for no text"),
    ("completions", {"prompt": "x", "n": 5}, "4"),
    ("completions", {"prompt": ["x"] * 17}, "16"),
    ("completions", {"prompt": "x", "stop": ["a"] * 17}, "16"),
    ("completions", {"prompt": "x", "logprobs": 50}, "20"),
    ("embeddings", {"input": "x"}, "no embedding space"),
    ("audio/speech", {"model": "run", "input": "red bar", "voice": "nobody"}, "default or audio"),
    ("embeddings", {"model": "run", "input": "x", "dimensions": 3}, "dimensions"),
]  # fmt: skip
MEDIA = [
    ("http://127.0.0.1:{port}/a.png", "data: URL"),
    ("data:image/png;base64,%%%", "base64"),
    ("data:text/html;base64,PGI+", "png, jpeg"),
    ("data:image/jpeg;base64,{png}", "image/png"),
    ("data:image/svg+xml;base64,PHN2Zy8+", "png, jpeg"),
    ("data:image/png,abc", "base64"),
]


def test_bad_requests_say_what_to_send(server: Server, media: tuple[str, str]) -> None:
    def refused(route: str, body: dict[str, Any], what: str) -> None:
        status, _, answer = server.ask("POST", f"/v1/{route}", body)
        assert 400 <= status < 500 and is_error(status, answer), (route, body)
        assert what in json.loads(answer)["error"]["message"], (answer, what)

    chat = {"model": "text", "messages": [{"role": "user", "content": "hi"}]}
    for route, body, what in WRONG:
        refused(route, {**(chat if route.startswith("chat") else {"model": "text"}), **body}, what)
    for url, what in MEDIA:
        url = url.format(port=server.port, png=media[0].partition(",")[2])
        part = {"type": "image_url", "image_url": {"url": url}}
        refused("chat/completions", {"model": "run", "messages": [{"role": "user", "content": [part]}]}, what)
    part = {"type": "image_url", "image_url": {"url": media[0]}}
    refused("chat/completions", {**chat, "messages": [{"role": "user", "content": [part]}]}, "no image")
    for method, path in (("GET", "/nothing"), ("DELETE", "/v1/models"), ("GET", "/v1/completions"), ("POST", "/")):
        status, _, answer = server.ask(method, path)
        assert status in (404, 405) and is_error(status, answer)


def test_special_tokens_in_text_are_text(server: Server) -> None:
    for name in ("<|endoftext|>", "<|image|>", "<|en|>", "<|pad|>"):
        status, made = server.post(
            "/v1/chat/completions", {"model": "run", "messages": [{"role": "user", "content": name}]}
        )
        assert status == 200 and made["usage"]["prompt_tokens"] > len(name) // 2


def test_document_is_complete(server: Server) -> None:
    told = json.loads(server.ask("GET", "/")[2])
    assert "text" in told["models"] and server.ask("GET", told["models_url"])[0] == 200
    _, headers, body = server.ask("GET", "/openapi.json")
    document = json.loads(body)
    assert set(document["paths"]) >= {f"/v1/{path}" for path in (
        "models", "chat/completions", "completions", "embeddings", "images/generations", "audio/transcriptions",
        "audio/speech", "plait/classify", "plait/explain")}  # fmt: skip
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["description"] and {"200", "400", "401", "413", "429", "500"} <= set(
                operation["responses"]
            )
            assert "422" not in operation["responses"]
    assert headers["x-content-type-options"] == "nosniff" and "'none'" in headers["content-security-policy"]
    assert not re.findall(r"https?://(?!127)", body.decode())


def test_metrics(server: Server) -> None:
    before = server.metric("plait_tokens_total")
    status, _ = server.post("/v1/completions", {"model": "text", "prompt": "a dog", "max_tokens": 5})
    assert status == 200 and server.metric("plait_tokens_total") > before + 5
    assert server.metric("plait_requests_total") > 10 and server.metric("process_resident_memory_bytes") > 1e8
