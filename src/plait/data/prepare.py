"""Files -> a dataset: every record checked, split, counted; what cannot be used is listed. The bytes that come out do
not depend on the number of processes."""

from __future__ import annotations

import hashlib
import heapq
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from plait.data.dataset import VERSION, Lengths, Manifest, Shard
from plait.data.files import (
    ARCHIVE_SUFFIXES,
    TABLE_SUFFIXES,
    Found,
    Item,
    Media,
    Plan,
    Rejected,
    Tree,
    rejected,
    scan,
    suffix_of,
)
from plait.data.media import LIMITS, Checker, MediaError
from plait.data.preview import Example, report
from plait.data.readers import plan
from plait.data.record import SPLITS, text_fault
from plait.runtime import PlaitError, key_of, publish_folder, read_json, sealed, sha256_file, threads, write_json

_GROUP_BYTES, _GROUP_ROWS = 4 << 20, 1024
_SHARD_BYTES = 256 << 20
_FLIGHT_BYTES, _FLIGHT = 64 << 20, 512
_VAL_MOST = 5000
_CLASSES_MOST = 256


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    column_map: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
    pattern: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Make a dataset in the folder `out` of what lies at `source`; returns its manifest.

    `column_map` says what a table's columns are, `{"image": "photo", "text": "caption:text", "ignore": "a,b"}` (see
    plait.data.tables). `labels` names integer classes: `{"label": ["cat", "dog"]}`. `pattern` is a regular expression
    whose named groups become text columns of media files. `workers` are the processes that decode media (0: none, in
    this process); `progress(done, total)` is called now and then, in records.
    Raises PlaitError where nothing can be read, nothing can be written or an option does not fit.
    """
    source, out = Path(source), Path(out)
    _check_out(source, out)
    with publish_folder(out) as folder:
        scratch = folder / ".unpacked"
        tree = scan(source, scratch, out)
        found = plan(tree, column_map, labels, pattern)
        manifest = _write(tree, found, folder, source, seed, workers, progress)
        shutil.rmtree(scratch, ignore_errors=True)
        write_json(folder / "manifest.json", sealed(manifest.model_dump()))
    return manifest


def _check_out(source: Path, out: Path) -> None:
    if not source.exists():
        raise PlaitError(f"{source} does not exist. Name a folder, a table, a text file or an archive.")
    if out.resolve() == source.resolve() or source.resolve().is_relative_to(out.resolve()):
        raise PlaitError(f"The dataset would overwrite its source {source}. Choose another folder with -o.")
    if out.exists() and not out.is_dir():
        raise PlaitError(f"{out} is a file. Choose another folder with -o.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "manifest.json").is_file() or not (out / "rejects.jsonl").is_file():
        raise PlaitError(f"{out} holds other files and is not a dataset. Choose another folder with -o.")
    made = read_json(out / "manifest.json")
    before = made.get("source") if isinstance(made, dict) else None
    if before != str(source.resolve()):
        raise PlaitError(f"{out} holds a dataset made from {before}. Choose another folder with -o, or delete it.")


# --- checking ---------------------------------------------------------------------------------------------------


@dataclass
class _Checked:
    """A record with its bytes, ready to be written."""

    found: Found
    parts: dict[str, str | bytes]
    content: bytes  # digest of all parts
    group: bytes  # digest of the media, or of the text where there are none
    shown: dict[str, dict[str, Any]]  # what decoding a medium showed


def _fetch(medium: Media) -> bytes:
    if medium.make is not None:
        return medium.make()
    if medium.data is not None:
        data = medium.data
    else:
        assert medium.path is not None
        try:
            with medium.path.open("rb") as file:
                data = file.read(LIMITS.file_bytes + 1)
        except OSError as error:
            raise MediaError(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise MediaError("the file is empty")
    if len(data) > LIMITS.file_bytes:
        raise MediaError(f"larger than {LIMITS.file_bytes >> 20} MiB")
    return data


def _digest(parts: dict[str, str | bytes]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        body = value.encode() if isinstance(value, str) else value
        digest.update(f"{name}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.digest()


def _size(found: Found, parts: dict[str, str | bytes]) -> dict[str, dict[str, Any]]:
    """Width and height of the pictures that Plait itself encoded as PNG."""
    return {
        name: {"width": int.from_bytes(data[16:20], "big"), "height": int.from_bytes(data[20:24], "big")}
        for name, data in parts.items()
        if isinstance(data, bytes) and (medium := found.parts[name]) and isinstance(medium, Media) and medium.make
    }


def _checked(
    found: Found, parts: dict[str, str | bytes], check: Callable[[str, bytes], dict[str, Any]]
) -> _Checked | Rejected:
    """Decode the media of one record; runs in a thread, the decoding in a process."""
    shown = _size(found, parts)
    for name, medium in found.parts.items():
        if isinstance(medium, Media) and medium.make is None:
            try:
                data = parts[name]
                assert isinstance(data, bytes)
                shown[name] = check(medium.kind, data)
            except MediaError as error:
                return _reject(found, medium, str(error))
    media: dict[str, str | bytes] = {name: data for name, data in parts.items() if isinstance(data, bytes)}
    return _Checked(found, parts, _digest(parts), _digest(media or parts), shown)


def _reject(found: Found, medium: Media, reason: str) -> Rejected:
    if medium.name == found.place or medium.data is not None:
        return rejected(found.place, reason)
    return Rejected(medium.name, None, reason + (f" (of {found.place})" if ":" in found.place else ""))


def _load(item: Found) -> dict[str, str | bytes] | Rejected:
    """The record's parts as text and bytes."""
    parts: dict[str, str | bytes] = {}
    for name, value in item.parts.items():
        if isinstance(value, str):
            if fault := text_fault(value):
                return rejected(item.place, f"column '{name}': {fault}")
            parts[name] = value
        else:
            try:
                parts[name] = _fetch(value)
            except MediaError as error:
                return _reject(item, value, str(error))
    if fault := text_fault(item.id):
        return rejected(item.place, f"id: {fault}")
    return parts if parts else rejected(item.place, "the record is empty")


