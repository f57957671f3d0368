"""The long forms of what tests/test_serving_limits.py shows in short; each case prints its count. `make soak`

    python tests/soak_serving.py                       # all, on runs/demo
    python tests/soak_serving.py R13 R15 --count 100   # some, shorter
    python tests/soak_serving.py --model runs/photos

R11 bombs, R12 fuzzing, R13 slow clients, R14 SIGTERM, R15 clients that leave, R19 overload, and memory over 2,000 mixed
and 50 huge requests.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from server import Server, is_error, write_caller, write_text_model

HERE = Path(__file__).parent
CORPORA = HERE.parents[1] / "shared" / "corpora"
HUGE = 50  # requests
GOOD = {"model": "text", "prompt": "the cat", "max_tokens": 16, "seed": 1, "temperature": 1.0}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def resident(server: Server) -> float:
    return server.metric("process_resident_memory_bytes") / 2**20


def faults(server: Server) -> int:
    """Answers of 5xx, and unforeseen errors in the log."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    return sum(line["event"] == "fault" or line.get("status", 0) >= 500 for line in lines)


def png(width: int, height: int, mode: str = "1") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG", optimize=True)
    return out.getvalue()


def image_body(model: str, data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": model, "messages": [{"role": "user", "content": [part]}]}


def audio_body(model: str, data: bytes, kind: str) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}
    return {"model": model, "messages": [{"role": "user", "content": [part]}]}


