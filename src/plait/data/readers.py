"""What people have -> records not yet checked: folders, archives, tables, text files, idx files.

`Tree` lists the files; `plan` decides how they are read; each reader yields `Found` records and `Rejected` lines. The
bytes of a medium are fetched later, when the record is prepared.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from plait.data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, LIMITS, encode_png, sniff
from plait.data.record import split_name, split_of_file
from plait.runtime import PlaitError, sha256_file

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MEMBER_BYTES = 4 << 30  # of one file in an archive
TEXT_BYTES = 8192  # of one record of a long text


@dataclass
class Media:
    """A medium that a record names: a file, or bytes at hand, or a function that makes them (already valid)."""

    kind: str
    name: str
    path: Path | None = None
    data: bytes | None = None
    make: Callable[[], bytes] | None = None


@dataclass
class Found:
    """A record as it was found. `split` is what the source says, or None; `place` is file or file:line."""

    id: str
    place: str
    parts: dict[str, str | Media]
    split: str | None = None
    group: str | None = None


@dataclass
class Rejected:
    """Something that cannot be used: a file (and line) and the reason."""

    file: str
    line: int | None
    reason: str


Item = Found | Rejected


def rejected(place: str, reason: str) -> Rejected:
    """The rejection of a record by its place, `file` or `file:line`."""
    file, _, line = place.rpartition(":")
    return Rejected(file, int(line), reason) if file and line.isdigit() else Rejected(place, None, reason)


@dataclass
class Plan:
    """How a source is read: its columns, the records of each given split (None: not given), and the reader."""

    columns: dict[str, str]
    given: Counter[str | None]
    read: Callable[[], Iterator[Item]]
    notes: list[str]
    tail: bool = False  # one text file: the last tenth is for validation


def suffix_of(name: str) -> str:
    """The ending that tells what a file is: lower case, `.gz` taken off, `.tar.gz` kept."""
    name = name.lower()
    for ending in ARCHIVE_SUFFIXES:
        if name.endswith(ending):
            return ending
    return os.path.splitext(name.removesuffix(".gz"))[1]  # noqa: PTH122 - names, also of archive members


def open_text(path: Path, name: str) -> IO[str]:
    """A text file, gunzipped where its name says so; UTF-8, line ends kept."""
    if name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


# --- the files of a source --------------------------------------------------------------------------------------


@dataclass
class Tree:
    """The files of a source by relative path, archives opened, and what was refused on the way."""

    root: Path
    files: dict[str, Path] = field(default_factory=dict)
    refused: list[Rejected] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    archives: list[str] = field(default_factory=list)
    single: str | None = None
    _by_name: dict[str, str | None] | None = None

    def kind(self, name: str) -> str | None:
        """ "image" or "audio" by the file's ending, else by its first bytes; None for anything else."""
        suffix = suffix_of(name)
        if suffix in IMAGE_SUFFIXES or suffix in AUDIO_SUFFIXES:
            return "image" if suffix in IMAGE_SUFFIXES else "audio"
        if suffix in (*TABLE_SUFFIXES, *ARCHIVE_SUFFIXES, ".txt", ".md", ".py", ".html") or _idx_name(name):
            return None
        try:
            with self.files[name].open("rb") as file:
                found = sniff(file.read(64))
        except OSError:
            return None
        return found[0] if found else None

    def resolve(self, table: str, value: str) -> tuple[str, Path] | str:
        """The file that a table's path names, or the reason why there is none. Paths are relative to the table."""
        value = value.replace("\\", "/")
        if "\0" in value:
            return "the path holds a NUL character"
        folder = table.rpartition("/")[0]
        if os.path.isabs(value):  # noqa: PTH117
            name = os.path.relpath(value, self.root)
        else:
            name = os.path.normpath(f"{folder}/{value}" if folder else value)
        if name == ".." or name.startswith("../"):
            return f"the path '{value}' leads out of the source"
        if name in self.files:
            return name, self.files[name]
        if self.single is not None and (found := self._beside(name)):
            return found
        for archive in self.archives:
            inside = f"{archive}/{value}"
            if inside in self.files:
                return inside, self.files[inside]
        if self._by_name is None:
            self._by_name = {}
            for path in self.files:
                if any(path.startswith(archive + "/") for archive in self.archives):
                    last = path.rpartition("/")[2]
                    self._by_name[last] = None if last in self._by_name else path
        inside_name = self._by_name.get(value)
        if inside_name is not None:
            return inside_name, self.files[inside_name]
        return f"the file '{value}' does not exist"

    def _beside(self, name: str) -> tuple[str, Path] | None:
        path = self.root / name
        try:
            real = path.resolve()
            if real.is_relative_to(self.root.resolve()) and real.is_file():
                self.files[name] = real
                return name, real
        except (OSError, ValueError):
            pass
        return None