def _check_all(items: Iterator[Item], workers: int | None, total: int) -> Iterator[_Checked | Rejected]:
    """The items in order, their media decoded in other processes, a bounded number of bytes under way."""
    wanted = workers if workers is not None else min(threads(), 8, 1 + total // 400)
    if wanted == 0:
        from plait.data.media import check
    checker = Checker() if wanted else None
    pool = ThreadPoolExecutor(max(wanted, 1))
    waiting: deque[tuple[Future[_Checked | Rejected] | _Checked | Rejected, int]] = deque()
    flight = 0

    def take() -> _Checked | Rejected:
        nonlocal flight
        first, size = waiting.popleft()
        flight -= size
        return first.result() if isinstance(first, Future) else first

    try:
        for item in items:
            parts = item if isinstance(item, Rejected) else _load(item)
            if isinstance(parts, Rejected):
                waiting.append((parts, 0))
            else:
                assert isinstance(item, Found)
                size = sum(len(value) for value in parts.values())
                busy = any(isinstance(value, Media) and value.make is None for value in item.parts.values())
                flight += size
                if busy and checker is not None:
                    waiting.append((pool.submit(_checked, item, parts, checker), size))
                else:
                    waiting.append((_checked(item, parts, check if wanted == 0 else _never), size))
            while waiting and (flight > _FLIGHT_BYTES or len(waiting) > _FLIGHT):
                yield take()
        while waiting:
            yield take()
    finally:
        pool.shutdown(cancel_futures=True)
        if checker is not None:
            checker.close()


def _never(kind: str, data: bytes) -> dict[str, Any]:
    raise AssertionError("a record without media files needs no check")


# --- splitting and writing --------------------------------------------------------------------------------------


def _splitter(given: Counter[str | None], seed: int) -> tuple[Callable[[Found, bytes], str], str]:
    """The rule that gives a record its split, and the rule in words."""

    def place(group: bytes) -> float:
        return key_of(f"{seed}:{group.hex()}") / 2**63

    named = {split for split, count in given.items() if split and count}
    if not named:

        def by_hash(found: Found, group: bytes) -> str:
            if found.split:
                return found.split
            at = place(group)
            return "train" if at < 0.8 else "val" if at < 0.9 else "test"

        return by_hash, "80/10/10 by a hash of the content; equal media share a split"
    train = given["train"] + given[None]
    # Three standard deviations below the most, since a hash decides.
    share = 0.0 if "val" in named or not train else min(0.1, (_VAL_MOST - 3 * _VAL_MOST**0.5) / train)

    def by_name(found: Found, group: bytes) -> str:
        split = found.split or "train"
        return "val" if split == "train" and place(group) < share else split

    words = "as the source says"
    return by_name, words + (f", and {share:.1%} of train becomes val by a hash of the content" if share else "")


@dataclass
class _Column:
    """What is counted about a column while records go by."""

    kind: str
    records: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = 0.0
    texts: Counter[str] = field(default_factory=Counter)
    distinct: set[int] = field(default_factory=set)
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, value: str | bytes, shown: dict[str, Any] | None) -> None:
        if isinstance(value, str):
            length = float(len(value.encode()))
            self.distinct.add(hash(value))
            if len(self.texts) <= _CLASSES_MOST and length <= 200:
                self.texts[value] += 1
        elif shown and "seconds" in shown:
            length = shown["seconds"]
            self.sizes[f"{shown['rate']} Hz"] += 1
        else:
            shown = shown or {"width": 0, "height": 0}
            length = float(max(shown["width"], shown["height"]))
            self.sizes[f"{shown['width']}x{shown['height']}"] += 1
        self.records += 1
        self.total += length
        self.low, self.high = min(self.low, length), max(self.high, length)

    def lengths(self) -> Lengths:
        few = self.kind == "text" and len(self.distinct) <= _CLASSES_MOST and self.total <= 200 * self.records
        few = few and self.texts.total() == self.records and len(self.texts) * 2 <= max(self.records, 4)
        return Lengths(
            unit={"text": "bytes", "image": "pixels", "audio": "seconds"}[self.kind],
            records=self.records,
            min=round(self.low, 4),
            mean=round(self.total / self.records, 4),
            max=round(self.high, 4),
            distinct=len(self.distinct) if self.kind == "text" else None,
            classes=dict(sorted(self.texts.items())) if few else None,
            sizes=dict(sorted(self.sizes.most_common(10))) if self.kind != "text" else None,
        )


