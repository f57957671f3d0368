"""`llm`, with -T: the command line of the package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import llm  # noqa: F401
from common import URL

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: caller\n  api_base: {URL}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "here", "-o", "max_tokens", "60", "the cat"]
    for more in ([], ["--no-stream"], ["-T", "llm_version"], ["-T", "llm_version", "--no-stream"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.strip(), (more, done.stderr)
    schema = ["--schema", "old bool"]
    done = subprocess.run([*command, *schema], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '"old"' in done.stdout, done.stderr