def scan(source: Path, scratch: Path, skip: Path) -> Tree:
    """List a source's files in a fixed order; archives are unpacked under `scratch`, each member under a number.

    `skip` is the dataset's own folder. Raises PlaitError where the source does not exist or holds nothing.
    """
    if not source.exists():
        raise PlaitError(f"{source} does not exist. Name a folder, a table, a text file or an archive.")
    if source.is_file():
        tree = Tree(source.parent, single=source.name)
        if suffix_of(source.name) in ARCHIVE_SUFFIXES:
            tree.single = None
            _unpack(tree, source, "", scratch)
        else:
            tree.files[source.name] = source
    else:
        tree = Tree(source)
        _walk(tree, source, scratch, skip)
    if not tree.files and not tree.refused:
        raise PlaitError(f"{source} is empty. Put files in it, or name another folder.")
    return tree


def _walk(tree: Tree, source: Path, scratch: Path, skip: Path) -> None:
    root, skip = source.resolve(), skip.resolve()

    def failed(error: OSError) -> None:
        name = os.path.relpath(str(error.filename), source)
        tree.refused.append(Rejected(name, None, f"cannot be opened: {error.strerror}"))

    for folder, folders, names in os.walk(source, onerror=failed):
        here = Path(folder)
        keep = []
        for name in sorted(folders):
            path, shown = here / name, _shown(here / name, source)
            if path.is_symlink():
                tree.refused.append(Rejected(shown, None, "a linked folder is not followed"))
            elif path.resolve() == skip:
                continue
            elif name.startswith("."):
                tree.refused.append(Rejected(shown, None, "a hidden folder"))
            elif (path / "manifest.json").is_file() and (path / "rejects.jsonl").is_file():
                tree.refused.append(Rejected(shown, None, "a dataset that Plait prepared"))
            else:
                keep.append(name)
        folders[:] = keep
        for name in sorted(names):
            path, shown = here / name, _shown(here / name, source)
            reason = None
            try:
                status = path.stat()
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    reason = "a link that leads out of the source"
                elif not stat.S_ISREG(status.st_mode):
                    reason = "not a regular file"
                elif name.startswith("."):
                    reason = "a hidden file"
                elif status.st_size == 0:
                    reason = "the file is empty"
            except OSError as error:
                reason = f"cannot be opened: {error.strerror}"
            if reason is None and not _valid(name):
                reason = "its name is not valid Unicode"
            if reason:
                tree.refused.append(Rejected(shown, None, reason))
            elif suffix_of(name) in ARCHIVE_SUFFIXES:
                _unpack(tree, path, shown, scratch)
            else:
                tree.files[shown] = path


