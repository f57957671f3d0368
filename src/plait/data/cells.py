"""What the cells of a table's column are: media, paths, labels, numbers or texts, told from a sample of them."""

from __future__ import annotations

import codecs
import math
import re
from typing import Any

from plait.data.conversations import is_chat
from plait.data.files import Tree, suffix_of
from plait.data.record import split_name, text_fault
from plait.modalities.media import MEDIA, kind_of_suffix, sniff

SEPARATORS = ("|", ";", ",")  # of several labels in one cell; the first that occurs in a column is its own
DATA_URL = re.compile(r"data:(\w+)/[\w.+-]+;base64,")  # a medium in a text, by its kind
_MOST = 0.8  # of a column's values decide what it is
_LISTED = 60  # characters of a label in a list that is taken for labels unasked
_NUMBERS = 20  # different values from which a column of numbers may be one to predict


def is_blank(value: Any) -> bool:
    """Whether a cell holds no value: nothing, an empty text, or NaN, by which data frames write a missing number."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def head_of(value: Any) -> Any:
    """The beginning of a cell, which tells what it is; of what is nested, that of each part."""
    if isinstance(value, bytes):
        return value[:64]
    if is_struct(value):
        return {"bytes": (value.get("bytes") or b"")[:64] or None, "path": value.get("path")}
    if isinstance(value, list):
        return [head_of(cell) for cell in value]
    if isinstance(value, dict):
        return {key: head_of(cell) for key, cell in value.items()}
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return value[:400]
    return value[:100_000] if isinstance(value, str) else value


def is_struct(value: Any) -> bool:
    """Whether a cell holds a medium as Hugging Face's datasets write one: its bytes, its path, or both."""
    return isinstance(value, dict) and "bytes" in value and set(value) <= {"bytes", "path"}


def most(count: int, values: list[Any]) -> bool:
    """Whether so many of the values decide what a column is: the few others are then rows to be rejected, and never a
    reason to read the whole column as something else."""
    return count >= _MOST * len(values)


def path_kinds(tree: Tree, table: str, column: str, values: list[Any]) -> set[str]:
    """The kinds of media whose paths most of the values are; empty where they are not paths."""
    named = column == "file_name" or column.endswith("_file_name")
    kinds: list[str] = []
    there = False
    for value in values:
        if not isinstance(value, str) or len(value) > 300 or "\n" in value or "://" in value:
            continue
        kind = kind_of_suffix(suffix_of(value.replace("\\", "/")))
        resolved = tree.resolve(table, value) if named or (not there and kind) else None
        if isinstance(resolved, str):
            there = True
            kind = kind or tree.kind(resolved)
        if kind:
            kinds.append(kind)
    return set(kinds) if (there or named) and values and most(len(kinds), values) else set()


def _data_url_kinds(values: list[Any]) -> set[str]:
    """The kinds of media that most of the values hold as data URLs; empty where they do not."""
    found = [match[1] for value in values if isinstance(value, str) and (match := DATA_URL.match(value))]
    kinds = {kind for kind in found if kind in MEDIA}
    return kinds if values and most(len(found), values) else set()


def are_web_media(values: list[Any]) -> bool:
    """Whether most of the values are addresses of media in the web."""
    addresses = [value for value in values if isinstance(value, str) and value.startswith(("http://", "https://"))]
    media = [value for value in addresses if kind_of_suffix(suffix_of(value.partition("?")[0]))]
    return bool(values) and most(len(media), values)


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a value are text: UTF-8 that may be cut, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not any(ord(c) < 32 and c not in "\t\n\r" for c in text)


def role_of(tree: Tree, table: str, column: str, values: list[Any]) -> str:
    """A column's role from its name and the sample of its values: what most of them are."""
    if not column or text_fault(column):
        return "ignore"
    if not values:
        return "text"
    if column == "split" and most(sum(isinstance(v, str) and bool(split_name(v)) for v in values), values):
        return "split"
    numbered = [v for v in values if isinstance(v, str | int)]
    if column == "id" and most(len(numbered), values) and most(len(set(numbered)), values):
        return "id"
    encoded = [v for v in values if isinstance(v, bytes) or is_struct(v)]
    if most(len(encoded), values):
        heads = [v if isinstance(v, bytes) else v["bytes"] or b"" for v in encoded]
        kinds = {kind[0] for head in heads if (kind := sniff(head))}
        paths = [v["path"] for v in encoded if not isinstance(v, bytes) and v["path"]]
        kinds = kinds or path_kinds(tree, table, "file_name", paths)
        if not kinds:
            return "text" if most(sum(bool(head) and _is_text(head) for head in heads), values) else "ignore"
        return "media" if len(kinds) > 1 else kinds.pop()
    if most(sum(map(is_chat, values)), values):
        return "chat"
    if _are_label_lists(values):
        return "labels"
    if kinds := _data_url_kinds(values):
        return "media" if len(kinds) > 1 else kinds.pop()
    kinds = path_kinds(tree, table, column, values)
    return "media" if len(kinds) > 1 else kinds.pop() if kinds else "text"


def _are_label_lists(values: list[Any]) -> bool:
    """Whether these are lists of labels: short texts that come again and again, sometimes several together."""
    lists = [value for value in values if isinstance(value, list)]
    cells = [cell for value in lists for cell in value]
    if not most(len(lists), values) or not all(isinstance(cell, str) and len(cell) <= _LISTED for cell in cells):
        return False
    return any(len(value) > 1 for value in lists) and len(cells) >= 3 * len(set(cells))


def separator_of(values: list[Any]) -> str | None:
    """What stands between the labels of a cell; None where every cell holds one, or lists."""
    texts = [value for value in values if isinstance(value, str)]
    return next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)


def are_numbers(values: list[Any]) -> bool:
    """Whether a column of these holds numbers that one may want to predict."""
    numbers = {number for value in values if (number := number_of(value)) is not None}
    return len(numbers) >= _NUMBERS and len([v for v in values if number_of(v) is not None]) == len(values)


def number_of(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
