"""What a search index is made of: the images, audio clips and texts of any source, one by one, with what is known of
each.

A source is a dataset that was prepared, or anything that `plait prepare` reads: files, folders, tables, archives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.dataset import Dataset
from plait.data.files import Media, RawRecord, scan
from plait.data.readers import plan
from plait.data.record import Rejected, UnusableError, text_fault
from plait.data.stores import location, read_bytes
from plait.modalities.descriptor import LIMITS
from plait.modalities.image_files import encode_png
from plait.modalities.media import kind_of_suffix


@dataclass
class Entry:
    """One image, audio or text. `id` is its place and stays the same when its content changes; `source` is the file
    (and line) it came from, for people; `texts` are the texts of its record by column; `own_id` is the id that its
    record was given by a column."""

    id: str
    source: str
    kind: str
    value: str | bytes | Media
    texts: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    own_id: str | None = None

    def content(self) -> str | bytes:
        """The text, or the encoded bytes of the medium. Raises OSError or UnusableError."""
        value = self.value
        if isinstance(value, str):
            if why := text_fault(value):
                raise UnusableError(why)
            return value
        if isinstance(value, Media):
            if value.pixels is not None:
                return encode_png(value.pixels)
            if value.data is None:
                assert value.path is not None
                value = read_bytes(value.path, LIMITS.file_bytes + 1)
            else:
                value = value.data
        if not value:
            raise UnusableError(Reason(RejectKind.EMPTY, "the file is empty"))
        if len(value) > LIMITS.file_bytes:
            raise UnusableError(Reason(RejectKind.TOO_LARGE, f"larger than {LIMITS.file_bytes >> 20} MiB"))
        return value


def entries(
    source: str | Path | Dataset, columns: list[str] | None = None, empty: bool = False
) -> Iterator[Entry | Rejected]:
    """The entries of a source: the media of its records, or their texts where they have no media; with `columns` the
    parts of these columns, and nothing else. With `empty` a record of a table that has none of these is rejected,
    else passed by.

    Raises PlaitError where the source is missing or holds nothing to be read, or has none of the columns.
    """
    if isinstance(source, Dataset):
        yield from _of_dataset(source, columns, empty)
        return
    place = location(source)
    if isinstance(place, Path):
        if (place / "manifest.json").is_file() and (place / "rejects.jsonl").is_file():
            yield from _of_dataset(Dataset.open(place), columns, empty)
            return
        if (kind := kind_of_suffix(place.suffix)) and place.is_file():
            path = place.resolve()
            yield Entry(str(path), str(place), kind, Media(kind, str(place), path))
            return
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        tree = scan(place, Path(scratch) / "unpacked", Path(scratch))
        source_plan = plan(tree)
        _known(columns, source_plan.columns, str(source))
        shown = str(place.parent if tree.single and isinstance(place, Path) else place)
        root = str(Path(shown).resolve()) if isinstance(place, Path) else shown
        yield from tree.refused
        for item in source_plan.read():
            if isinstance(item, Rejected):
                yield item
                continue
            here = _of_record(item, f"{root.rstrip('/')}/", shown, source_plan.columns, columns)
            yield from _or_empty(here, f"{shown.rstrip('/')}/{item.place}", item, columns if empty else None)


def columns_of(source: str | Path) -> dict[str, str]:
    """Column -> kind of what a source holds, as `entries` reads it. Raises PlaitError where it is missing."""
    place = location(source)
    if isinstance(place, Path):
        if (place / "manifest.json").is_file() and (place / "rejects.jsonl").is_file():
            return Dataset.open(place).columns
        if (kind := kind_of_suffix(place.suffix)) and place.is_file():
            return {kind: kind}
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        return plan(scan(place, Path(scratch) / "unpacked", Path(scratch))).columns


def _known(columns: list[str] | None, there: dict[str, str], source: str) -> None:
    for column in columns or []:
        if column not in there:
            near = get_close_matches(column, there, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise PlaitError(f"{source} has no column '{column}'.{hint} Its columns are {', '.join(there) or 'none'}.")


def _or_empty(
    here: Iterator[Entry], place: str, item: RawRecord, columns: list[str] | None
) -> Iterator[Entry | Rejected]:
    """The entries of a record; where it has none in `columns`, that."""
    found = list(here)
    yield from found
    if columns and not found:
        id = item.id if item.id != item.place else None
        yield Rejected(place, None, Reason(RejectKind.EMPTY, f"nothing is in {' or '.join(columns)}"), id)


def _of_dataset(dataset: Dataset, columns: list[str] | None, empty: bool) -> Iterator[Entry | Rejected]:
    _known(columns, dataset.columns, str(dataset.path))
    path = dataset.path.resolve() if isinstance(dataset.path, Path) else dataset.path
    for record in dataset.iterate():
        item = RawRecord(record.id, record.source or record.id, dict(record.parts), record.split)  # type: ignore[arg-type]
        here = _of_record(item, f"{path}#", dataset.manifest.source, dataset.columns, columns)
        yield from _or_empty(here, item.place, item, columns if empty else None)


def _of_record(
    item: RawRecord, root: str, shown: str, kinds: dict[str, str], columns: list[str] | None
) -> Iterator[Entry]:
    """`root` begins the ids, `shown` is the source as people know it."""
    texts = {name: value for name, value in item.parts.items() if isinstance(value, str) and kinds[name] == "text"}
    columns_read = [name for name in item.parts if columns is None or name in columns]
    if columns is None:
        columns_read = [name for name in columns_read if kinds[name] != "text"] or columns_read
    for name in columns_read:
        value = item.parts[name]
        place = value.name if isinstance(value, Media) else item.place
        tail = f"#{name}" if len(columns_read) > 1 else ""
        yield Entry(
            f"{root}{item.id}{tail}", f"{shown.rstrip('/')}/{place}", kinds[name], value, texts, item.split,
            item.id if item.id != item.place else None,
        )  # fmt: skip