class _Shards:
    """Writes the shards of one split, a row group at a time."""

    def __init__(self, folder: Path, split: str, columns: dict[str, str]) -> None:
        self.folder, self.split, self.columns = folder, split, columns
        types = {name: pa.large_string() if kind == "text" else pa.large_binary() for name, kind in columns.items()}
        self.schema = pa.schema({"id": pa.string(), "source": pa.string(), **types})
        self.done: list[Shard] = []
        self.rows: list[dict[str, Any]] = []
        self.bytes = self.shard_rows = self.shard_bytes = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, id_: str, source: str, parts: dict[str, str | bytes]) -> None:
        self.rows.append({"id": id_, "source": source, **parts})
        self.bytes += sum(len(value) for value in parts.values())
        if self.bytes >= _GROUP_BYTES or len(self.rows) >= _GROUP_ROWS:
            self.flush()

    def name(self) -> str:
        return f"{self.split}-{len(self.done):05d}.parquet"

    def flush(self) -> None:
        if not self.rows:
            return
        texts = ["id", "source", *(name for name, kind in self.columns.items() if kind == "text")]
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.folder / self.name(),
                self.schema,
                # Encoded media do not get smaller.
                compression={name: "zstd" if name in texts else "none" for name in self.schema.names},
                # A picture with five captions stands in five rows, and once in its row group's dictionary.
                use_dictionary=[name for name in self.schema.names if name != "id"],
                dictionary_pagesize_limit=4 * _GROUP_BYTES,
                write_statistics=False,
            )
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema), row_group_size=len(self.rows))
        self.shard_rows += len(self.rows)
        self.shard_bytes += self.bytes
        self.rows, self.bytes = [], 0
        if self.shard_bytes >= _SHARD_BYTES:
            self.close()

    def close(self) -> None:
        self.flush()
        if self.writer is None:
            return
        self.writer.close()
        path = self.folder / self.name()
        self.done.append(
            Shard(
                file=path.name,
                split=self.split,
                rows=self.shard_rows,
                bytes=path.stat().st_size,
                sha256=sha256_file(path),
            )
        )
        self.writer, self.shard_rows, self.shard_bytes = None, 0, 0


def _unused(tree: Tree, columns: dict[str, str]) -> Iterator[Rejected]:
    for name in tree.files:
        if name in tree.used:
            continue
        suffix = suffix_of(name)
        if tree.kind(name) is not None:
            reason = "no table names it"
        elif suffix == ".txt":
            reason = "a text that belongs to no medium of the same name"
        elif suffix in ARCHIVE_SUFFIXES:
            reason = "an archive inside an archive is not opened"
        elif suffix in TABLE_SUFFIXES:
            reason = "not read: it is no table of records, or names none of the media here"
        else:
            reason = "not a kind of file that is read"
        yield Rejected(name, None, reason)