def _valid(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix().encode("utf-8", "backslashreplace").decode()


def _unpack(tree: Tree, path: Path, prefix: str, scratch: Path) -> None:
    """Add an archive's members to the tree as `prefix/member`; unsafe, empty or huge ones are refused."""
    tree.archives.append(prefix or ".")
    lead = f"{prefix}/" if prefix else ""
    opened: Callable[[], Any]
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        linked = stat.S_ISLNK(info.external_attr >> 16)
                        opened = partial(archive.open, info)
                        _member(tree, lead, info.filename, info.file_size, linked, scratch, opened)
        else:
            with tarfile.open(path, "r|*") as packed:
                for member in packed:
                    if not member.isdir():
                        opened = partial(packed.extractfile, member)
                        _member(tree, lead, member.name, member.size, not member.isreg(), scratch, opened)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise PlaitError(f"No room to unpack {path} under {scratch.parent}. Free space there.") from error
        tree.refused.append(Rejected(prefix or path.name, None, f"damaged archive: {error}"))


def _member(
    tree: Tree, lead: str, name: str, size: int, linked: bool, scratch: Path, opened: Callable[[], Any]
) -> None:
    shown = lead + name.removeprefix("./")
    media = suffix_of(name) in IMAGE_SUFFIXES or suffix_of(name) in AUDIO_SUFFIXES
    limit = LIMITS.file_bytes if media else MEMBER_BYTES
    reason = None
    if not _valid(name):
        shown = shown.encode("utf-8", "backslashreplace").decode()
        reason = "its name is not valid Unicode"
    elif name.startswith("/") or "\\" in name or ".." in name.split("/"):
        reason = "the member's path leads out of the archive"
    elif linked:
        reason = "a link or a device in an archive"
    elif name.rpartition("/")[2].startswith(".") or "__MACOSX/" in name:
        reason = "a hidden file"
    elif size == 0:
        reason = "the file is empty"
    elif size > limit:
        reason = f"larger than {limit >> 20} MiB"
    elif shown in tree.files:
        reason = "the archive holds this name twice"
    elif size > shutil.disk_usage(scratch.parent).free * 0.9:
        raise PlaitError(f"No room to unpack {shown} ({size} bytes) under {scratch.parent}. Free space there.")
    if reason is None:
        scratch.mkdir(exist_ok=True)
        target = scratch / str(len(tree.files))
        try:
            with opened() as member, target.open("wb") as file:
                left = limit
                while left > 0 and (block := member.read(min(1 << 20, left))):
                    file.write(block)
                    left -= len(block)
            tree.files[shown] = target
            return
        except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            reason = f"cannot be unpacked: {error}"
        except Exception as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            reason = f"cannot be unpacked: {error}"
    tree.refused.append(Rejected(shown, None, reason))


# --- idx files, as MNIST ships them -----------------------------------------------------------------------------


def _idx_name(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.*?)-?(images|labels)[-.]idx[13]-ubyte(\.gz)?", name.rpartition("/")[2])


def _read_idx(path: Path, name: str) -> np.ndarray:
    """The array in an idx file of bytes: (N,) labels or (N, H, W) pictures. Raises ValueError."""
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] not in (1, 3):
            raise ValueError("not an idx file of bytes")
        shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
        size = int(np.prod([int(n) for n in shape], dtype=object))
        if size > 4 << 30 or (len(shape) == 3 and shape[1] * shape[2] > LIMITS.pixels):
            raise ValueError(f"the header asks for {size} bytes")
        parts = []  # block by block: the header may promise more than there is
        while size > 0 and (block := file.read(min(size, 1 << 24))):
            parts.append(block)
            size -= len(block)
    if size or not all(shape):
        raise ValueError(f"cut short: {size} bytes are missing" if size else "no pictures in it")
    return np.frombuffer(b"".join(parts), np.uint8).reshape(shape)


def plan_idx(tree: Tree, labels: dict[str, list[str]]) -> Plan | None:
    """Pairs of idx files -> columns `image` and `label`; the split is what the file's name begins with."""
    pairs: dict[str, dict[str, str]] = {}
    for name in tree.files:
        if match := _idx_name(name):
            pairs.setdefault(name[: len(name) - len(name.rpartition("/")[2])] + match[1], {})[match[2]] = name
    pairs = {stem: pair for stem, pair in sorted(pairs.items()) if "images" in pair}
    if not pairs:
        return None
    names = labels.get("label")

    def read_pair(stem: str) -> tuple[np.ndarray, np.ndarray | None] | Rejected:
        image_file, label_file = pairs[stem]["images"], pairs[stem].get("labels")
        tree.used.add(image_file)
        at = image_file
        try:
            images = _read_idx(tree.files[at], at)
            if images.ndim != 3:
                raise ValueError("an idx file of pictures has three dimensions")
            if label_file is None:
                return images, None
            tree.used.add(at := label_file)
            values = _read_idx(tree.files[at], at)
            if len(values) != len(images):
                raise ValueError(f"{len(values)} labels for {len(images)} pictures")
            return images, values
        except (OSError, EOFError, ValueError) as error:
            return Rejected(at, None, f"damaged idx file: {error}")

    def read() -> Iterator[Item]:
        for stem, pair in pairs.items():
            read = read_pair(stem)
            if isinstance(read, Rejected):
                yield read
                continue
            images, values = read
            split = split_of_file(stem.rpartition("/")[2])
            for n, image in enumerate(images):
                parts: dict[str, str | Media] = {}
                place = f"{pair['images']}:{n}"
                parts["image"] = Media("image", place, make=partial(encode_png, image))
                if values is not None:
                    value = int(values[n])
                    if names is not None and value >= len(names):
                        yield Rejected(pair["labels"], n, f"label {value}, but {len(names)} names were given")
                        continue
                    parts["label"] = names[value] if names is not None else str(value)
                yield Found(f"{stem}:{n}", place, parts, split)

    given: Counter[str | None] = Counter()
    notes = []
    for stem, pair in pairs.items():
        split = split_of_file(stem.rpartition("/")[2])
        try:
            with (
                gzip.open(tree.files[pair["images"]])
                if pair["images"].endswith(".gz")
                else tree.files[pair["images"]].open("rb") as file
            ):
                given[split] += int.from_bytes(file.read(8)[4:], "big")
        except (OSError, EOFError):
            continue
        notes.append(f"{pair['images']}: pictures -> image" + (", labels -> label" if "labels" in pair else ""))
    columns = {"image": "image"} | ({"label": "text"} if any("labels" in p for p in pairs.values()) else {})
    return Plan(columns, given, read, notes)


