"""What stands before every route: host, origin, key, size; a client that leaves; the log line."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from plait.server.access_log import Metrics, RequestContext
from plait.server.heap import HeapTrimmer
from plait.server.limits import ApiError, Key, Limits, known_key
from plait.server.worker import log_fault

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = "/health"  # the one route that needs no key
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
METHODS = b"GET, HEAD, POST"
EXPOSED = (b"access-control-expose-headers", b"retry-after, x-request-id, x-plait-ignored")
_NAMES = re.compile(rb"[A-Za-z0-9-]{1,64}(?:\s*,\s*[A-Za-z0-9-]{1,64}){0,63}")
_FIELD = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
log = logging.getLogger("plait.server")


@dataclass
class AccessPolicy:
    """Who may come in."""

    hosts: set[str]
    origins: set[str] = field(default_factory=set)
    keys: dict[str, Key] = field(default_factory=dict)  # by name; empty: no key is needed
    any_address: bool = False  # bound off loopback: a Host that is an IP address is no rebound name
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)  # by key: requests left, and when that was
    browsers: bool = False  # there is a page: browsers ask for the key and send it as a password (HTTP Basic)

    def spend(self, name: str, now: float) -> None:
        """Count a request of a key that has a rate. Raises ApiError 429 where it has none left."""
        key = self.keys.get(name)
        if key is None or key.rate is None:
            return
        tokens, since = self._left.get(name, (float(key.rate), now))
        tokens = min(tokens + (now - since) * key.rate / 60, float(key.rate))
        if tokens < 1:
            self._left[name] = tokens, now
            seconds = str(math.ceil((1 - tokens) * 60 / key.rate))
            raise ApiError(
                429, f"This key may send {key.rate} requests a minute. Try again in {seconds} s.", code="rate_limit",
                headers={"Retry-After": seconds},
            )  # fmt: skip
        self._left[name] = tokens - 1, now

    def allowed_origin(self, scope: Scope) -> bytes | None:
        """The Origin header of a request from a page that `--allow-origin` names."""
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        return origins[0] if len(origins) == 1 and origins[0].decode("latin-1").lower() in self.origins else None

    def check(self, scope: Scope) -> str:
        """The name of the request's key, empty where none is needed. Raises ApiError where its host, origin or key is
        none that is known, or the key has been used too often."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = headers.get(b"host", [])
        host = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        if host is None:
            raise ApiError(400, "The request needs one Host header with a host name.", code="host")
        if host[1] not in self.hosts and not (self.any_address and _is_address(host[1])):
            raise ApiError(403, "This server does not answer for that host. Add it with --allow-host.", code="host")
        origins = headers.get(b"origin", [])
        if origins:
            origin = origins[0].decode("latin-1").lower()
            same_origin = origin.partition("://")[2] == hosts[0].decode("latin-1").lower()
            if len(origins) > 1 or not (same_origin or origin in self.origins):
                raise ApiError(403, "Pages of that origin may not call. Add it with --allow-origin.", code="origin")
            if origin in self.origins and is_preflight(scope):
                return ""  # browsers send no key along with the question whether they may
        if not self.keys or scope["path"] == OPEN:
            return ""
        credentials = headers.get(b"authorization") or [b"Bearer " + key for key in headers.get(b"x-api-key", [])]
        name = known_key(credentials[0], self.keys, self.browsers) if len(credentials) == 1 else None
        if name is None:
            challenge = 'Basic realm="Plait: the API key is the password"'
            raise ApiError(
                401, "A key is needed. Send the header 'Authorization: Bearer KEY'.", code="invalid_api_key",
                headers={"WWW-Authenticate": challenge if self.browsers and scope["path"] == "/" else "Bearer"},
            )  # fmt: skip
        return name


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks, before a request, whether it may send it. The guard itself answers: nothing that a
    preflight asks ever reaches a route."""
    return scope["method"] == "OPTIONS" and any(n == b"access-control-request-method" for n, _ in scope["headers"])


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class AccessMiddleware:
    """The outermost application: every answer, also a refusal, passes through it."""

    def __init__(
        self, app: Any, access_policy: AccessPolicy, limits: Limits, metrics: Metrics, routes: set[str]
    ) -> None:
        self.app, self.access_policy, self.limits, self.metrics, self.routes = (
            app,
            access_policy,
            limits,
            metrics,
            routes,
        )
        self.stopping = False
        self.held = 0  # bytes of all bodies that are being handled
        self.heap = HeapTrimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        request_context = RequestContext("req-" + secrets.token_hex(8))
        scope["trail"] = request_context
        origin = self.access_policy.allowed_origin(scope)

        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                request_context.status = message["status"]
                headers = list(message.get("headers", []))
                present = {name.lower() for name, _ in headers}
                headers += [header for header in SAFE if header[0] not in present]
                if origin is not None:
                    headers += [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), EXPOSED]
                headers.append((b"x-request-id", request_context.id.encode()))
                if request_context.ignored:
                    names = (name for name in sorted(request_context.ignored) if _FIELD.fullmatch(name))
                    headers.append((b"x-plait-ignored", ", ".join(names)[:1000].encode()))
                if self.stopping:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            elif not message.get("more_body", False):
                request_context.complete = True
            await send(message)

        body_bytes_held = [0]
        try:
            request_context.key = self.access_policy.check(scope)
            self.access_policy.spend(request_context.key, request_context.begun)
            if self.stopping:
                raise ApiError(503, "The server is stopping. Try again soon.", code="stopping")
            if scope["method"] == "OPTIONS":
                await answer_options(scope, out)
                return
            body = await self._body(scope, receive, body_bytes_held)
            if body is not None:
                await self._run(self._routed(scope), body, receive, out, request_context)
        except ApiError as error:
            await answer(error, out)
        except Exception as error:
            log_fault("route", error)  # the application has answered with status 500, unless it had begun another
            if not request_context.status:
                await answer(ApiError(500, "Something went wrong in the server."), out)
        finally:
            self.held -= body_bytes_held[0]
            self.heap.after(body_bytes_held[0])
            self._tell(scope, request_context)

    def _routed(self, scope: Scope) -> Scope:
        """The request as the routes know it: HEAD as GET, whose body uvicorn does not send, and `/chat/completions` as
        `/v1/chat/completions`."""
        path = self._path(scope)
        return {
            **scope,
            "method": "GET" if scope["method"] == "HEAD" else scope["method"],
            "path": path,
            "raw_path": path.encode(),
        }

    def _path(self, scope: Scope) -> str:
        path: str = scope["path"]
        return f"/v1{path}" if f"/v1{path}" in self.routes or path.startswith("/models/") else path

    async def _body(self, scope: Scope, receive: Receive, body_bytes_held: list[int]) -> bytes | None:
        """The whole body; None where the client left. Raises ApiError 413 as soon as it is known to be too long."""
        max_bytes = self.limits.body_bytes
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if len(stated) > 15 or int(stated) > max_bytes:  # the parser has seen that it is a number
            raise ApiError(413, f"The body is larger than {max_bytes // 1_000_000} MB. Send less at once.")
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > max_bytes:
                raise ApiError(413, f"The body is larger than {max_bytes // 1_000_000} MB. Send less at once.")
            self.held += len(part)
            body_bytes_held[0] += len(part)
            if self.held > self.limits.bodies_bytes:
                raise ApiError(429, "Too much is being sent at once. Try again soon.", code="overloaded",
                               headers={"Retry-After": "1"})  # fmt: skip
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, out: Send, request_context: RequestContext
    ) -> None:
        """Run the application, and cancel it when its client leaves."""
        body_sent = False

        async def replay() -> Message:
            nonlocal body_sent
            if body_sent:
                await asyncio.Event().wait()
            body_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task, client_gone = asyncio.ensure_future(self.app(scope, replay, out)), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, client_gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not request_context.complete:
                request_context.end = "left"
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            task.cancel()
            client_gone.cancel()

    def _tell(self, scope: Scope, request_context: RequestContext) -> None:
        path = self._path(scope)
        route = "/v1/models/{model}" if path.startswith("/v1/models/") else path if path in self.routes else "other"
        self.metrics.count(request_context, route)
        for name in request_context.ignored:
            self.metrics.count_ignored(name if _FIELD.fullmatch(name) else "other")
        fields: dict[str, Any] = {
            "id": request_context.id,
            "method": scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD") else "other",
            "route": route,
            "status": request_context.status,
            "ms": round((time.monotonic() - request_context.begun) * 1e3, 1),
        }
        if request_context.model:
            fields |= {
                "model": request_context.model,
                "read": request_context.prompt_tokens,
                "written": request_context.completion_tokens,
            }
        if request_context.key:
            fields["key"] = request_context.key
        if request_context.end:
            fields["end"] = request_context.end
        log.info("request", extra={"fields": fields})


async def answer_options(scope: Scope, send: Send) -> None:
    """Say what a page may send. What it sends then is judged by itself, key and all."""
    headers = [(b"content-length", b"0"), (b"allow", METHODS)]
    if is_preflight(scope):
        requested = b", ".join(value for name, value in scope["headers"] if name == b"access-control-request-headers")
        headers += [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", b"600"),
                    (b"vary", b"Access-Control-Request-Headers")]  # fmt: skip
        if requested and _NAMES.fullmatch(requested):
            headers.append((b"access-control-allow-headers", requested))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def answer(error: ApiError, send: Send) -> None:
    """Send an error in OpenAI's shape."""
    content = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": content})
