"""Sockets: uvicorn with deadlines for what clients send and read, and a shutdown that lets open requests end.

uvicorn alone waits for ever on a socket that sends nothing, or a byte a second, or does not read its answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, ClassVar

import uvicorn
from prometheus_client import Counter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from plait.core.errors import PlaitError
from plait.server.limits import ApiError, Limits

SLOWEST = 16_384  # bytes a second that a body must come with, once `read_seconds` are over
LEAST_READ = 65_536  # bytes that a client must take in `read_seconds` while more is waiting for it
SEND_BUFFER = 131_072  # bytes that the system may hold of an answer, so that a client's standstill shows


class _UntilClose(int):
    """The length of an answer that ends where its connection does: never exceeded, always reached."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> _UntilClose:
        return self


class Connection(HttpToolsProtocol):
    """One connection. `check` is called every second; it closes what has stood still for too long."""

    limits: ClassVar[Limits] = Limits()
    closed_early: ClassVar[Counter | None] = None  # by reason

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.phase, self.since = "head", self.loop.time()
        self.head = self.received = 0  # bytes of the head so far, of the body so far
        self.refusal = ApiError(400, "This is not HTTP/1.1 as it is understood here.", code="invalid_http")
        self.sent_mark, self.sent_since = 0, self.loop.time()
        self.written = 0
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > self.limits.connections:
            self._count("too_many")
            self.refusal = ApiError(503, "Too many connections. Try again soon, or use fewer.", code="too_many")
            self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.phase == "idle":
            self.phase, self.since, self.head = "head", self.loop.time(), 0
        if self.phase == "head":
            self.head += len(data)
        super().data_received(data)
        # A chunk may bring the body along, so that only a head that goes on is too long.
        if self.phase == "head" and self.head > self.limits.head_bytes and not self.transport.is_closing():
            self._too_long()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.phase == "idle" or self.phase == "busy":
            self.phase, self.since, self.head = "head", self.loop.time(), 0

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.head_bytes:
            self.refusal = self._long_head()
            raise ValueError  # the parser hands it to send_400_response
        self.phase, self.since, self.received = "body", self.loop.time(), 0
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":  # which knows no chunks
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UntilClose()

    def on_body(self, body: bytes) -> None:
        self.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.phase, self.since = "busy", self.loop.time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.phase == "busy" and self.cycle.response_complete:
            self.phase = "idle"  # uvicorn's own time-out for idle connections begins

    def send_400_response(self, msg: str) -> None:
        """What could not be parsed, in OpenAI's error shape."""
        content = json.dumps(self.refusal.body()).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[self.refusal.status_code] + head + content)
        self.transport.close()

    def _long_head(self) -> ApiError:
        return ApiError(431, f"The request's head is longer than {self.limits.head_bytes} bytes.", code="long_head")

    def _too_long(self) -> None:
        self.refusal = self._long_head()
        self.send_400_response("")

    def check(self, now: float) -> None:
        """Close the connection if its client has used up its time."""
        if self.flow.read_paused:
            self.since = now  # it is we who do not read
        waited, patience = now - self.since, self.limits.read_seconds
        if self._unread(now, patience):
            self._abort("slow_reader")
        elif self.transport.is_closing():
            pass  # what is left to send is watched above
        elif self.phase == "head" and waited > patience:
            self._abort("slow_head")
        elif self.phase == "body" and waited > patience + self.received / SLOWEST:
            self._abort("slow_body")

    def _unread(self, now: float, patience: float) -> bool:
        """Whether what waits to be sent has hardly moved; `sent_since` is when it last did."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or abs(waiting - self.sent_mark) >= LEAST_READ or self.sent_mark == 0:
            self.sent_mark, self.sent_since = waiting, now
            return False
        return now - self.sent_since > patience

    def _abort(self, reason: str) -> None:
        self._count(reason)
        self.transport.abort()

    def _count(self, reason: str) -> None:
        if self.closed_early is not None:
            self.closed_early.labels(reason).inc()


class Server(uvicorn.Server):
    """uvicorn's server with a watch over its connections; `on_stop` is called with the seconds that are left."""

    def __init__(self, config: uvicorn.Config, limits: Limits, on_stop: Callable[[float], None]) -> None:
        super().__init__(config)
        self.limits, self.on_stop = limits, on_stop
        self.on_start: Callable[[], None] | None = None

    async def on_tick(self, counter: int) -> bool:
        if counter == 0 and self.on_start is not None:
            self.on_start()
        if counter % 10 == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.on_stop(self.limits.drain_seconds)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything slow is done. Raises PlaitError where that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise PlaitError(f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port.") from None
    return sock


def make_server(app: Any, limits: Limits, on_stop: Callable[[float], None], closed_early: Counter) -> Server:
    """A server for `app`; `Server.run(sockets=[...])` runs it until SIGINT or SIGTERM."""
    protocol = type("Limited", (Connection,), {"limits": limits, "closed_early": closed_early})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(limits.drain_seconds) + 2,
        backlog=256,
    )
    return Server(config, limits, on_stop)
