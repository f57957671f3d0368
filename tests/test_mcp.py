"""`plait mcp` by the package's own client, over standard input and over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import plait
from conftest import make_image, tone
from plait.search.index import Index
from plait.server.limits import new_key

pytest.importorskip("mcp")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media that may be read, a file beside them that may not, and an index."""
    folder = tmp_path_factory.mktemp("mcp")
    (folder / "media").mkdir()
    rng = np.random.default_rng(7)
    make_image(2, rng).save(folder / "media" / "bar.png")
    (folder / "media" / "tone.wav").write_bytes(tone(2, rng))
    make_image(1, rng).save(folder / "secret.png")
    (folder / "media" / "link.png").symlink_to(folder / "secret.png")
    Index(folder / "bars.index", trained).add([folder / "media"])
    return folder


def said(result: Any) -> Any:
    assert not result.is_error, result.content
    return result.structured_content


async def use(session: Any, folder: Path, trained: Path) -> None:
    tools = {tool.name: tool for tool in (await session.list_tools()).tools}
    assert set(tools) == {"classify", "decide", "transcribe", "caption", "generate", "search"}
    assert "labels" in tools["classify"].input_schema["properties"] and tools["classify"].description
    model = plait.load(trained)
    image = folder / "media" / "bar.png"
    data = base64.b64encode(image.read_bytes()).decode()
    wanted = model.classify(image)[0]
    for given in ({"file": "bar.png"}, {"data": data}, {"file": str(image)}):
        found = said(await session.call_tool("classify", given))
        assert found["labels"][0]["label"] == wanted.label
        assert found["labels"][0]["probability"] == pytest.approx(wanted.probability, abs=1e-4)
    asked = {"question": "which?", "options": ["red bar", "blue bar"], "data": data}
    decided = said(await session.call_tool("decide", asked))
    assert decided["refusal"] or sum(decided["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert said(await session.call_tool("caption", {"file": "bar.png"}))["text"] == model.describe(image)
    heard = said(await session.call_tool("transcribe", {"file": "tone.wav", "times": True}))
    assert heard["text"] == model.transcribe(folder / "media" / "tone.wav") and heard["segments"][0]["end"] > 0
    drawn = await session.call_tool("generate", {"prompt": "red bar", "to": "image", "seed": 1})
    assert drawn.content[0].type == "image" and base64.b64decode(drawn.content[0].data)[:4] == b"\x89PNG"
    hits = (await session.call_tool("search", {"file": "bar.png", "k": 1})).content
    assert "bar.png" in hits[0].text and hits[1].type == "image"
    # Nothing outside the folders, by whatever way; and what is wrong is said.
    for path in ("../secret.png", str(folder / "secret.png"), "link.png", "/etc/passwd", "no.png"):
        refused = await session.call_tool("classify", {"file": path})
        assert refused.is_error and "no such file" in refused.content[0].text
    for wrong in ({}, {"text": "a", "data": data}, {"data": "%%%"}, {"data": base64.b64encode(b"x" * 99).decode()},
                  {"text": "a", "model": "nope"}, {"text": "a", "top": 0}):  # fmt: skip
        assert (await session.call_tool("classify", wrong)).is_error, wrong


def test_over_standard_input(folder: Path, trained: Path) -> None:
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    arguments = ["-m", "plait", "mcp", str(trained), str(folder / "bars.index"), "--folder", str(folder / "media")]

    async def talk() -> None:
        server = StdioServerParameters(command=sys.executable, args=arguments, env=ENVIRONMENT)
        with open(os.devnull, "w") as quiet:  # noqa: PTH123
            async with stdio_client(server, errlog=quiet) as streams, ClientSession(*streams[:2]) as session:
                await session.initialize()
                await use(session, folder, trained)

    anyio.run(talk)


def test_over_http_with_a_key(folder: Path, trained: Path, tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    key = new_key(tmp_path / "keys", "one")
    command = [sys.executable, "-m", "plait", "mcp", str(trained), str(folder / "bars.index"), "--folder",
               str(folder / "media"), "--http", "--port", "0", "--api-key-file", str(tmp_path / "keys")]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving at "), (tmp_path / "log").read_text()
        url = line.split()[2]
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        for more, status in (({}, 401), ({"Authorization": f"Bearer {key}", "Origin": "https://evil.example"}, 403)):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(url, body, {**headers, **more}), timeout=20)
            assert error.value.code == status
        asked = urllib.request.Request(url, body, {**headers, "Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert len(json.load(io.TextIOWrapper(answer))["result"]["tools"]) == 6
        anyio.run(_over_http, url, key, folder, trained)
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()


async def _over_http(url: str, key: str, folder: Path, trained: Path) -> None:
    import httpx2
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}) as client,
        streamable_http_client(url, http_client=client) as streams,
        ClientSession(*streams[:2]) as session,
    ):
        await session.initialize()
        await use(session, folder, trained)


def test_what_is_wrong_is_said(trained: Path, plait: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plait("mcp", trained, "--folder", tmp_path / "none") != 0
    assert "no folder" in capsys.readouterr().err
    assert plait("mcp", trained, "--http", "--host", "0.0.0.0") != 0
    assert "keys are needed" in capsys.readouterr().err
