"""The files of a source: folders walked, archives opened, and everything refused on the way listed with a reason."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from plait.data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, LIMITS, sniff
from plait.data.record import split_name
from plait.runtime import PlaitError

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# What reading a damaged compressed file may raise.
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
MEMBER_BYTES = 4 << 30  # of one file in an archive


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


def idx_name(name: str) -> re.Match[str] | None:
    """The match of an idx file's name: its stem, and images or labels."""
    return re.fullmatch(r"(.*?)-?(images|labels)[-.]idx[13]-ubyte(\.gz)?", name.rpartition("/")[2])


def folders_of(name: str) -> list[str]:
    """The folders of a path; an archive counts as a folder of its own name without the ending."""
    parts = name.split("/")[:-1]
    return [part.removesuffix(suffix_of(part)) if suffix_of(part) in ARCHIVE_SUFFIXES else part for part in parts]


def folder_split(name: str) -> str | None:
    """The split that one of a path's folders names, or None."""
    return next((split for part in folders_of(name) if (split := split_name(part))), None)


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
        if suffix in (*TABLE_SUFFIXES, *ARCHIVE_SUFFIXES, ".txt", ".md", ".py", ".html") or idx_name(name):
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
    except (*DAMAGED, NotImplementedError) as error:
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
        except (RuntimeError, *DAMAGED) as error:
            reason = f"cannot be unpacked: {error}"
        except Exception as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            reason = f"cannot be unpacked: {error}"
    tree.refused.append(Rejected(shown, None, reason))
