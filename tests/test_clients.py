"""Clients that people have, each with its own package, against the real server.

Their packages do not go together with ours, so they have an interpreter of their own: PLAIT_CLIENTS_PYTHON, where
`pip install -r tests/clients/requirements.txt` has been run, and PLAIT_NODE_MODULES for the packages of npm
(openai, ai, @ai-sdk/openai, @ai-sdk/openai-compatible, zod). What is not there is skipped, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import Server, write_caller

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
