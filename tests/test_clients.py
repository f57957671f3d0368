"""Clients that people have, each with its own package, against the real server.

Their packages do not go together with ours, so they have an interpreter of their own: PLAIT_CLIENTS_PYTHON, where
`pip install -r tests/clients/requirements.txt` has been run, and PLAIT_NODE_MODULES for the packages of npm
(openai, ai, @ai-sdk/openai, @ai-sdk/openai-compatible, zod). What is not there is skipped, and says so.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.server.limits import new_key
from server import Server, write_caller, write_text_model

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent / "clients"
PACKAGES = {"openai": "openai", "langchain": "langchain_openai", "llama_index": "llama_index.llms.openai_like",
            "litellm": "litellm", "instructor": "instructor", "llm": "llm", "anthropic": "anthropic",
            "cohere": "cohere", "lm_eval": "lm_eval"}  # fmt: skip


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    caller = write_caller(folder / "caller")
    with Server.start(folder / "log", caller, f"run={trained}") as running:
        yield running


def run(command: list[str], server: Server) -> None:
    checkpoint = server.process.args[4]  # type: ignore[index]
    environment = {**os.environ, "PLAIT_URL": server.url, "DO_NOT_TRACK": "1", "PYTHONPATH": str(SCRIPTS),
                   "PLAIT_CHECKPOINT": str(checkpoint), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_clients_in_python(server: Server, name: str) -> None:
    python = sys.executable if name == "openai" else os.environ.get("PLAIT_CLIENTS_PYTHON", "")
    if not python:
        pytest.skip("PLAIT_CLIENTS_PYTHON names no interpreter")
    known = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{PACKAGES[name]}') is None)"
    if subprocess.run([python, "-c", known], capture_output=True).returncode:
        pytest.skip(f"{python} has no {PACKAGES[name]}")
    run([python, str(SCRIPTS / f"with_{name}.py")], server)


@pytest.mark.parametrize("name", ["openai", "ai"])
def test_clients_in_node(server: Server, name: str) -> None:
    modules = os.environ.get("PLAIT_NODE_MODULES", "")
    if shutil.which("node") is None or not (Path(modules) / "node_modules" / name).is_dir():
        pytest.skip(f"PLAIT_NODE_MODULES has no {name}, or there is no node")
    run(["node", str(SCRIPTS / f"with_{name}.mjs")], server)


PAGE_ASKS = """async ([url, key]) => {
    const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
    const body = JSON.stringify({ messages: [{ role: "user", content: "the cat" }], max_tokens: 4, stream: true });
    const answer = await fetch(`${url}/v1/chat/completions`, { method: "POST", headers, body });
    const refused = await fetch(`${url}/v1/models`, { headers: { authorization: "Bearer wrong" } });
    return { status: answer.status, text: await answer.text(), id: answer.headers.get("x-request-id"),
             refused: refused.status, why: (await refused.json()).error.message };
}"""


def test_a_page_of_another_origin(tmp_path: Path) -> None:
    """A page in Chromium is a client where its origin is allowed, errors and headers included; else it is none."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<!doctype html><title>A client</title>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "page"))
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    allowed, key = f"http://127.0.0.1:{pages.server_port}", new_key(tmp_path / "keys", "page", None).strip()
    model = write_text_model(tmp_path / "model")
    options = ("--api-key-file", tmp_path / "keys", "--allow-origin", allowed)
    with Server.start(tmp_path / "log", model, *options, key=key) as server, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(allowed)
        found = page.evaluate(PAGE_ASKS, [server.url, key])
        assert found["status"] == 200 and "data: [DONE]" in found["text"] and found["id"]
        assert found["refused"] == 401 and found["why"]
        page.goto(f"http://localhost:{pages.server_port}")  # another origin
        with pytest.raises(api.Error, match="Failed to fetch"):
            page.evaluate(PAGE_ASKS, [server.url, key])
        browser.close()
    pages.shutdown()
