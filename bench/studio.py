"""The studio: uploads beside a plain copy, a gallery of many photos, and a training beside `plait train` alone.

    python bench/studio.py upload --photos 20000     # half the speed of a plain copy, below 1 GB, below 100 ms a step
    python bench/studio.py upload --folder /dev/shm  # the same without the disk: what the studio itself costs
    python bench/studio.py training --rounds 3       # the same training alone and under the studio, in turns

Photos are made on the spot: JPEGs of some 50 kB, each with bytes of its own at its end. A plain copy is the same bytes
through the same kind of socket, into one file and, as the studio must, into a file for each photo. Scrolling is done by
Chromium (Playwright), where that is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
from PIL import Image

from plait.data.examples import write_example
from plait.studio.jobs import Job, read_job, start
from plait.studio.workspace import Workspace

BATCH = 8 << 20  # bytes of small files that the page sends at once
VARIANTS = 40
COPY = """
import asyncio, json, os, sys, uvicorn

def write_files(folder, body):
    head, _, contents = body.partition(b"\\n")
    at = 0
    for name, size in json.loads(head):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(memoryview(contents)[at:at + size])
        at += size

async def app(scope, receive, send):
    pieces = []
    with open(os.path.join(sys.argv[1], "copy.bin"), "ab") as out:
        while True:
            message = await receive()
            if scope["path"] == "/one":
                out.write(message.get("body", b""))
            else:
                pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                break
    if pieces:
        await asyncio.to_thread(write_files, sys.argv[1], b"".join(pieces))
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})

config = uvicorn.Config(app, port=0, lifespan="off", log_level="info", access_log=False)
uvicorn.Server(config).run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("upload", "training"))
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written; the system's folder for temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.part == "upload":
            measure_upload(Path(folder), arguments.photos, arguments.rounds)
        else:
            measure_training(Path(folder), arguments.steps, arguments.rounds)


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """A server's process and the address that it prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        yield (
            psutil.Process(process.pid),
            next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line))),
        )
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def studio(workspace: Path) -> Iterator[tuple[psutil.Process, str, httpx.Client]]:
    """A studio's process, its address, and a client that opened it with its token."""
    command = [sys.executable, "-m", "plait", "studio", str(workspace), "--no-browser"]
    with contextlib.ExitStack() as stack:
        process, address = stack.enter_context(server(command))
        client = httpx.Client(base_url=address.split("/?")[0], timeout=120, follow_redirects=True)
        stack.enter_context(client).get(address)
        yield process, address, client


# --- many photos --------------------------------------------------------------------------------------------------


