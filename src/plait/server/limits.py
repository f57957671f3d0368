"""What a request may ask for, checked before memory is asked for; errors in OpenAI's shape; API keys."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from pydantic_core import from_json

from plait.core.errors import ContextLengthError, PlaitError
from plait.core.files import write_atomic
from plait.modalities.descriptor import Limits as MediaLimits
from plait.modalities.media import MEDIA, media_type

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The bounds of one server. Seconds are of a monotonic clock."""

    body_bytes: int = 20_000_000
    bodies_bytes: int = 256_000_000  # of all requests together, while they are handled
    head_bytes: int = 16 * 1024
    json_depth: int = 64
    json_marks: int = 1_000_000  # bytes of JSON outside strings
    text_bytes: int = 1_000_000  # of all texts of a request together
    label_bytes: int = 65_536  # of all labels of a request together
    media_parts: int = 8
    connections: int = 512
    batch: int = 64  # samples written at once, a model, where memory has room for their cache
    queue: int = 64  # samples that wait for a place in the batch, a model
    request_seconds: float = 120.0
    read_seconds: float = 10.0  # for a request's head; and for a body or a reader that hardly moves
    drain_seconds: float = 10.0  # that open requests have once the server is told to stop
    media: MediaLimits = field(default_factory=lambda: MediaLimits(file_bytes=15_000_000, seconds=60.0))


class ApiError(HTTPException):
    """An answer that is not 2xx, in OpenAI's shape. The message says what was wrong and what to send instead."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: PlaitError) -> ApiError:
    """What a request's own fault becomes."""
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return ApiError(400, str(error), code=code)


# --- JSON -------------------------------------------------------------------------------------------------------

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # an open one too, so that no byte is looked at twice


def parse_json(body: bytes, limits: Limits) -> Any:
    """The value that a body spells. Raises ApiError for what is not JSON, NaN and Infinity among it, and for values
    nested or numerous beyond the limits, before they are built."""
    # Strings are left out: what remains tells depth and the number of values.
    rest = _STRINGS.sub(b'""', body) if body.count(b'"') <= limits.json_marks // 2 else body
    if len(rest) > limits.json_marks:
        raise ApiError(413, f"The JSON holds too many values: more than {limits.json_marks} bytes outside strings.")
    marks = np.frombuffer(rest, np.uint8)
    steps = np.isin(marks, (0x5B, 0x7B)).astype(np.int32) - np.isin(marks, (0x5D, 0x7D)).astype(np.int32)
    if int(steps.cumsum().max(initial=0)) > limits.json_depth:
        raise ApiError(400, f"The JSON is nested deeper than {limits.json_depth} levels. Send it flatter.")
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:120]}.") from None


# --- media in JSON ----------------------------------------------------------------------------------------------

_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)(?:;[a-z-]+=[a-z0-9-]+)*;base64,", re.IGNORECASE)
_NAMES = {"image/jpg": "image/jpeg", "audio/mp3": "audio/mpeg", "audio/x-wav": "audio/wav", "audio/wave": "audio/wav",
          "audio/x-flac": "audio/flac", "audio/opus": "audio/ogg", "image/x-ms-bmp": "image/bmp"}  # fmt: skip


def decode_base64(text: str, limits: Limits, param: str) -> bytes:
    """The bytes that base64 spells. Raises ApiError for what is not base64, or too long, before it is decoded."""
    if len(text) // 4 * 3 > limits.media.file_bytes + 3:
        raise ApiError(413, f"The medium is larger than {limits.media.file_bytes // 1_000_000} MB.", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "The medium is not valid base64 (standard alphabet, with padding).", param) from None


def decode_data_url(url: str, kind: str, limits: Limits, param: str) -> bytes:
    """The bytes of a `data:` URL that holds an image (`kind` "image") or audio ("audio")."""
    example = f"data:{MEDIA[kind].formats[0].media_type};base64,..."
    if url[:5].lower() != "data:":
        raise ApiError(400, f"Media come as data: URLs; nothing is fetched. Send {example}.", param)
    prefix = _DATA_URL.match(url[:200])
    if prefix is None:
        raise ApiError(400, f"The data: URL needs a media type and base64. Send {example}.", param)
    data = decode_base64(url[prefix.end() :], limits, param)
    stated = _NAMES.get(prefix[1].lower(), prefix[1].lower())
    actual = media_type(data)
    if not actual.startswith(f"{kind}/") or stated != actual:
        formats = MEDIA[kind].format_names
        what = "of no known format" if actual == "application/octet-stream" else actual
        raise ApiError(400, f"The data: URL says {stated[:40]}, its content is {what}. Send {formats}.", param)
    return data


# --- keys -------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"([\w.@-]{1,64}) sha256:([0-9a-f]{64})(?: ([1-9]\d{0,6})/min)?")


@dataclass(frozen=True)
class Key:
    """A key as the file keeps it: the sha256 of it, and how many requests a minute it may send (None: any)."""

    digest: bytes
    rate: int | None = None


def new_key(file: Path, name: str, rate: int | None = None) -> str:
    """A new API key of 32 random bytes, for `rate` requests a minute; the file gets its name and its hash. Raises
    PlaitError for a name in use."""
    keys = read_keys(file) if file.exists() else {}
    if name in keys:
        raise PlaitError(f"{file} has a key of the name '{name}' already. Choose another, or delete its line.")
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise PlaitError(f"'{name}' is no name of a key: use letters, digits and . _ @ -, at most 64.")
    key = "plait-" + secrets.token_urlsafe(32)
    keys[name] = Key(hashlib.sha256(key.encode()).digest(), rate)
    write_atomic(file, "".join(map(_line, keys.items())))
    file.chmod(0o600)
    return key


def _line(entry: tuple[str, Key]) -> str:
    name, key = entry
    return f"{name} sha256:{key.digest.hex()}{f' {key.rate}/min' if key.rate else ''}\n"


def read_keys(file: Path) -> dict[str, Key]:
    """The keys of a file by name. Raises PlaitError for a file that is missing, empty, broken or that others may
    write."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise PlaitError(f"{file} cannot be read: {error}. Make one: plait key {file}") from error
    if mode & 0o022:
        raise PlaitError(f"{file} may be written by others. Run: chmod 600 {file}")
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = _LINE.fullmatch(line.strip())
        if fields is None:
            raise PlaitError(
                f"{file}:{number} is not 'NAME sha256:HEX', with N/min behind it or not. Keys are added by: plait key "
                f"{file}"
            )
        keys[fields[1]] = Key(bytes.fromhex(fields[2]), int(fields[3]) if fields[3] else None)
    if not keys:
        raise PlaitError(f"{file} holds no key. Add one: plait key {file}")
    return keys


def known_key(header: bytes, keys: dict[str, Key], passwords: bool = False) -> str | None:
    """The name of the key in an Authorization header; None where there is none that is known. With `passwords` it may
    also be the password of HTTP Basic, whoever the user is."""
    scheme, _, key = header.partition(b" ")
    if passwords and scheme.lower() == b"basic":
        try:
            scheme, key = b"bearer", base64.b64decode(key.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    digest = hashlib.sha256(key.strip()).digest()
    # Every key is compared, so that time tells nothing.
    matching = [name for name, key_ in keys.items() if hmac.compare_digest(digest, key_.digest)]
    return matching[0] if matching and scheme.lower() == b"bearer" else None
