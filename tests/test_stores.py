"""Disks and stores that fail: a failure that says nothing of a file never costs the file."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.data.stores import StoreError, is_passing, location, open_binary, raise_if_passing, read_bytes
from plait.modalities.image_files import encode_png


def image(n: int) -> bytes:
    return encode_png(np.random.default_rng(n).integers(0, 256, (6, 8, 3), np.uint8))


def test_which_failures_are_the_files_own(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ECONNRESET):
        assert is_passing(OSError(number, "x"))
        with pytest.raises(StoreError, match=r"a\.png cannot be read"):
            raise_if_passing(OSError(number, "x"), "a.png")
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP):
        assert not is_passing(OSError(number, "x"))
    assert not is_passing(OSError("cannot identify image file")) and not is_passing(ValueError("x"))
    assert location("s3://bucket/data/") == "s3://bucket/data"
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_files_that_run_out_end_the_run_and_no_record(tmp_path: Path) -> None:
    """With no file descriptors left, good files are not rejected: the run ends, and goes on when there are some."""
    for n in range(24):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{n}.png").write_bytes(image(n))
    code = """
import resource, sys
from plait.core.errors import PlaitError
from plait.data import work
from plait.data.prepare import prepare
original = work.read_bytes
def starved(*arguments):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        return original(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
work.read_bytes = starved
try:
    prepare(sys.argv[1], sys.argv[2], workers=0)
except PlaitError as error:
    sys.stderr.write(str(error))
    sys.exit(7)
"""
    environment = {**os.environ, "PLAIT_STORE_PATIENCE": "0.3"}
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 7 and "Too many open files" in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert len(Dataset.open(tmp_path / "out")) == 24


class Faulty(ThreadingHTTPServer):
    """A proxy before a store that fails as stores do: `share` of the requests, each time otherwise; `down`: all."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.behind, self.share, self.down = behind, 0.0, False
        self.draw = random.Random(5)
        self.faults = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *arguments: object) -> None:
        pass

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _pass(self) -> None:
        self.close_connection = True
        body = b"".join(self._body())
        fault = self.server.draw.choice(["refuse", "403", "503", "cut"])
        if not self.server.down and self.server.draw.random() >= self.server.share:
            fault = ""
        self.server.faults += bool(fault)
        if fault == "refuse":
            self.connection.close()
            return
        if fault in ("403", "503"):
            reason = b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
            self._answer(int(fault), {"Content-Type": "application/xml"}, reason, len(reason))
            return
        headers = {
            key: value
            for key, value in self.headers.items()
            if key.lower() not in ("connection", "transfer-encoding", "expect")
        }
        headers.setdefault("Content-Type", "application/octet-stream")  # urllib would say that it is a form
        request = urllib.request.Request(self.server.behind + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                status, found, data = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            status, found, data = error.code, dict(error.headers), error.read()
        length = int(found.get("Content-Length", len(data))) if self.command == "HEAD" else len(data)
        self._answer(status, found, data[: len(data) // 2] if fault == "cut" else data, length)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815


@pytest.fixture()
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faulty]:
    moto = pytest.importorskip("moto.server")
    fsspec = pytest.importorskip("s3fs") and __import__("fsspec")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Faulty(f"http://{host}:{port}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}", "AWS_MAX_ATTEMPTS": "1",
        "PLAIT_STORE_PATIENCE": "60", "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield proxy
    proxy.shutdown()
    server.stop()


@pytest.mark.slow
def test_an_object_store_behind_a_proxy_that_fails(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    for n in range(60):
        system.pipe_file(f"bucket/raw/{'cat' if n % 2 else 'dog'}/{n}.png", image(n))
    rows = "".join(json.dumps({"text": f"text {n}", "n": n}) + "\n" for n in range(4000))
    system.pipe_file("bucket/table/rows.jsonl", rows.encode())

    def shards(url: str) -> tuple[list[str], int]:
        dataset = Dataset.open(url)
        return [shard.sha256 for shard in dataset.manifest.shards], dataset.manifest.rejected

    # A new prefix in a flat store, with and without a slash at its end.
    prepare("s3://bucket/raw", "s3://bucket/clean/", workers=2)
    prepare("s3://bucket/table", "s3://bucket/clean-table", workers=0)
    wanted = shards("s3://bucket/clean"), shards("s3://bucket/clean-table")
    store.share = 0.3
    for run in range(3):
        prepare("s3://bucket/raw/", f"s3://bucket/out{run}", workers=2)
        prepare("s3://bucket/table", f"s3://bucket/table{run}", workers=0)
        assert (shards(f"s3://bucket/out{run}"), shards(f"s3://bucket/table{run}")) == wanted
        assert [r.parts["label"] for r in Dataset.open(f"s3://bucket/out{run}").iterate(columns=["label"])].count(
            "cat"
        ) == 30
    assert store.faults > 50 and wanted[0][1] == wanted[1][1] == 0
    # Down for good: the true reason, no reject, nothing kept of what was not read; and the same bytes afterwards.
    monkeypatch.setenv("PLAIT_STORE_PATIENCE", "1")
    dataset = Dataset.open("s3://bucket/out0")
    store.down = True
    with pytest.raises(PlaitError, match="tried for"):
        prepare("s3://bucket/raw", "s3://bucket/late", workers=2)
    with pytest.raises(PlaitError, match="tried for"):
        list(dataset.iterate())
    store.down, store.share = False, 0.0
    prepare("s3://bucket/raw", "s3://bucket/late", workers=2)
    assert shards("s3://bucket/late") == wanted[0]
    with pytest.raises(PlaitError, match=r"does not exist|is empty"):
        prepare("s3://bucket/none", "s3://bucket/x", workers=0)
    with pytest.raises(FileNotFoundError), open_binary("s3://bucket/none.txt"):
        pass