def r11(server: Server, model: str, count: int) -> None:
    """Few bytes that decode to much are refused, and memory does not follow them."""
    frames = io.BytesIO()
    first = Image.new("P", (2200, 2200))
    first.save(frames, "GIF", save_all=True, append_images=[first] * 59)
    flac, opus = io.BytesIO(), io.BytesIO()
    silence = np.zeros(8000 * 600, np.int16)
    soundfile.write(flac, silence, 8000, format="FLAC")
    soundfile.write(opus, np.zeros((48_000 * 120, 2), np.float32), 48_000, format="OGG", subtype="OPUS")
    bombs = [image_body(model, png(9000, 7900)), image_body(model, png(30_000, 30_000)),
             image_body(model, png(60_000_000, 1)), image_body(model, png(1, 3_000_000, "RGBA")),
             image_body(model, frames.getvalue(), "gif"), audio_body(model, flac.getvalue(), "flac"),
             audio_body(model, opus.getvalue(), "opus")]  # fmt: skip
    before, most, refused = resident(server), 0.0, 0
    for body in bombs * max(count // 10, 1):
        status, _, answer = server.ask("POST", "/v1/chat/completions", body)
        refused += is_error(status, answer) if status != 200 else 0
        most = max(most, resident(server))
    say(f"R11 {refused} of {len(bombs) * max(count // 10, 1)} refused, memory + {most - before:.0f} MiB at most")


def r12(server: Server, model: str, count: int) -> None:
    """Requests that fit the OpenAPI document, requests that do not, and a corpus of bad JSON and bodies."""
    wanted = server.post("/v1/completions", GOOD)[1]["choices"]
    before = server.metric("plait_requests_total")
    server.ask("GET", "/openapi.json")  # made at first use; a busy machine may take long
    tool = Path(sys.executable).with_name("schemathesis")
    if tool.exists():
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        done = subprocess.run(
            [tool, "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {server.key}", "--checks", checks,
             "--phases", "examples,coverage,fuzzing", "--mode", "all", "--generation-allow-x00", "true",
             "--generation-database", "none", "--continue-on-failure", "--max-examples", str(count), "--no-color",
             "--seed", "1"],
            capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        say(done.stdout[-3000:] if done.returncode else done.stdout.strip().splitlines()[-1])
    else:
        say("R12 without schemathesis: it is not installed")
    bodies: list[tuple[bytes, str]] = []
    for name in ("json_parsing.zip", "requests_fuzzed.zip"):
        if (CORPORA / name).exists():
            with zipfile.ZipFile(CORPORA / name) as corpus:
                bodies += [(corpus.read(one), one) for one in corpus.namelist() if not one.endswith("/")]
        else:
            say(f"R12 without {name}: ../shared/corpora is not here")
    routes = ("chat/completions", "completions", "embeddings", "images/generations", "audio/speech",
              "audio/transcriptions", "plait/classify")  # fmt: skip
    wrong = 0
    for i, (body, name) in enumerate(bodies):
        route = routes[i % len(routes)]
        kind = "application/json"
        if route == "audio/transcriptions":
            found = re.search(rb"--([^\r\n]{1,70})\r?\n", body)
            kind = f"multipart/form-data; boundary={found[1].decode('latin-1') if found else 'x'}"
        try:
            status, _, answer = server.ask("POST", f"/v1/{route}", body, headers={"Content-Type": kind})
        except ValueError:  # a boundary that no client would send
            continue
        if not (status < 300 or (status < 500 and is_error(status, answer))):
            wrong += 1
            say(f"R12 {route} {name}: {status}")
    asked = server.metric("plait_requests_total") - before
    same = server.post("/v1/completions", GOOD)[1]["choices"] == wanted
    say(f"R12 {asked:.0f} requests, {faults(server)} of 5xx, {wrong} of another shape; the good one after: {same}")


def r13(server: Server, model: str, count: int) -> None:
    """200 sockets that stand still, each in its way, and what a good client notices."""

    def p99(seconds: float) -> float:
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.monotonic()
            if server.post("/v1/completions", GOOD)[0] == 200:
                times.append(time.monotonic() - begun)
        return float(np.quantile(times, 0.99)) * 1e3

    idle = p99(10)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n".encode()
    body = head + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
    loud = (
        b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + server.key.encode() + b"\r\n\r\n"
    )
    begun, sockets, closed = time.monotonic(), [], [0.0] * 200
    for i in range(200):
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall((b"", b"GET /health HTTP/1.1\r\nX: ", body, loud * 500)[i % 4])
        sockets.append(sock)

    def watch(i: int) -> None:
        """A byte a second out, or a byte a second in, until the other side ends it."""
        sock = sockets[i]
        sock.settimeout(1.0)
        while True:
            try:
                if i % 4 in (1, 2):
                    sock.send(b"x")
                    time.sleep(1)
                    sock.settimeout(0.01)
                if i % 4 == 3:
                    time.sleep(1)
                if not sock.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        closed[i] = time.monotonic() - begun

    threads = [threading.Thread(target=watch, args=(i,), daemon=True) for i in range(200) if i % 4 < 3]
    for thread in threads:
        thread.start()
    during = p99(10)
    for thread in threads:
        thread.join(30)
    while server.metric("plait_connections") > 1 and time.monotonic() - begun < 60:
        time.sleep(0.2)
    readers = time.monotonic() - begun
    last = max(closed[i] for i in range(200) if i % 4 < 3)
    say(f"R13 200 closed after {last:.1f} s (readers {readers:.1f} s at most); p99 {during:.0f} ms, idle {idle:.0f} ms")
    for sock in sockets:
        sock.close()


def _stream(server: Server, body: dict[str, Any]) -> socket.socket:
    data = json.dumps({**body, "stream": True}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
    size = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall((head + size).encode() + data)
    return sock


def r14(server: Server, model: str, count: int) -> None:
    """SIGTERM with 20 open streams. The server has gone afterwards."""
    sockets = [_stream(server, {**GOOD, "max_tokens": 240, "n": 4, "seed": i}) for i in range(20)]
    for sock in sockets:
        sock.recv(10)
    begun = time.monotonic()
    code = server.stop()
    took, whole = time.monotonic() - begun, 0
    for sock in sockets:
        text = b""
        while part := sock.recv(65536):
            text += part
        whole += b"data: [DONE]" in text or b'"code":"stopping"' in text
        sock.close()
    say(f"R14 {whole} of 20 streams ended well, exit code {code} after {took:.1f} s")


def r15(server: Server, model: str, count: int) -> None:
    """Clients that leave after some bytes."""
    choose = random.Random(0)

    def cut(_: int) -> None:
        with _stream(server, {**GOOD, "max_tokens": 240, "n": 4, "seed": choose.randrange(1000)}) as sock:
            for _ in range(choose.randrange(4)):
                sock.recv(choose.randrange(1, 2000))

    def drained() -> bool:
        return not server.metric("plait_batch_samples") + server.metric("plait_queue_samples")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(cut, range(max(count // 10, 4))))  # warm: the first requests grow caches
        before = resident(server)
        list(pool.map(cut, range(count)))
    waited = time.monotonic()
    while not drained() and time.monotonic() - waited < 20:
        time.sleep(0.05)
    now = resident(server)
    say(f"R15 {count} left, places free: {drained()}, memory {before:.0f} -> {now:.0f} MiB ({now / before - 1:+.1%})")


def r19(server: Server, model: str, count: int) -> None:
    """Eight times what fits at once."""
    rows = 128

    def ask(i: int) -> tuple[int, str, Any]:
        status, headers, answer = server.ask("POST", "/v1/completions", {**GOOD, "seed": i % 16, "max_tokens": 64})
        return status, headers.get("retry-after", ""), json.loads(answer).get("choices")

    alone = [ask(i)[2] for i in range(16)]
    total = 8 * rows
    with concurrent.futures.ThreadPoolExecutor(400) as pool:
        answers = list(pool.map(ask, range(total)))
    good = sum(status == 200 for status, *_ in answers)
    mixed = sum(status == 200 and choices != alone[i % 16] for i, (status, _, choices) in enumerate(answers))
    told = sum(status == 429 and after.isdecimal() for status, after, _ in answers)
    say(
        f"R19 {total} at once: {good} answered, {told} told when to come again, {total - good - told} lost, "
        f"{mixed} mixed up"
    )


def memory(server: Server, model: str, count: int) -> None:
    """Mixed requests: text, images, speech, embeddings."""
    idle = resident(server)
    wave = np.sin(np.arange(4000) / 5).astype(np.float32)
    out = io.BytesIO()
    soundfile.write(out, wave, 8000, format="WAV")
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("completions", GOOD),
        ("chat/completions", image_body(model, png(28, 28, "L"))),
        ("chat/completions", audio_body(model, out.getvalue(), "wav")),
        ("images/generations", {"model": model, "prompt": "three", "n": 2}),
        ("audio/speech", {"model": model, "input": "three"}),
        ("embeddings", {"model": model, "input": ["three", "four"]}),
        ("plait/classify", {"model": model, "input": image_body(model, png(28, 28, "L"))["messages"][0]["content"]}),
    ]

    def ask(i: int) -> int:
        route, body = kinds[i % len(kinds)]
        return server.ask("POST", f"/v1/{route}", body)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        warm = list(pool.map(ask, range(200)))
        before = resident(server)
        statuses = warm + list(pool.map(ask, range(count)))
    now = resident(server)
    good = sum(status == 200 for status in statuses)
    say(f"memory {idle:.0f} MiB idle, {before:.0f} after 200 mixed requests, {now:.0f} after {count} more "
        f"({now / before - 1:+.1%}); {good} of {len(statuses)} answered")  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: server.ask("POST", *huge(model, i))[0], range(HUGE)))
    list(map(ask, range(20)))  # what came before is let go by now
    after = resident(server)
    said = ", ".join(f"{answers.count(status)} with {status}" for status in sorted(set(answers)))
    say(f"memory {after:.0f} MiB after {HUGE} huge requests ({after / before - 1:+.1%} of before all): {said}")


def huge(model: str, number: int) -> tuple[str, dict[str, Any]]:
    """A route and a body that are as large as may be: a text of 1 MB, 2,048 texts, an image of 16 megapixels, five
    minutes of audio."""
    kind = number % 4
    if kind == 0:
        return "/v1/completions", {**GOOD, "prompt": "the cat " * 131_072}
    if kind == 1:
        return "/v1/embeddings", {"model": model, "input": [f"text {i}" for i in range(2048)]}
    if kind == 2:
        return "/v1/chat/completions", image_body(model, png(4000, 4000, "L"))
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(8000 * 300) / 5).astype(np.float32), 8000, format="WAV")
    return "/v1/chat/completions", audio_body(model, out.getvalue(), "wav")


CASES: dict[str, tuple[Callable[[Server, str, int], None], int]] = {
    "memory": (memory, 2000), "R11": (r11, 50), "R12": (r12, 600), "R13": (r13, 1), "R15": (r15, 1000),
    "R19": (r19, 1), "R14": (r14, 1),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all, where none is named")
    parser.add_argument("--model", default="runs/demo", help="a run that reads images and audio")
    parser.add_argument("--index", help="an index of the model, so that search has something to find")
    parser.add_argument("--histories", help="a run of histories, so that there is something to recommend")
    parser.add_argument("--count", type=int, help="how often, instead of each case's own number")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = write_text_model(Path(folder) / "letters")
        caller = write_caller(Path(folder) / "caller")
        for name in given.cases or CASES:
            case, count = CASES[name]
            more = [f"shop={given.histories}"] if given.histories else []
            more += ["--index", given.index] if given.index else []
            models = (f"run={given.model}", f"text={text}", f"caller={caller}")
            with Server.start(Path(folder) / f"{name}.log", *models, *more) as server:
                case(server, "run", given.count or count)


if __name__ == "__main__":
    main()
