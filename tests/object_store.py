"""An object store on this machine, behind a proxy that refuses, answers 403 and 503, and cuts bodies."""

from __future__ import annotations

import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


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


def object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faulty]:
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
