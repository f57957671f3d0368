"""A chunk of records, checked: media read, decoded in full and looked at, the result written aside as an Arrow file.

Runs in processes of its own (`staging.py` starts them): a decoder that crashes takes its process along, and nothing
else. Imports neither torch nor the rooms above, so that these processes start fast and stay small.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plait.core.rejects import Reason, RejectKind
from plait.core.system import limit_memory
from plait.data.conversations import turns
from plait.data.fingerprints import text_print
from plait.data.known import MediumFacts, known_media
from plait.data.record import Rejected, rejected, rejected_of, text_fault
from plait.data.stores import StoreError, location, read_bytes
from plait.modalities.descriptor import LIMITS, MediaError
from plait.modalities.image_files import encode_png
from plait.modalities.media import MEDIA

# Columns of the file: what is known of a record, then for each part NAME "part:NAME", and for a medium its width and
# height or seconds and rate, its digest and its fingerprint; "words" is the fingerprint of a record without media.
FACTS = {"id": pa.string(), "place": pa.string(), "split": pa.string(), "key": pa.binary(16), "content": pa.binary(16),
         "group": pa.binary(16), "draw": pa.int64(), "rank": pa.int64(), "words": pa.binary(),
         "group_name": pa.string()}  # fmt: skip
MEDIA_FACTS = {"first": pa.float64(), "second": pa.float64(), "digest": pa.binary(16), "print": pa.binary()}

Task = dict[str, Any]


def _key(data: bytes) -> int:
    """As runtime.key_of: a stable 63-bit integer."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def _text(value: str | Task, blobs: list[bytes]) -> str | Task:
    """A part of an item; of a long text its characters, which come as bytes."""
    if isinstance(value, dict) and "text" in value:
        return blobs[value["text"]].decode(errors="surrogatepass")
    return value


