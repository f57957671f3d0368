"""The studio's server is killed, stopped, starved of disk or flooded: what was begun goes on, and nothing is lost or
there twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import pytest

from plait.core.files import sha256_file
from plait.studio import jobs
from plait.studio.workspace import Project
from test_studio import png, zip_of

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("PLAIT_KILLS", "5"))
ASLEEP_SECONDS = float(os.environ.get("PLAIT_ASLEEP_SECONDS", "60"))
STEPS = ("--steps", "8")


class Server:
    """`plait studio` in a process of its own.

    Args:
        folder: The workspace.
        before: Called in the process before the studio starts there.
    """

    def __init__(self, folder: Path, before: Callable[[], None] | None = None) -> None:
        self.folder, self.before = folder, before
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "plait", "studio", str(self.folder), "--no-browser", "--port", "0"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=self.before
        )
        assert self.process.stdout is not None
        self.address = next(m[0] for line in self.process.stdout if (m := re.search(r"http://\S+", line)))
        self.client = httpx.Client(base_url=self.address.split("/?")[0], follow_redirects=True, timeout=60)
        assert self.client.get(self.address).status_code == 200

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()

    def again(self) -> None:
        self.kill()
        self.start()

    def post(self, path: str, **values: Any) -> httpx.Response:
        return self.client.post(path, json=values)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "studio")
    yield found
    found.kill()


def images() -> dict[str, bytes]:
    return {f"{'disc' if k < 2 else 'bar'}/{k}{n}.png": png(k, n) for k in range(4) for n in range(20)}


def project_of(server: Server, name: str) -> Project:
    """A project with 80 images in two classes."""
    server.post("/projects", name=name)
    body = json.dumps([[path, len(data)] for path, data in images().items()]).encode() + b"\n"
    answer = server.client.put(f"/p/{name}/files", content=body + b"".join(images().values()))
    assert answer.json() == {"files": 80}, answer.text
    return Project(server.folder / name)


def begin(project: Project) -> jobs.Job:
    """A job of a few steps, as the page starts one."""
    from plait.studio.workspace import Workspace

    return jobs.start(Workspace(project.folder.parent), jobs.Job(project.folder, "1", STEPS))


def wait_for(project: Project, stages: set[str], seconds: float = 300) -> jobs.Job:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = jobs.read_job(project, "1")
        if job is not None and job.current in stages:
            return job
        time.sleep(0.02)
    raise AssertionError(f"{stages} were not reached: {jobs.last_lines(job, 20) if job else ''}")


def outcome(project: Project) -> dict[str, Any]:
    """What a run ended with: its losses and its weights."""
    run = project.folder / "runs" / "1"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in row.items() if k in ("step", "split") or k.startswith("loss/")} for row in rows]
    best = (run / "checkpoints" / "best").resolve()
    predictions = (project.folder / "jobs" / "1" / "predictions.jsonl").read_text()
    return {"losses": losses, "weights": sha256_file(best / "model.safetensors"), "predictions": predictions}


def end_of(server: Server, project: Project) -> dict[str, Any]:
    job = wait_for(project, {"done", "failed", "stopped"})
    if job.current == "stopped":
        assert server.client.post(f"/p/{project.name}/runs/1/continue").status_code == 200
        job = wait_for(project, {"done", "failed"})
    assert job.current == "done", job.error + jobs.last_lines(job, 20)
    return outcome(project)


def kill_job(job: jobs.Job) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(job.process)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


# --- killed -----------------------------------------------------------------------------------------------------


def test_the_server_is_killed_while_it_takes_files(server: Server) -> None:
    """Of a large file, a zip and many small ones, each killed at other moments; the browser sends on as it does."""
    random = np.random.default_rng(0)
    large = random.bytes(24 << 20)
    packed = zip_of({f"c/{n}.png": random.bytes(100_000) for n in range(60)})
    small = {f"b/{n}.bin": random.bytes(2000) for n in range(300)}
    batch = json.dumps([[name, len(body)] for name, body in small.items()]).encode() + b"\n" + b"".join(small.values())
    for number in range(ROUNDS):
        name = f"p{number}"
        server.post("/projects", name=name)
        moments = iter(random.uniform(0.0, 0.25, 4))
        for path, body in (("a/large.bin", large), ("all.zip", packed)):
            _send(server, name, path, body, moments)
        with _killed_after(server, next(moments, 0.1)), contextlib.suppress(httpx.HTTPError):
            server.client.put(f"/p/{name}/files", content=batch)
        assert server.client.put(f"/p/{name}/files", content=batch).json() == {"files": 300}
        files = Project(server.folder / name).uploads
        found = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
        visible = {path for path in found if not path.rpartition("/")[2].startswith(".")}
        assert len(visible) == 1 + 60 + 300
        assert (files / "a/large.bin").read_bytes() == large
        assert all((files / path).read_bytes() == body for path, body in small.items())
        assert not list((server.folder / name / ".uploads").glob("[!.]*"))


@contextlib.contextmanager
def _killed_after(server: Server, seconds: float) -> Iterator[None]:
    """Kills the server so long after the beginning, and starts it again at the end."""
    timer = threading.Timer(seconds, server.process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        server.again()


def _send(server: Server, project: str, path: str, body: bytes, moments: Iterator[float]) -> None:
    """Send a file in pieces as the page does, with a kill on the way and one at the end."""
    for moment in (next(moments, None), next(moments, None), None):
        with contextlib.ExitStack() as stack:
            if moment is not None:
                stack.enter_context(_killed_after(server, moment))
                stack.enter_context(contextlib.suppress(httpx.HTTPError))
            begun = server.post(f"/p/{project}/uploads", name=path, size=len(body), modified=1).json()
            at = begun["received"]
            while at < len(body):
                address = f"/p/{project}/uploads/{begun['id']}?offset={at}"
                at = server.client.put(address, content=body[at : at + (4 << 20)]).json()["received"]
            if moment is None:
                answer = server.post(f"/p/{project}/uploads/{begun['id']}/end")
                assert answer.status_code == 200, answer.text
            else:
                server.post(f"/p/{project}/uploads/{begun['id']}/end")
                return _send(server, project, path, body, moments)
    return None


def test_the_server_and_the_job_are_killed_in_every_stage(server: Server) -> None:
    quiet = project_of(server, "quiet")
    begin(quiet)
    expected = end_of(server, quiet)
    for number in range(ROUNDS):
        project = project_of(server, f"p{number}")
        begin(project)
        for stage in ("preparing", "training", "evaluating"):
            job = wait_for(project, {stage, "done"})
            time.sleep(0.4 * number)  # at another moment of the stage each time
            server.again()
            assert server.client.get(f"/p/{project.name}/runs/1").status_code == 200
            assert job.alive or job.current == "done"  # the training did not notice
            if number % 2:
                kill_job(job)
                if wait_for(project, {"stopped", "done"}).current == "stopped":
                    assert server.client.post(f"/p/{project.name}/runs/1/continue").status_code == 200
        assert end_of(server, project) == expected, number


def test_pages_that_look_and_a_machine_that_sleeps_change_nothing(server: Server) -> None:
    """Nobody looks; two browsers look all the time; the training is stopped for a while, as a laptop's sleep does."""
    alone = project_of(server, "alone")
    begin(alone)
    expected = end_of(server, alone)
    watched = project_of(server, "watched")
    begin(watched)
    over = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=server.client.base_url, cookies=server.client.cookies, timeout=60) as browser:
            while not over.wait(0.2):
                with contextlib.suppress(httpx.TransportError):  # a connection that was idle while the server slept
                    assert browser.get("/p/watched/runs/1/live").status_code == 200

    browsers = [threading.Thread(target=look) for _ in range(2)]
    for browser in browsers:
        browser.start()
    job = wait_for(watched, {"training", "done"})
    everything = [*psutil.Process(job.process).children(recursive=True), psutil.Process(job.process)]
    for one in [*everything, psutil.Process(server.process.pid)]:
        one.send_signal(signal.SIGSTOP)
    time.sleep(ASLEEP_SECONDS)
    for one in [*everything, psutil.Process(server.process.pid)]:
        one.send_signal(signal.SIGCONT)
    assert end_of(server, watched) == expected
    over.set()
    for browser in browsers:
        browser.join()