# --- plain text -------------------------------------------------------------------------------------------------


def plan_text(tree: Tree) -> Plan | None:
    """Text files -> column `text`: one record a file; a long text in order in pieces of some 8 kB at line ends."""
    names = [name for name in tree.files if suffix_of(name) == ".txt"]
    if not names:
        return None
    single = len(names) == 1
    classes = {name: next((part for part in _folders(name)[::-1] if not split_name(part)), None) for name in names}
    labelled = len({label for label in classes.values() if label}) > 1
    sizes: dict[str, int] = {}  # characters
    broken: dict[str, str] = {}
    given: Counter[str | None] = Counter()
    for name in names:
        try:
            with open_text(tree.files[name], name) as file:
                sizes[name] = sum(map(len, iter(partial(file.read, 1 << 20), "")))
            given[None if single else _folder_split(name)] += 1 + sizes[name] // TEXT_BYTES
        except UnicodeDecodeError as error:
            broken[name] = f"not UTF-8: byte {error.object[error.start]:#04x}. Save it as UTF-8"
        except (OSError, EOFError) as error:
            broken[name] = f"cannot be read: {error}"

    def read() -> Iterator[Item]:
        for name in names:
            tree.used.add(name)
            if name in broken:
                yield Rejected(name, None, broken[name])
                continue
            border = int(0.9 * sizes[name]) if single else -1  # the customary 90/10 split, to the character
            split = "train" if single and border > 0 else _folder_split(name)
            label = classes[name]
            given_label: dict[str, str | Media] = {"label": label} if labelled and label else {}
            group = None if single else sha256_file(tree.files[name])  # the pieces of a text stay together
            for n, (start, text) in enumerate(_pieces(tree.files[name], name, border)):
                if single and start >= border > 0:
                    split = "val"
                yield Found(f"{name}:{n}", f"{name}:{n}", {"text": text, **given_label}, split, group)

    note = f"{len(names)} text files -> text" if not single else f"{names[0]} -> text, the last tenth for validation"
    columns = {"text": "text", "label": "text"} if labelled else {"text": "text"}
    return Plan(columns, given, read, [note] + ["folder names -> label"] * labelled, tail=single)