def _write(
    tree: Tree,
    found: Plan,
    folder: Path,
    source: Path,
    seed: int,
    workers: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> Manifest:
    total = found.given.total()
    split_of, rule = _splitter(found.given, seed)
    if found.tail:
        split_of, rule = (lambda item, group: item.split or "train"), "the last tenth of the text is val"
    shards = {split: _Shards(folder, split, found.columns) for split in SPLITS}
    columns = {name: _Column(kind) for name, kind in found.columns.items()}
    ids: set[str] = set()
    contents: set[bytes] = set()
    groups: dict[bytes, int] = {}  # records by split, 20 bits each
    examples: list[tuple[int, str, Example]] = []
    duplicates = refusals = done = 0
    reasons: Counter[str] = Counter()
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as file:

        def reject(item: Rejected) -> None:
            nonlocal refusals
            refusals += 1
            reasons[item.reason.split(":")[0][:80]] += 1
            file.write(json.dumps({"file": item.file, "line": item.line, "reason": item.reason}) + "\n")

        for refused in tree.refused:
            reject(refused)
        for item in _check_all(found.read(), workers, total):
            done += 1
            if progress is not None and done % 64 == 0:
                progress(done, max(total, done))
            if isinstance(item, _Checked) and item.found.id in ids:
                item = rejected(
                    item.found.place, f"the id '{item.found.id}' stands there twice; the first record is kept"
                )
            if isinstance(item, Rejected):
                reject(item)
                continue
            record = item.found
            ids.add(record.id)
            if item.content in contents:
                duplicates += 1
            contents.add(item.content)
            group = hashlib.sha256(record.group.encode()).digest() if record.group else item.group
            split = split_of(record, group)
            groups[item.group] = groups.get(item.group, 0) + (1 << 20 * SPLITS.index(split))
            for name, value in item.parts.items():
                columns[name].add(value, item.shown.get(name))
            shards[split].add(record.id, record.place, item.parts)
            rank = -key_of(f"{seed}:{record.id}")
            if len(examples) < 12 or rank > examples[0][0]:
                example = Example(record.id, split, item.parts)
                (heapq.heappush if len(examples) < 12 else heapq.heapreplace)(examples, (rank, record.id, example))
        for unused in _unused(tree, found.columns):
            reject(unused)
    for writer in shards.values():
        writer.close()
    if not ids:
        common = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise PlaitError(f"{source}: no record can be used. {common or 'Nothing was found'}.")
    counts = {split: sum(shard.rows for shard in shards[split].done) for split in SPLITS}
    statistics = {name: column.lengths() for name, column in columns.items() if column.records}
    overlap = _overlap(groups)
    manifest = Manifest(
        version=VERSION,
        source=str(source.resolve()),
        seed=seed,
        columns={name: column.kind for name, column in columns.items() if column.records},
        counts=counts,
        rejected=refusals,
        duplicates=duplicates,
        overlap=overlap,
        shards=[shard for split in SPLITS for shard in shards[split].done],
        statistics=statistics,
        notes=[*found.notes, f"split: {rule}"],
        warnings=_warnings(counts, statistics, overlap, refusals, duplicates),
    )
    ranked = [example for _, _, example in sorted(examples, key=lambda entry: -entry[0])]
    (folder / "report.html").write_text(report(manifest, ranked, reasons, source.name), encoding="utf-8")
    if progress is not None:
        progress(done, done)
    return manifest


def _overlap(groups: dict[bytes, int]) -> dict[str, int]:
    """Records of one split whose media (or text) stand in another too, by "later/earlier" split."""
    mask = (1 << 20) - 1
    overlap: Counter[str] = Counter()
    for packed in groups.values():
        here = [packed >> 20 * n & mask for n in range(len(SPLITS))]
        for first, second in combinations(range(len(SPLITS)), 2):
            if here[first] and here[second]:
                overlap[f"{SPLITS[second]}/{SPLITS[first]}"] += here[second]
    return dict(sorted(overlap.items()))


def _warnings(
    counts: dict[str, int], statistics: dict[str, Lengths], overlap: dict[str, int], rejected: int, duplicates: int
) -> list[str]:
    warnings = [f"No record for {split}." for split in SPLITS if not counts[split]]
    for name, lengths in statistics.items():
        alone = [label for label, count in (lengths.classes or {}).items() if count == 1]
        if alone:
            some = ", ".join(f"'{label}'" for label in alone[:5])
            warnings.append(f"Column '{name}': {len(alone)} classes have one example only ({some}).")
    for pair, count in overlap.items():
        later, earlier = pair.split("/")
        warnings.append(f"{count} records of {later} hold the same media or text as records of {earlier}.")
    if duplicates:
        warnings.append(f"{duplicates} records repeat another one exactly.")
    if rejected:
        warnings.append(f"{rejected} files or rows were not used: see rejects.jsonl.")
    return warnings
