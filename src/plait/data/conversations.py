"""Conversations in the shape of OpenAI's chat completions, as parts of a record.

`messages` becomes one part of text: JSON that keeps the turns, their roles and the order of what is in them, where a
image or an audio clip is named by the column that holds it:

    [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "column": "image"}]},
     {"role": "assistant", "content": "A cat."}]

The media themselves are parts like any other, `image`, `image_2`, ..., `audio`, ... in the order in which they stand.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from plait.modalities.descriptor import LIMITS

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MEDIA_MOST = 64  # of one conversation


@dataclass
class Turn:
    """One message. `parts` are ("text", text), or ("image" or "audio", column) in the order in which they stand;
    `message` is the whole message, with what else it holds (name, tool_calls)."""

    role: str
    parts: list[tuple[str, str]]
    message: dict[str, Any]


# Who speaks in ShareGPT's files (`from`, `value`), by the roles of OpenAI's.
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


_FIELDS = ({"role", "content"}, {"from", "value"})  # of a message


_NODE = {"message", "parent", "children"}  # of the tree of messages in ChatGPT's exports


def _is_tree(value: Any) -> bool:
    """Whether a value is a tree of messages, all of whose nodes are as ChatGPT writes them."""
    return isinstance(value, dict) and len(value) > 0 and all(map(_is_node, value.values()))


def _is_node(node: Any) -> bool:
    if not isinstance(node, dict) or not node.keys() >= _NODE:
        return False
    message, children = node["message"], node["children"]
    if not isinstance(node["parent"], str | None) or not isinstance(children, list | None):
        return False
    if not all(isinstance(child, str) for child in children or []) or not isinstance(message, dict | None):
        return False
    content, author = (message or {}).get("content"), (message or {}).get("author")
    if not isinstance(content, dict | None) or not isinstance(author, dict | None):
        return False
    return isinstance((content or {}).get("parts"), list | None)


def _branch(nodes: dict[str, Any], current: Any) -> list[dict[str, str]]:
    """The messages of a tree up to its node `current`; where there is no such node, along the last branches, which are
    what was said last. Those without text are left out."""
    if not isinstance(current, str) or current not in nodes:
        root = next((name for name, node in nodes.items() if node["parent"] not in nodes), None)
        path = _walk(nodes, root, lambda node: (node["children"] or [None])[-1])
    else:
        path = _walk(nodes, current, lambda node: node["parent"])[::-1]
    messages: list[dict[str, str]] = []
    for at in path:
        message = nodes[at]["message"] or {}
        parts = (message.get("content") or {}).get("parts") or []
        text = "\n".join(part for part in parts if isinstance(part, str)).strip()
        role = (message.get("author") or {}).get("role")
        if text and role in ROLES:
            messages.append({"role": role, "content": text})
    return messages


def _walk(nodes: dict[str, Any], at: str | None, following: Callable[[dict[str, Any]], str | None]) -> list[str]:
    """The names of nodes from one on, each once."""
    path: dict[str, None] = {}
    while at is not None and at in nodes and at not in path:
        path[at] = None
        at = following(nodes[at])
    return list(path)


def messages_of(value: Any, current: Any = None) -> Any:
    """A conversation as a list of messages with role and content, where it is one in another shape: JSON text, a list
    for each field (as `datasets` keeps a sequence of structs), ShareGPT's `from` and `value`, or the tree of ChatGPT's
    exports, of which `current` is the node that the user saw last. Anything else comes back as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and any(fields <= value.keys() for fields in _FIELDS):
        columns = list(value.values())
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if _is_tree(value):
        return _branch(value, current)
    if isinstance(value, list) and value and all(isinstance(m, dict) and "from" in m and "value" in m for m in value):
        return [{"role": _SHAREGPT.get(str(m["from"]).lower(), m["from"]), "content": m["value"]} for m in value]
    return value


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, in one of the shapes that `messages_of` knows."""
    value = messages_of(value)
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message and len(message) > 1 for message in value)
    )


def flatten(
    messages: Any, taken: Collection[str], medium: Callable[[str, bytes | str], Any], current: Any = None
) -> tuple[str, dict[str, Any]]:
    """The text of a conversation, and its media by column. `taken` are columns that the record has already; `medium`
    makes a part of a kind and the bytes, or the path, that the conversation holds. `current`: see `messages_of`.

    Raises ValueError saying what is wrong with it.
    """
    messages = messages_of(messages, current)
    if not is_chat(messages):
        raise ValueError("messages must be a list of objects with role and content")
    media: dict[str, Any] = {}

    def place(kind: str, value: bytes | str) -> dict[str, str]:
        if len(media) == _MEDIA_MOST:
            raise ValueError(f"more than {_MEDIA_MOST} images and audio clips in one conversation")
        names = (kind if n == 1 else f"{kind}_{n}" for n in range(1, 2 * _MEDIA_MOST + len(taken)))
        name = next(name for name in names if name not in taken and name not in media)
        media[name] = medium(kind, value)
        return {"type": kind, "column": name}

    messages_left = []
    for n, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"message {n}: role {message['role']!r} is none of {', '.join(ROLES)}")
        # Arrow fills the fields that other messages have with None.
        fields = {key: value for key, value in message.items() if value is not None}
        content = fields.get("content")
        if isinstance(content, list):
            fields["content"] = [_part(part, f"message {n}", place) for part in content]
        elif not isinstance(content, str) and not (content is None and len(fields) > 1):
            raise ValueError(f"message {n}: content must be a text or a list of parts")
        messages_left.append(fields)
    return json.dumps(messages_left, ensure_ascii=False), media


def _part(part: Any, where: str, place: Callable[[str, bytes | str], dict[str, str]]) -> dict[str, str]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"{where}: a part of the content must be an object with a type")
    kind = part["type"]
    value = part.get(kind)
    if kind == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if kind == "image_url":
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and url:
            return place("image", _url(url, where))
    if kind == "input_audio" and isinstance(value, dict) and isinstance(value.get("data"), str):
        return place("audio", decode_base64(value["data"], where))
    part_types = "text {text}, image_url {url: data:...} and input_audio {data}"
    raise ValueError(f"{where}: a part of type {kind!r} cannot be read; parts are {part_types}")


def _url(url: str, where: str) -> bytes | str:
    if url.startswith("data:"):
        head, comma, body = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"{where}: the data URL is not base64")
        return decode_base64(body, where)
    if "://" in url:
        raise ValueError(f"{where}: {url[:80]} is an address; write a data URL or the path of a file beside the table")
    return url


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of a medium in base64. Raises ValueError, which names where it stands."""
    if len(text) // 4 * 3 > LIMITS.file_bytes:
        raise ValueError(f"{where}: a medium larger than {LIMITS.file_bytes >> 20} MiB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: a medium is not valid base64: {error}") from None


def turns(text: str) -> list[Turn]:
    """The turns of a conversation, from the text that `flatten` made of it."""
    read = []
    for message in json.loads(text):
        content = message.get("content") or []
        parts = [("text", content)] if isinstance(content, str) else [
            ("text", part["text"]) if part["type"] == "text" else (part["type"], part["column"]) for part in content
        ]  # fmt: skip
        read.append(Turn(message["role"], parts, message))
    return read