def _digest(parts: Mapping[str, str | bytes]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        body = value.encode() if isinstance(value, str) else value
        digest.update(f"{name}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.digest()


def _fetch(medium: dict[str, Any], blobs: list[bytes]) -> bytes:
    if "pixels" in medium:
        return encode_png(np.frombuffer(blobs[medium["blob"]], np.uint8).reshape(medium["pixels"]))
    if "blob" in medium:
        data = blobs[medium["blob"]]
    else:
        try:
            data = read_bytes(location(medium["path"]), LIMITS.file_bytes + 1)
        except OSError as error:  # it is not there, or may not be read; other failures are StoreErrors
            raise MediaError(f"cannot be read: {error.strerror or error}", RejectKind.UNREADABLE) from error
    if not data:
        raise MediaError("the file is empty", RejectKind.EMPTY)
    if len(data) > LIMITS.file_bytes:
        raise MediaError(f"larger than {LIMITS.file_bytes >> 20} MiB", RejectKind.TOO_LARGE)
    return data


def _seen(
    kind: str, data: bytes, digest: bytes, task: Task, lately: dict[tuple[str, bytes], MediumFacts]
) -> MediumFacts:
    """What is known of a medium: from the dataset that is added to, from a record just before (an image with five
    captions stands in five), else from decoding it. Raises MediaError."""
    look = lately.get((kind, digest))
    if look is None:
        known_looks = known_media(task["known"]) if task.get("known") else None
        look = known_looks.get(kind, digest, task["near"]) if known_looks else None
        look = look or MediumFacts(*MEDIA[kind].look(data, task["near"]))
        lately[kind, digest] = look
    return look


def _words_of(chat: str) -> str:
    """What is said in a conversation, without the shell that all conversations share."""
    return "\n".join(value for turn in turns(chat) for kind, value in turn.parts if kind == "text")


def _check(
    item: Task, task: Task, blobs: list[bytes], fault: Reason | None, lately: dict[tuple[str, bytes], MediumFacts]
) -> dict[str, Any] | Rejected:
    """What is known of one record, or why it cannot be used. `fault`: how an earlier try ended; `lately`: the media of
    this chunk so far."""
    place = item["place"]
    if why := text_fault(item["id"]):
        return rejected(place, why.about("id"))
    if item["group"] and (why := text_fault(item["group"])):
        return rejected(place, why.about("group"))
    parts: dict[str, str | bytes] = {}
    row: dict[str, Any] = {"id": item["id"], "place": place, "split": item["split"]}
    for name, value in item["parts"].items():
        if isinstance(value, str):
            if why := text_fault(value):
                return rejected(place, why.about(f"column '{name}'"))
            parts[name] = value
            continue
        try:
            if fault:
                raise MediaError(fault.detail, fault.kind)
            data = _fetch(value, blobs)
            digest = hashlib.sha256(data).digest()[:16]
            look = _seen(value["kind"], data, digest, task, lately)
            parts[name] = data
        except (MediaError, MemoryError) as error:
            why = error.reason if isinstance(error, MediaError) else Reason(RejectKind.NO_MEMORY)
            if value["name"] == place:
                return rejected(place, why)
            return Rejected(value["name"], None, Reason(why.kind, f"{why} (of {place})") if ":" in place else why)
        row |= {f"first:{name}": look.first, f"second:{name}": look.second, f"print:{name}": look.print}
        row[f"digest:{name}"] = digest
    if not parts:
        return rejected(place, Reason(RejectKind.EMPTY_RECORD, "the record is empty"))
    media = {name: data for name, data in parts.items() if isinstance(data, bytes)}
    group = _digest(media or parts)
    words = {name: text for name, text in parts.items() if isinstance(text, str)}
    of_words = _digest(words) if media else group  # without media the words are all there is
    row["group"], row["content"] = group[:16], hashlib.sha256(group + of_words).digest()[:16]
    if task["near"] and not media:
        row["words"] = text_print(
            "\n".join(_words_of(text) if n in task["chats"] else text for n, text in words.items())
        )
    if item["group"]:
        group = hashlib.sha256(item["group"].encode()).digest()
        row["group_name"] = item["group"]
    row["key"] = hashlib.sha256(item["id"].encode()).digest()[:16]
    row["draw"] = _key(f"{task['seed']}:{group.hex()}".encode())
    row["rank"] = _key(f"{task['seed']}:{item['id']}".encode())
    return row | {f"part:{name}": value for name, value in parts.items()}


def check_chunk(task: Task, blobs: list[bytes], at: Callable[[int], None] = lambda n: None) -> None:
    """Check the records of a task and write what was found to `task["out"]`, in one piece. Raises OSError where
    it cannot be written, and StoreError where a disk or a store fails: then there is no chunk.

    `at` is told which record is under work, and -1 once all are done; `task["faults"]` says how earlier tries at a
    record ended.
    """
    rows: list[dict[str, Any]] = []
    refused: list[Rejected] = []
    kinds: dict[str, str] = {}
    lately: dict[tuple[str, bytes], MediumFacts] = {}
    for n, item in enumerate(task["items"]):
        if isinstance(item, list):
            refused.append(rejected_of(item))
            continue
        at(n)
        item = item | {"parts": {name: _text(value, blobs) for name, value in item["parts"].items()}}
        fault = task.get("faults", {}).get(str(n))  # as JSON
        checked = _check(item, task, blobs, Reason(RejectKind(fault[0]), fault[1]) if fault else None, lately)
        if isinstance(checked, Rejected):
            refused.append(checked)
            continue
        rows.append(checked)
        kinds |= {name: "text" if isinstance(value, str) else value["kind"] for name, value in item["parts"].items()}
    at(-1)
    types: dict[str, pa.DataType] = dict(FACTS)
    for name, kind in kinds.items():
        types[f"part:{name}"] = pa.large_string() if kind == "text" else pa.large_binary()
        if kind != "text":
            types |= {f"{fact}:{name}": of for fact, of in MEDIA_FACTS.items()}
    facts = {b"rejects": json.dumps(refused).encode(), b"kinds": json.dumps(kinds).encode()}
    columns = {name: _column([row.get(name) for row in rows], of) for name, of in types.items()}
    table = pa.table(columns, pa.schema(types, facts))
    out = Path(task["out"])
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(out)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as an Arrow array; large ones are copied once."""
    if kind != pa.large_binary():
        return pa.array(values, kind)
    absent = np.array([value is None for value in values], bool)
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    body = b"".join(value for value in values if value is not None)
    mask = pa.py_buffer(np.packbits(~absent, bitorder="little").tobytes()) if absent.any() else None
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(ends.tobytes()), pa.py_buffer(body)])


def send(file: Any, task: Task, blobs: list[bytes]) -> None:
    """Write a task to a process: the lengths, the task but for its items and these as JSON, the blobs. `written_items`
    of a task are its items as JSON already, which are large where they are texts."""
    head = json.dumps({name: value for name, value in task.items() if name not in ("items", "written_items")}).encode()
    items = task["written_items"] if "written_items" in task else json.dumps(task["items"]).encode()
    pieces = [head, items, *blobs]
    file.write(struct.pack("<I", len(pieces)) + struct.pack(f"<{len(pieces)}Q", *map(len, pieces)))
    for blob in pieces:
        file.write(blob)
    file.flush()


def _receive(file: Any) -> tuple[Task, list[bytes]] | None:
    head = file.read(4)
    if len(head) < 4:
        return None
    (count,) = struct.unpack("<I", head)
    lengths = struct.unpack(f"<{count}Q", file.read(8 * count))
    task = json.loads(file.read(lengths[0]))
    task["items"] = json.loads(file.read(lengths[1]))
    return task, [file.read(length) for length in lengths[2:]]


class _NoPandas:
    """Where pandas is installed, pyarrow imports it, for seconds, to see whether a list is one of its columns."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError(name)


def serve(status: str) -> None:
    """The loop of a checking process: tasks on stdin, one JSON line for each on stdout. The record under work is
    written to the file `status`, for whoever has to say at which one this process ended."""
    sys.meta_path.insert(0, _NoPandas())
    limit_memory(4 << 30)
    with open(status, "r+b") as file, mmap.mmap(file.fileno(), 8) as now:  # noqa: PTH123 - mmap wants a descriptor

        def at(n: int) -> None:
            now[:] = struct.pack("<q", n)

        while (received := _receive(sys.stdin.buffer)) is not None:
            try:
                check_chunk(*received, at)
                answer: dict[str, Any] = {}
            except StoreError as error:
                answer = {"store": str(error)}
            except OSError as error:
                answer = {"error": error.strerror or str(error), "errno": error.errno}
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            sys.stdout.buffer.flush()