def _pieces(path: Path, name: str, border: int) -> Iterator[tuple[int, str]]:
    """(first character's position, text) of pieces of at most TEXT_BYTES characters; one begins at `border`."""
    with open_text(path, name) as file:
        at, kept = 0, ""
        for block in iter(partial(file.read, 1 << 20), ""):
            kept += block
            start = 0
            while len(kept) - start > TEXT_BYTES:
                stop = kept.rfind("\n", start + TEXT_BYTES // 2, start + TEXT_BYTES) + 1 or start + TEXT_BYTES
                if at < border < at + stop - start:
                    stop = start + border - at
                yield at, kept[start:stop]
                at, start = at + stop - start, stop
            kept = kept[start:]
        if at < border < at + len(kept):
            yield at, kept[: border - at]
            kept, at = kept[border - at :], border
        if kept:
            yield at, kept


# --- media in folders -------------------------------------------------------------------------------------------


def _folders(name: str) -> list[str]:
    """The folders of a path; an archive counts as a folder of its own name without the ending."""
    parts = name.split("/")[:-1]
    return [part.removesuffix(suffix_of(part)) if suffix_of(part) in ARCHIVE_SUFFIXES else part for part in parts]


def _folder_split(name: str) -> str | None:
    return next((split for part in _folders(name) if (split := split_name(part))), None)


def plan_media(tree: Tree, pattern: re.Pattern[str] | None) -> Plan | None:
    """Media files -> records: one for each stem, with its same-stem `.txt` as `text`, its folder as `label`, and
    the named groups of `pattern` as further texts."""
    kinds = {name: kind for name in tree.files if (kind := tree.kind(name))}
    if not kinds:
        return None
    stems: dict[str, dict[str, str]] = {}  # stem -> kind -> file
    for name, kind in kinds.items():
        stem = name.removesuffix(_ending(name))
        key = stem if kind not in stems.get(stem, {}) else name
        stems.setdefault(key, {})[kind] = name
    groups = list(pattern.groupindex) if pattern else []
    classes = {}
    for stem, files in stems.items():
        first = next(iter(files.values()))
        folders = [part for part in _folders(first) if not split_name(part)]
        classes[stem] = folders[-1] if folders else None
    labelled = "label" not in groups and len({c for c in classes.values() if c}) > 1
    columns: dict[str, str] = {}
    for kind in ("image", "audio"):
        if kind in kinds.values():
            columns[kind] = kind
    if any(f"{stem}.txt" in tree.files for stem in stems):
        columns["text"] = "text"
    for column in (["label"] if labelled else []) + [group for group in groups if group != "split"]:
        if column in ("image", "audio", "id", "source"):
            raise PlaitError(f"The pattern's group '{column}' has the name of another column. Rename the group.")
        columns[column] = "text"

    def records() -> Iterator[tuple[Item, str]]:
        for stem, files in stems.items():
            first = next(iter(files.values()))
            split = _folder_split(first)
            parts: dict[str, str | Media] = {k: Media(k, name, tree.files[name]) for k, name in files.items()}
            if labelled and (label := classes[stem]) is not None:
                parts["label"] = label
            if pattern:
                match = pattern.search(first)
                if not match:
                    yield Rejected(first, None, "its name does not match the pattern"), stem
                    continue
                for column, value in match.groupdict().items():
                    if column == "split":
                        split = split_name(value or "") or split
                    elif value:
                        parts[column] = value
            yield Found(first, first, parts, split), stem

    def read() -> Iterator[Item]:
        for item, stem in records():
            tree.used.update(stems[stem].values())
            text = f"{stem}.txt"
            if isinstance(item, Found) and text in tree.files and "text" not in item.parts:
                tree.used.add(text)
                try:
                    with open_text(tree.files[text], text) as file:
                        words = file.read(LIMITS.file_bytes).strip()
                    if words:
                        item.parts["text"] = words
                except (OSError, ValueError) as error:
                    yield Rejected(text, None, f"the text cannot be read: {error}")
                    continue
            yield item

    given: Counter[str | None] = Counter(item.split for item, _ in records() if isinstance(item, Found))
    notes = [f"{sum(k == kind for k in kinds.values())} {kind} files -> {kind}" for kind in ("image", "audio")
             if kind in columns]  # fmt: skip
    notes += ["files of the same name ending in .txt -> text"] if "text" in columns else []
    notes += ["folder names -> label"] if labelled else []
    notes += [f"the pattern's groups -> {', '.join(groups)}"] if groups else []
    return Plan(columns, given, read, notes)


def _ending(name: str) -> str:
    last = name.rpartition("/")[2]
    suffix = os.path.splitext(last)[1]  # noqa: PTH122
    return suffix if suffix.lower() in IMAGE_SUFFIXES | AUDIO_SUFFIXES else ""


def plan(
    tree: Tree,
    column_map: dict[str, str] | None = None,
    labels: dict[str, list[str]] | None = None,
    pattern: str | None = None,
) -> Plan:
    """How the source is read. Tables govern the media they name; without tables, idx files, media, then texts.

    Raises PlaitError where there is nothing to read or an option does not fit.
    """
    from plait.data.tables import plan_tables

    try:
        compiled = re.compile(pattern) if pattern else None
    except re.error as error:
        raise PlaitError(
            f"The pattern is not a regular expression: {error}. Write groups as (?P<label>\\d)."
        ) from error
    if compiled and not compiled.groupindex:
        raise PlaitError("The pattern has no named group. Write groups as (?P<label>\\d).")
    tables = None if compiled else plan_tables(tree, column_map or {}, labels or {})
    found = plan_idx(tree, labels or {}) or tables
    if found is None or (found is tables and not {"image", "audio"} & set(found.columns.values()) and not column_map):
        # Tables that name no media give way to media that lie there.
        found = plan_media(tree, compiled) or found or (plan_text(tree) if not compiled else None)
    if found is None:
        raise PlaitError(
            f"{tree.root} holds nothing that can be read: no pictures (png, jpeg, gif, webp, bmp, tiff), "
            "sound (wav, flac, ogg, opus, mp3), tables (jsonl, csv, tsv, parquet), text (txt) or idx files."
        )
    if column_map and found is not tables:
        known = ", ".join(found.columns)
        raise PlaitError(f"--map applies to the columns of tables; this source has none (its columns are {known}).")
    return found
