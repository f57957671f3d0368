"""A dataset and further files as one source: the records that are there, then the new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.files import Item, Media, Plan, RawRecord
from plait.data.record import Record, Rejected


def grown_plan(dataset: Dataset, new: Plan, name: str) -> Plan:
    """The plan of `dataset` followed by `new`, whose ids and places begin with `name/`.

    What is there keeps its id, split and place. New records whose source names no split are divided by a hash of their
    content, as in a dataset of their own. Raises PlaitError where a column would hold two kinds of things.
    """
    columns = dict(dataset.columns)
    for column, kind in new.columns.items():
        if columns.setdefault(column, kind) != kind:
            raise PlaitError(
                f"Column '{column}' holds {kind} in {name}, and {columns[column]} in {dataset.path}. Give it another "
                f"name: --map {kind}={column}:NEWNAME."
            )
    chats = list(dict.fromkeys([*dataset.manifest.chats, *new.chats]))
    if clash := [c for c in chats if (c in dataset.manifest.chats) != (c in new.chats) and c in new.columns]:
        stored = "conversations" if clash[0] in dataset.manifest.chats else "texts"
        raise PlaitError(f"Column '{clash[0]}' holds {stored} in {dataset.path}, but not in {name}. Rename one.")

    def read() -> Iterator[Item]:
        groups = dataset.groups
        for number, record in enumerate(dataset.iterate()):
            parts = {column: _part(columns[column], record, column) for column in record.parts}
            yield RawRecord(record.id, record.source, parts, record.split, None if groups is None else groups[number])
        for item in new.read():
            if isinstance(item, Rejected):
                yield item._replace(file=f"{name}/{item.file}")
            else:
                parts = {column: _renamed(value, name) for column, value in item.parts.items()}
                yield RawRecord(f"{name}/{item.id}", f"{name}/{item.place}", parts, item.split, item.group)

    split_counts = new.split_counts.copy()
    for split, count in dataset.counts.items():
        split_counts[split] += count
    notes = [f"{len(dataset):,} records of {dataset.manifest.source}", *new.notes]
    return Plan(
        columns, split_counts, read, notes, chats=chats, warnings=new.warnings, grown=True, group_by=new.group_by
    )


def _part(kind: str, record: Record, column: str) -> str | Media:
    """A part of a record that is there already."""
    value = record.parts[column]
    return value if isinstance(value, str) else Media(kind, f"{record.id}#{column}", data=value)


def _renamed(value: str | Media, name: str) -> str | Media:
    return value if isinstance(value, str) else dataclasses.replace(value, name=f"{name}/{value.name}")