# --- no room, no rights -----------------------------------------------------------------------------------------


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """Files of this server may have 3 MB at most: writing more fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))

    server = Server(tmp_path / "studio", limit)
    try:
        server.post("/projects", name="p")
        begun = server.post("/p/p/uploads", name="a.bin", size=8 << 20).json()
        answer = server.client.put(f"/p/p/uploads/{begun['id']}?offset=0", content=bytes(8 << 20))
        assert answer.status_code == 507 and "Free space" in answer.json()["error"], answer.text
        big = json.dumps([["c.bin", 4 << 20]]).encode() + b"\n" + bytes(4 << 20)
        assert server.client.put("/p/p/files", content=big).status_code == 507
        assert server.client.get("/p/p/data").status_code == 200
        files = server.folder / "p" / "files"
        assert not [path for path in files.rglob("*") if path.is_file()]
    finally:
        server.kill()


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """A file system of 900 MB of its own."""
    if shutil.which("mount") is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("nothing can be mounted here")
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_folder_that_may_only_be_read_is_a_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as place:
        server = Server(place / "studio")
        try:
            project_of(server, "p")
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            body = json.dumps([["disc/new.png", 3]]).encode() + b"\nabc"
            for answer in (
                server.post("/projects", name="q"),
                server.post("/p/p/uploads", name="a.bin", size=10),
                server.client.put("/p/p/files", content=body),
                server.post("/p/p/paste", file="a.csv", text="a,b"),
                server.post("/p/p/labels", action="move", files=["disc/00.png"], label="bar"),
                server.post("/p/p/train", minutes="0.1"),
            ):
                said = answer.json()["error"]
                assert answer.status_code in (400, 507) and "ead-only" in said and "folder" in said, said
            for page in ("/", "/p/p/data", "/p/p/items", "/p/p/train", "/p/p/thumb?file=disc/00.png"):
                assert server.client.get(page).status_code == 200, page
        finally:
            server.kill()


def test_a_disk_that_fills_while_training_is_a_sentence_and_goes_on(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as place:
        server = Server(place / "studio")
        try:
            project = project_of(server, "p")
            ballast = place / "ballast"
            begin(project)
            wait_for(project, {"training"})
            with ballast.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            job = wait_for(project, {"failed", "done"})
            assert job.current == "failed", jobs.last_lines(job)
            assert "space" in job.error.lower() and "Traceback" not in job.error, job.error
            assert job.error in server.client.get("/p/p/runs/1").text
            refused = server.post("/p/p/uploads", name="a.bin", size=1 << 20)
            assert refused.status_code == 400 and "Make room" in refused.json()["error"]
            ballast.unlink()
            assert server.client.post("/p/p/runs/1/continue").status_code == 200
            assert wait_for(project, {"failed", "done"}).current == "done"
        finally:
            server.kill()


def test_a_training_that_needs_too_much_memory_says_so(server: Server) -> None:
    project = project_of(server, "p")
    job = begin(project)
    wait_for(project, {"training", "done"})
    while not (children := psutil.Process(job.process).children()):
        time.sleep(0.02)
    children[0].kill()  # as the system does that has no memory left
    failed = wait_for(project, {"failed", "done"})
    assert failed.current == "failed" and "memory" in failed.error, failed.error
    assert "memory" in server.client.get("/p/p/runs/1").text


# --- flooded ----------------------------------------------------------------------------------------------------


def test_many_requests_at_once_are_all_answered(server: Server) -> None:
    """2,000 requests of 16 clients, as fast as they go, half of them without the token."""
    server.post("/projects", name="p")
    faults: list[str] = []
    before = psutil.Process(server.process.pid).memory_info().rss

    def flood(cookies: Any, status: int) -> None:
        with httpx.Client(base_url=server.client.base_url, cookies=cookies, timeout=60) as client:
            for _ in range(125):
                answer = client.get("/p/p/data")
                if answer.status_code != status:
                    faults.append(f"{answer.status_code}")

    threads = [threading.Thread(target=flood, args=(server.client.cookies if n % 2 else None, 200 if n % 2 else 401))
               for n in range(16)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert psutil.Process(server.process.pid).memory_info().rss < before + (64 << 20)
