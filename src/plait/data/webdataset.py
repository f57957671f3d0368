"""WebDataset shards -> records: tars read once from end to end, members of one stem being one record.

A member's ending says what it is: images and audio by their format (`jpg` -> column `image`, `seg.png` -> `seg`),
`txt` -> `text`, `cls` -> `label`, `json` -> a text column for each of its keys. What is none of these is listed.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from plait.core.rejects import Reason, RejectKind
from plait.data.files import DAMAGED, Item, Media, Plan, RawRecord, Tree, shard_key, suffix_of
from plait.data.folders import FileSplits
from plait.data.record import RESERVED, Rejected, UnusableError, text_fault
from plait.data.rows import parse_json
from plait.data.stores import open_binary, raise_if_passing
from plait.data.tables import words
from plait.modalities.descriptor import LIMITS
from plait.modalities.media import KINDS, kind_of_suffix

_SAMPLE = 200  # records that are looked at to name the columns
_TEXTS = {"txt": "text", "text": "text", "cls": "label"}


def plan_shards(tree: Tree, labels: dict[str, list[str]]) -> Plan | None:
    """The shards of a source as one plan, or None where there is none."""
    if not tree.shards:
        return None
    columns: dict[str, str] = {}
    splits = FileSplits(tree.shards)
    for item in islice(_records(tree, tree.shards[0], labels, None), _SAMPLE):
        if isinstance(item, RawRecord):
            columns |= {name: v.kind if isinstance(v, Media) else "text" for name, v in item.parts.items()}

    def read() -> Iterator[Item]:
        for shard in tree.shards:
            tree.used.add(shard)
            yield from _records(tree, shard, labels, splits.split(shard))

    ordered = dict(sorted(columns.items(), key=lambda entry: KINDS.index(entry[1])))
    note = f"{len(tree.shards)} WebDataset shards -> {', '.join(ordered)}"
    return Plan(ordered, Counter(), read, [note], warnings=[*splits.notes, *splits.folders.notes.values()])


def _records(tree: Tree, shard: str, labels: dict[str, list[str]], split: str | None) -> Iterator[Item]:
    members: list[tuple[str, str, bytes]] = []  # key, ending, content
    try:
        with open_binary(tree.files[shard]) as file, tarfile.open(fileobj=file, mode="r|*") as packed:
            for member in packed:
                if member.isdir():
                    continue
                key, ending = shard_key(member.name)
                if members and members[0][0] != key:
                    yield from _record(shard, members, split, labels)
                    members = []
                fault = text_fault(member.name)
                if not fault and not member.isreg():
                    fault = Reason(RejectKind.LINK, "a link or a device in a shard")
                if not fault and member.size > LIMITS.file_bytes:
                    fault = Reason(RejectKind.TOO_LARGE, f"larger than {LIMITS.file_bytes >> 20} MiB")
                if fault:
                    shown = member.name.encode("utf-8", "backslashreplace").decode()
                    yield Rejected(f"{shard}/{shown}", None, fault)
                    continue
                content = packed.extractfile(member)
                members.append((key, ending, content.read() if content is not None else b""))
            # tarfile takes half a header for the end.
            file.seek(packed.offset)
            if suffix_of(shard) == ".tar" and 0 < len(file.read(512)) < 512:
                raise tarfile.ReadError("it is cut short")
        if members:
            yield from _record(shard, members, split, labels)
    except DAMAGED as error:
        raise_if_passing(error, shard)
        yield from _record(shard, members, split, labels) if members else ()
        yield Rejected(
            shard, None, Reason(RejectKind.DAMAGED, f"damaged archive: {error}; the rest of it was not read")
        )


def _record(
    shard: str, members: list[tuple[str, str, bytes]], split: str | None, labels: dict[str, list[str]]
) -> Iterator[Item]:
    """The record of members that share a stem, and the rejections of those that cannot be used."""
    key = members[0][0]
    place = f"{shard}/{key}"
    record = RawRecord(place, place, {}, split)
    faults: list[Rejected] = []
    for _, ending, content in members:
        name, suffix = ending.rpartition(".")[0], ending.rpartition(".")[2]
        member = f"{place}.{ending}"
        try:
            if kind := kind_of_suffix(f".{suffix}"):
                record.parts[_free(name or kind, record)] = Media(kind, member, data=content)
            elif suffix == "json":
                value = parse_json(content.decode("utf-8-sig"))
                for column, cell in (value if isinstance(value, dict) else {"json": value}).items():
                    if (text := words(cell, labels.get(column))) is not None:
                        record.parts[_free(str(column), record)] = text
            elif suffix in _TEXTS:
                column = name or _TEXTS[suffix]
                if (text := words(content.decode("utf-8-sig").strip(), labels.get(column))) is not None:
                    record.parts[_free(column, record)] = text
            else:
                faults.append(
                    Rejected(member, None, Reason(RejectKind.UNKNOWN_FORMAT, "not a kind of member that is read"))
                )
        except (ValueError, RecursionError, UnusableError) as error:
            faults.append(Rejected(member, None, Reason(RejectKind.UNREADABLE, f"cannot be read: {error}")))
    if record.parts or not faults:
        yield record
    yield from faults


def _free(name: str, record: RawRecord) -> str:
    """The name, or one with a number where the record has that part already."""
    name = f"{name}_2" if name in RESERVED else name
    tries = (name if n == 1 else f"{name}_{n}" for n in range(1, len(record.parts) + 2))
    return next(one for one in tries if one not in record.parts)
