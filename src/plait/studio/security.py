"""Who may come in: a one-time token in the address, then a cookie; this machine's names alone; no other page's
requests."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]

COOKIE = "plait_studio"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
FILE_POLICY = "default-src 'none'; sandbox"
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(self)"),
]


class Gate:
    """The outermost application.

    Args:
        app: What answers those who may come in.
        port: The port that the studio listens on.
        token: What the first address carries; None makes one.
    """

    def __init__(self, app: Any, port: int, token: str | None = None) -> None:
        self.app, self.token = app, token or secrets.token_urlsafe(24)
        self.session = secrets.token_urlsafe(32)
        names = ("127.0.0.1", "localhost", "[::1]")
        self.hosts = {f"{name}:{port}" for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        if host not in self.hosts:
            await _answer(send, 403, "This studio answers on this machine alone.")
            return
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.lower() != f"http://{host}"
        elsewhere = headers.get(b"sec-fetch-site") in ("cross-site", "same-site")
        # A link from elsewhere may open the start page; nothing else may be asked for from another page.
        if foreign or (elsewhere and (scope["method"], scope["path"]) != ("GET", "/")):
            await _answer(send, 403, "Other pages may not ask this studio.")
            return
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and token and hmac.compare_digest(token.encode(), self.token.encode()):
            cookie = f"{COOKIE}={self.session}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(send, 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
            return
        if not self._known(headers.get(b"cookie", "")):
            await _answer(send, 401, "Open the address that `plait studio` printed: it carries a token.")
            return
        await self.app(scope, receive, _with_headers(send))

    def _known(self, cookies: str) -> bool:
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except Exception:  # a cookie that no browser sends
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self.session.encode())


def _with_headers(send: Send) -> Send:
    async def sent(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            added = [(name, value) for name, value in HEADERS if name not in names]
            if b"content-security-policy" not in names:
                added.append((b"content-security-policy", POLICY.encode()))
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent


async def _answer(send: Send, status: int, text: str, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    policy = (b"content-security-policy", FILE_POLICY.encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS, policy, *(extra or [])]}
    )
    await send({"type": "http.response.body", "body": body})
