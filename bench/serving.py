"""The server beside `transformers serve` on the same 14M model: 64 tokens streamed to 1, 8 and 32 clients at once.

    python bench/serving.py                # all three servers, the table on stdout
    python bench/serving.py --rounds 1     # briefly
    python bench/serving.py --sustained 60 # 64 clients ask again and again for a minute: ours, theirs in batches

The model has random weights, and both get the same folder. Servers run one at a time within a round, as they share the
cores with each other and with the clients; rounds alternate, so that what else the machine does hits all. A request is
one conversation of a few words; the first token is the first event with content.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import plait  # noqa: F401  isort: skip (before torch, which PLAIT_ISA may cap)

import numpy as np
from training import SHAPES, make_model

from plait.hf.export import export_transformers
from plait.modalities.text import Text
from plait.model.checkpoint import Checkpoint

TOKENS = 64
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CLIENTS = (1, 8, 32)


def write_model(folder: Path) -> None:
    """The 14M shape with random weights, a tokenizer of made-up words, and a chat template."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(20_000)]
    text = Text.train((" ".join(random.choice(words, 200)) for _ in range(400)), SHAPES["14M"].vocabulary - 2)
    model = make_model(SHAPES["14M"], "Qwen3", tied=False)
    export_transformers(Checkpoint(model, text), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"eos_token_id": None, "pad_token_id": 0}  # nobody ends early
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that answers. Raises RuntimeError where it does not within five minutes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1500):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except OSError:
            time.sleep(0.2)
        if process.poll() is not None:
            break
    process.kill()
    raise RuntimeError(f"{command[0]} does not answer")


async def ask(port: int, model: str) -> tuple[float, float, int]:
    """(seconds to the first token, seconds in all, events with content) of one streamed reply."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "tell me about the sea"}],
                       "max_tokens": TOKENS, "temperature": 0, "stream": True}).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.perf_counter()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json"
    )
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    first, pieces, seen = 0.0, 0, b""
    while part := await reader.read(65536):
        seen += part
        *lines, seen = seen.split(b"\n")
        for line in lines:
            at = line.find(b"data: {")
            if at < 0:
                continue
            choices = json.loads(line[at + 6 :]).get("choices") or [{}]
            if choices[0].get("delta", {}).get("content"):
                pieces += 1
                first = first or time.perf_counter() - begun
    writer.close()
    return first, time.perf_counter() - begun, pieces


async def load(port: int, model: str, clients: int, each: int) -> tuple[float, float, float]:
    """(requests a second, median seconds to the first token, events a request) of clients that ask `each` times."""

    async def client() -> list[tuple[float, float, int]]:
        return [await ask(port, model) for _ in range(each)]

    begun = time.perf_counter()
    done = [one for part in await asyncio.gather(*(client() for _ in range(clients))) for one in part]
    seconds = time.perf_counter() - begun
    return len(done) / seconds, statistics.median(one[0] for one in done), statistics.mean(one[2] for one in done)


async def sustain(port: int, model: str, seconds: float, clients: int = 64) -> str:
    """Clients that ask again and again for so long; what they got, in words."""
    end = time.perf_counter() + seconds
    failed = 0

    async def client() -> list[tuple[float, float, int]]:
        nonlocal failed
        done = []
        while time.perf_counter() < end:
            try:
                answer = await asyncio.wait_for(ask(port, model), 4 * seconds)
            except (OSError, TimeoutError):
                failed += 1
                continue
            if answer[2]:
                done.append(answer)
            else:
                failed += 1
        return done

    begun = time.perf_counter()
    done = [one for part in await asyncio.gather(*(client() for _ in range(clients))) for one in part]
    took = time.perf_counter() - begun
    first = statistics.median(one[0] for one in done) if done else float("nan")
    events = sum(one[2] for one in done)
    return (
        f"{len(done)} finished, {failed} not; {events / took:.0f} events a second, {len(done) / took:.2f} requests a "
        f"second; {first * 1e3:,.0f} ms to the first (median)"
    )


def run_sustained(servers: dict[str, list[str]], folder: Path, seconds: float) -> None:
    """Each server once under 64 clients."""
    for name, command in servers.items():
        port = free_port()
        try:
            process = start([*command, "--port", str(port)], port)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            continue
        model = "model" if "plait" in name else str(folder)
        try:
            asyncio.run(load(port, model, 2, 1))
            print(f"{name}: {asyncio.run(sustain(port, model, seconds))}", flush=True)
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sustained", type=float, help="seconds for which 64 clients ask again and again")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder)
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
        servers = {
            "plait serve, fp32": [sys.executable, "-m", "plait", "serve", f"model={folder}"],
            "transformers serve, fp32": [*theirs, "--dtype", "float32"],
            "transformers serve --continuous-batching, fp32": [*theirs, "--dtype", "float32", "--continuous-batching"],
        }
        if given.sustained:
            del servers["transformers serve, fp32"]  # one after another: 64 clients would wait for most of an hour
            run_sustained(servers, folder, given.sustained)
            return
        found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for _ in range(given.rounds):
            for name, command in servers.items():
                port = free_port()
                model = "model" if "plait" in name else str(folder)
                try:
                    process = start([*command, "--port", str(port)], port)
                except RuntimeError as error:
                    print(f"{name}: {error}", flush=True)
                    continue
                try:
                    asyncio.run(load(port, model, 2, 1))  # warm
                    for clients in CLIENTS:
                        each = {1: 4, 8: 2, 32: 2}[clients] if "plait" in name else {1: 2, 8: 1, 32: 1}[clients]
                        found.setdefault((name, clients), []).append(asyncio.run(load(port, model, clients, each)))
                finally:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        process.kill()
    print(f"| requests/s (median ms to the first token) | {' | '.join(f'{c} clients' for c in CLIENTS)} | events |")
    print("| --- |" + " ---: |" * (len(CLIENTS) + 1))
    for name in servers:
        cells, events = [], 0.0
        for clients in CLIENTS:
            runs = found.get((name, clients), [])
            if runs:
                events = runs[0][2]
                rate, first = (statistics.median(run[i] for run in runs) for i in (0, 1))
                cells.append(f"{rate:.2f} ({first * 1e3:,.0f})")
            else:
                cells.append("")
        print(f"| {name} | {' | '.join(cells)} | {events:.0f} |")


if __name__ == "__main__":
    main()