def photos(count: int) -> Iterator[tuple[str, bytes]]:
    """So many photos in ten classes, by path."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(VARIANTS):
        coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
        noise = rng.integers(0, 25, (480, 640, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((640, 480)), np.uint8) // 2 + noise
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        made.append(buffer.getvalue())
    for number in range(count):
        yield f"class {number % 10}/{number:05d}.jpg", made[number % VARIANTS] + number.to_bytes(8, "big")


def batches(count: int) -> Iterator[bytes]:
    """The photos as the page sends them."""
    head: list[list[Any]] = []
    parts: list[bytes] = []
    size = 0
    for name, body in photos(count):
        if head and (size + len(body) > BATCH or len(head) >= 500):
            yield json.dumps(head).encode() + b"\n" + b"".join(parts)
            head, parts, size = [], [], 0
        head.append([name, len(body)])
        parts.append(body)
        size += len(body)
    yield json.dumps(head).encode() + b"\n" + b"".join(parts)


@dataclass(frozen=True)
class Sent:
    """What sending all photos took.

    Attributes:
        seconds: On the clock, while bodies travelled.
        processor: Seconds of the server's processes.
        size: Bytes.
        memory: The server's highest, in bytes.
    """

    seconds: float
    processor: float
    size: int
    memory: int


def send_all(client: httpx.Client, path: str, count: int, process: psutil.Process) -> Sent:
    """Send all photos, two requests at a time, as the page does."""
    seconds, size, memory = 0.0, 0, 0
    before = process.cpu_times()
    with ThreadPoolExecutor(2) as pool:
        for bodies in batched(batches(count), 8):
            began = time.perf_counter()
            for answer in pool.map(lambda body: client.put(path, content=body), bodies):
                answer.raise_for_status()
            seconds += time.perf_counter() - began
            size += sum(map(len, bodies))
            memory = max(memory, process.memory_info().rss)
    after = process.cpu_times()
    return Sent(seconds, after.user + after.system - before.user - before.system, size, memory)


def batched(bodies: Iterator[bytes], count: int) -> Iterator[list[bytes]]:
    """The bodies, so many at a time."""
    while some := list(islice(bodies, count)):
        yield some


def measure_upload(folder: Path, count: int, rounds: int) -> None:
    """The same bytes copied into one file, copied into as many files, and uploaded, in turns.

    Nothing is removed before the end, and the disk is waited for between parts: removing thousands of files slows the
    next ones down on some file systems.
    """
    taken: dict[str, list[Sent]] = {"one file": [], "files": [], "studio": []}
    for number in range(rounds):
        os.sync()
        with plain(folder / f"one{number}") as (process, client):
            taken["one file"].append(send_all(client, "/one", count, process))
        os.sync()
        with plain(folder / f"files{number}") as (process, client):
            taken["files"].append(send_all(client, "/files", count, process))
        os.sync()
        with studio(folder / "studio") as (process, _, client):
            client.post("/projects", json={"name": f"photos{number}"})
            taken["studio"].append(send_all(client, f"/p/photos{number}/files", count, process))
    print(f"{count:,} photos, {taken['studio'][0].size / 1e6:,.0f} MB, median of {rounds}:")
    for what, sent in taken.items():
        clock, processor = (statistics.median(getattr(one, key) for one in sent) for key in ("seconds", "processor"))
        print(f"  {what}: {clock:.2f} s, {processor:.2f} s of the server's processor time")
    for other in ("one file", "files"):
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(taken[other], taken["studio"], strict=True))
        print(f"  the studio has {ratio:.2f} of the speed of a plain copy into {other}")
    print(f"  the studio's memory: at most {max(one.memory for one in taken['studio']) / 1e6:,.0f} MB")
    with studio(folder / "studio") as (process, _, client):
        look(client, process, "uploaded", "photos0")
        client.post("/projects", json={"name": "linked"})
        files = str(folder / "studio" / "photos0" / "files")
        client.post("/p/linked/source", json={"path": files}).raise_for_status()
        look(client, process, "by path", "linked")
    command = [sys.executable, "-m", "plait", "studio", str(folder / "studio"), "--no-browser"]
    with server(command) as (_, address):
        scroll(address, "photos0")


@contextlib.contextmanager
def plain(target: Path) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """A server that only copies what comes into a new folder, and a client of it."""
    target.mkdir()
    with server([sys.executable, "-c", COPY, str(target)]) as found:
        process, address = found
        with httpx.Client(base_url=address, timeout=120) as client:
            yield process, client


def look(client: httpx.Client, process: psutil.Process, how: str, project: str) -> None:
    """The time of the page of data, of a part of the gallery, and of a thumbnail that is new."""
    figures = []
    for path in ("data", "data", "items?offset=12000", "thumb?file=class%203/00003.jpg"):
        began = time.perf_counter()
        client.get(f"/p/{project}/{path}").raise_for_status()
        figures.append(1000 * (time.perf_counter() - began))
    print(
        f"  {how}: page of data {figures[0]:.0f} ms, again {figures[1]:.0f}; 60 tiles {figures[2]:.0f}; a thumbnail "
        f"{figures[3]:.0f}; server {process.memory_info().rss / 1e6:,.0f} MB"
    )


def scroll(address: str, project: str) -> None:
    """Chromium scrolls the gallery by its own height: time until the next image is on the screen."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("  no chromium: not scrolled")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.goto(f"{page.url}p/{project}/data")
        page.wait_for_selector(".tile")
        steps = []
        for _ in range(60):
            steps.append(
                page.evaluate("""async () => {
                const begun = performance.now();
                scrollBy(0, 700);
                await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                return performance.now() - begun;
            }""")
            )
            page.wait_for_timeout(60)
        steps.sort()
        print(
            f"  a scroll step: median {steps[30]:.0f} ms, 95 % below {steps[57]:.0f} ms; "
            f"{page.locator('.tile').count()} tiles by then"
        )
        browser.close()


# --- training -----------------------------------------------------------------------------------------------------


def rate_of(run: Path) -> float:
    """Steps a second between the first and the last row of the log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float((rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["time"] - rows[0]["time"]))


def measure_training(folder: Path, steps: int, rounds: int) -> None:
    workspace = Workspace(folder / "studio")
    project = workspace.create("digits")
    write_example("digits", project.uploads)
    data = folder / "data"
    subprocess.run(
        [sys.executable, "-m", "plait", "prepare", str(project.uploads), "-o", str(data)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    options = ("--steps", str(steps))
    ratios = []
    for number in range(rounds):
        alone = folder / f"alone{number}"
        command = [sys.executable, "-m", "plait", "train", str(data), "-o", str(alone), *options]
        # In a session of its own, as the studio's is: Linux shares processors out between sessions, not processes.
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        under = train_in_studio(workspace, project.folder, f"{number + 1}", options)
        ratios.append(rate_of(under) / rate_of(alone))
        print(
            f"  alone {rate_of(alone):.2f}, under the studio with a page that looks {rate_of(under):.2f} steps a second"
        )
    print(f"training under the studio: {statistics.median(ratios):.3f} of the steps a second (median of {rounds})")


def processor_seconds(process: psutil.Process) -> float:
    """Of a process and all that it started; 0 where it has ended."""
    try:
        times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
        ended = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return sum(one.user + one.system for one in times) + ended.children_user + ended.children_system


def train_in_studio(workspace: Workspace, project: Path, run: str, options: tuple[str, ...]) -> Path:
    """Train as the page does, while a page asks every second how far it is."""
    with studio(workspace.root) as (server, _, client):
        job = start(workspace, Job(project, run, options))
        before, training, taken = server.cpu_times(), psutil.Process(job.process), 0.0
        while job.alive:
            client.get(f"/p/{project.name}/runs/{run}/live").raise_for_status()
            taken = max(taken, processor_seconds(training))
            time.sleep(1)
        after = server.cpu_times()
        own = after.user + after.system - before.user - before.system
        print(f"  the studio's own processor time: {own:.2f} s, beside {taken:.2f} s of the training that it looked at")
    found = read_job(workspace.project(project.name), run)
    if found is None or found.current != "done":
        raise SystemExit(f"the run ended as {found and found.current}: {found and found.error}")
    return project / "runs" / run


if __name__ == "__main__":
    main()
