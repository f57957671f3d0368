"""The files of a source: folders walked, archives opened, and everything refused on the way listed with a reason."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.record import Rejected, split_of_file
from plait.data.stores import Location, StoreError, join, listing, open_binary, raise_if_passing, read_bytes, size
from plait.modalities.descriptor import LIMITS
from plait.modalities.media import kind_of_suffix, sniff

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# What reading a damaged compressed file may raise.
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
_COMMON = (".png", ".jpg", ".wav", ".mp3", ".txt")
MEMBER_BYTES = 4 << 30  # of one file in an archive


@dataclass
class Media:
    """A medium that a record names: a file, or bytes at hand, or an image as an array, to be encoded as PNG.

    `stamp` changes with the content of a file that is not a plain one here: of an archive's member, of a URL.
    """

    kind: str
    name: str
    path: Location | None = None
    data: bytes | None = None
    pixels: np.ndarray | None = None
    size: int = 0
    stamp: str = ""


@dataclass
class RawRecord:
    """A record as its source has it, not yet checked.

    `split` is what the source says, or None; `place` is file or file:line.
    """

    id: str
    place: str
    parts: dict[str, str | Media]
    split: str | None = None
    group: str | None = None


Item = RawRecord | Rejected


@dataclass
class Plan:
    """How a source is read: its columns, the records of each given split (None: not given), and the reader."""

    columns: dict[str, str]
    split_counts: Counter[str | None]
    read: Callable[[], Iterator[Item]]
    notes: list[str]
    tail: bool = False  # one text file: the last tenth is for validation
    chats: list[str] = field(default_factory=list)  # columns whose text is a conversation (see conversations.py)
    multi_label: list[str] = field(default_factory=list)  # columns whose text is several labels (record.join_labels)
    numbers: list[str] = field(default_factory=list)  # columns whose text is a number that is to be predicted
    warnings: list[str] = field(default_factory=list)  # what people must know of how it is read
    grown: bool = False  # records of a dataset, whose splits stay, and new ones
    group_by: str | None = None  # what groups of records are made by that share a split (see grouping.py)


def suffix_of(name: str) -> str:
    """The ending that tells what a file is: lower case, `.gz` taken off, `.tar.gz` kept."""
    if "." not in name:
        return ""
    name = name.lower()
    if name[-4:] in _COMMON and name[-5:-4] not in ("", "/", "."):
        return name[-4:]  # asked of every file several times
    for ending in ARCHIVE_SUFFIXES:
        if name.endswith(ending):
            return ending
    return os.path.splitext(name.removesuffix(".gz"))[1]  # noqa: PTH122 - names, also of archive members


def open_text(path: Location, name: str, errors: str = "surrogateescape") -> IO[str]:
    """A text file, line ends kept: gunzipped where its first bytes say so, UTF-8, or UTF-16 where it begins with that
    mark (as Excel's "Unicode text" does). Bytes that are none of it become lone surrogates, unless `errors` says
    otherwise."""
    raw: IO[bytes] = open_binary(path)
    head = raw.read(4)
    raw.seek(0)
    if head[:2] == b"\x1f\x8b":
        raw = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        head = raw.read(4)
        raw.seek(0)
    wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    return io.TextIOWrapper(raw, encoding="utf-16" if wide else "utf-8-sig", errors=errors, newline="")


# What is no kind of file that is read, but may be made one.
_ADVICE = {
    (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx", ".ppt"): "save its text as .txt",
    (".xls", ".xlsx", ".ods", ".numbers"): "save each sheet as .csv",
    (".db", ".sqlite", ".sqlite3", ".mdb"): "export the table that is wanted as .csv",
    (".eml", ".msg", ".mbox", ".pst"): "export the mails as .csv or .jsonl, a line each",
    (".srt", ".vtt"): "subtitles are read beside a medium of the same name; else save what is said as .txt",
    (".xml",): "write what it says as .csv or .jsonl, a line a record",
    (".7z", ".rar"): "unpack it",
    (".html", ".htm", ".md"): "save its text as .txt",
    (".pkl", ".npy", ".npz", ".mat", ".h5", ".hdf5"): "write it as .parquet, or media as files",
}


def unread(name: str) -> str:
    """Why a file of no kind that is read is not, and what may be done."""
    suffix = suffix_of(name)
    advice = next((words for endings, words in _ADVICE.items() if suffix in endings), "")
    return f"{suffix} is no kind of file that is read: {advice}" if advice else "not a kind of file that is read"


def idx_name(name: str) -> re.Match[str] | None:
    """The match of an idx file's name: its stem, and images or labels."""
    return re.fullmatch(r"(.*?)-?(images|labels)[-.]idx[13]-ubyte(\.gz)?", name.rpartition("/")[2])


# --- the files of a source --------------------------------------------------------------------------------------


@dataclass
class Tree:
    """The files of a source by relative path, archives opened, and what was refused on the way."""

    root: Location
    source: Location  # what was given: the root, or the one file in it
    files: dict[str, Location] = field(default_factory=dict)
    stamps: dict[str, tuple[int, str]] = field(default_factory=dict)  # bytes, and what changes with the content
    refused: list[Rejected] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    archives: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)  # of a WebDataset
    warnings: list[str] = field(default_factory=list)  # what people must know of how it was listed
    why_not: dict[str, Reason] = field(default_factory=dict)  # of files that look like tables: why they are none
    single: str | None = None
    _bare: dict[str, list[str]] | None = None  # media by their names, and by these without the ending
    _packed: dict[str, list[str]] = field(default_factory=dict)  # files of archives by their names
    _media_folders: set[str] = field(default_factory=set)
    _has_own: dict[str, bool] = field(default_factory=dict)  # table -> whether some folder of media is its own

    def kind(self, name: str) -> str | None:
        """The kind of media by the file's ending, else by its first bytes; None for anything else."""
        suffix = suffix_of(name)
        if kind := kind_of_suffix(suffix):
            return kind
        if suffix in (*TABLE_SUFFIXES, *ARCHIVE_SUFFIXES, ".txt", ".md", ".py", ".html") or idx_name(name):
            return None
        try:
            sniffed = sniff(read_bytes(self.files[name], 64))
        except OSError:
            return None
        return sniffed[0] if sniffed else None

    def media(self, kind: str, name: str) -> Media:
        """A file of the source as a medium."""
        size, stamp = self.stamps.get(name, (0, ""))
        return Media(kind, name, self.files[name], size=size, stamp=stamp)

    def resolve(self, table: str, value: str) -> str | Rejected:
        """The name of the file that a table's path names, or the rejection of the table with the reason why there is
        none. Paths are relative to the table."""
        value = unicodedata.normalize("NFC", value.replace("\\", "/"))
        if "\0" in value:
            return Rejected(table, None, Reason(RejectKind.BAD_NAME, "the path holds a NUL character"))
        folder = table.rpartition("/")[0]
        if os.path.isabs(value) and isinstance(self.root, Path):  # noqa: PTH117
            name = os.path.relpath(value, self.root)
        else:
            name = os.path.normpath(f"{folder}/{value}" if folder else value)
        if name == ".." or name.startswith("../"):
            return Rejected(table, None, Reason(RejectKind.OUTSIDE, f"the path '{value}' leads out of the source"))
        if name in self.files or (self.single is not None and self._beside(name)):
            return name
        found = self._fitting(table, [f"{a}/{value}" for a in self.archives if f"{a}/{value}" in self.files])
        if "/" not in value:
            found = self.named(table, value)
        if not found:
            return Rejected(table, None, Reason(RejectKind.MISSING, f"the file '{value}' does not exist"))
        if len(found) > 1:
            several = f"the file '{value}' is there {len(found)} times, as '{found[0]}' and as '{found[1]}'"
            return Rejected(table, None, Reason(RejectKind.MISSING, several))
        return found[0]

    def named(self, table: str, value: str) -> list[str]:
        """The files that a table's bare name may mean: those of an archive, else media somewhere below the table's
        folder, with their ending or without. Where a folder begins like the table, or is of its split, only what is in
        such folders counts: `train.csv` means what is in `train_images`, and nothing where that lacks it."""
        if self._bare is None:
            self._bare = {}
            for path in self.files:
                last = path.rpartition("/")[2]
                if any(path.startswith(archive + "/") for archive in self.archives):
                    self._packed.setdefault(last, []).append(path)
                if kind_of_suffix(suffix_of(last)):
                    self._media_folders.add(path.rpartition("/")[0])
                    for name in (last, last.removesuffix(os.path.splitext(last)[1])):  # noqa: PTH122
                        self._bare.setdefault(name, []).append(path)
        if table not in self._has_own:
            folders = [folder + "/" for folder in self._media_folders]
            self._has_own[table] = any(_belongs(table, f) for f in folders if _is_below(table, f))
        below = [path for path in self._bare.get(value, ()) if _is_below(table, path)]
        found = self._fitting(table, self._packed.get(value, [])) or self._fitting(table, below)
        return [path for path in found if not self._has_own[table] or _belongs(table, path)]

    def _fitting(self, table: str, paths: list[str]) -> list[str]:
        """Of files that a table may name, those in folders of its own, else those that are not for test where the table
        is for training, or the other way round."""
        own = split_of_file(_stem(table))
        others = {"train", "val"} if own == "test" else {"test"} if own else set[str]()
        return [path for path in paths if _belongs(table, path)] or [
            path for path in paths if others.isdisjoint({split_of_file(part) for part in _folders_of(table, path)})
        ]

    def _beside(self, name: str) -> bool:
        try:
            if not isinstance(self.root, Path):
                url = str(join(self.root, name))
                if (length := size(url)) is None:
                    return False
                self.files[name], self.stamps[name] = url, (length, "")
                return True
            for form in ("NFC", "NFD"):  # as files are named on Linux and Windows, and on a Mac
                real = (self.root / unicodedata.normalize(form, name)).resolve()
                if real.is_relative_to(self.root.resolve()) and real.is_file():
                    self.files[name] = real
                    return True
        except (OSError, ValueError):
            pass
        return False


def _stem(table: str) -> str:
    name = table.rpartition("/")[2]
    return name.removesuffix(suffix_of(name))


def _is_below(table: str, path: str) -> bool:
    folder = table.rpartition("/")[0]
    return not folder or path.startswith(folder + "/")


def _folders_of(table: str, path: str) -> list[str]:
    """The folders of a file, without those that its table stands in too."""
    return path.removeprefix(table.rpartition("/")[0] + "/").split("/")[:-1]


def _belongs(table: str, path: str) -> bool:
    """Whether a folder of a file begins like the table, or is of the same split."""
    stem = _stem(table).lower()
    split = split_of_file(stem)
    return any(
        part.lower().startswith(stem) or (split is not None and split_of_file(part) == split)
        for part in _folders_of(table, path)
    )


def scan(source: Location, scratch: Path, skip: Location) -> Tree:
    """List a source's files in a fixed order; archives are unpacked under `scratch`, each member under a number, but
    for WebDataset shards, which are read as they are. `skip` is the dataset's own folder.

    Raises PlaitError where the source does not exist or holds nothing.
    """
    if isinstance(source, str):
        tree = _listed(source, scratch)
    elif source.is_file():
        tree = Tree(source.parent, source, single=source.name)
        _add(tree, source.name, source, scratch)
    elif source.is_dir():
        tree = Tree(source, source)
        _walk(tree, source, scratch, skip)
    else:
        raise PlaitError(f"{source} does not exist. Name a folder, a table, a text file or an archive.")
    if not tree.files and not tree.refused:
        raise PlaitError(f"{source} is empty. Put files in it, or name another folder.")
    return tree


def _add(tree: Tree, name: str, path: Location, scratch: Path) -> None:
    """Add a file under its name in composed Unicode, an archive's members in its place."""
    composed = unicodedata.normalize("NFC", name)
    if composed != name and composed not in tree.files:
        if name in tree.stamps:
            tree.stamps[composed] = tree.stamps.pop(name)
        if tree.single == name:
            tree.single = composed
        name = composed
    if is_shard(path, name):
        tree.files[name] = path
        tree.shards.append(name)
    elif suffix_of(name) in ARCHIVE_SUFFIXES:
        single = tree.single == name
        tree.single = None if single else tree.single
        _unpack(tree, path, "" if single else name, scratch)
    else:
        tree.files[name] = path


def _listed(url: str, scratch: Path) -> Tree:
    try:
        listed = listing(url)
    except FileNotFoundError as error:
        raise PlaitError(f"{url} does not exist. Check the address.") from error
    if len(listed) == 1 and next(iter(listed.values()))[0].rstrip("/").endswith(
        "/" + url.rstrip("/").rpartition("/")[2]
    ):
        tree = Tree(url.rstrip("/").rpartition("/")[0], url, single=next(iter(listed)))
    else:
        tree = Tree(url, url)
    for name, (place, length, stamp) in listed.items():
        tree.stamps[name] = length, stamp
        if any(part.startswith(".") for part in name.split("/")):
            tree.refused.append(Rejected(name, None, Reason(RejectKind.HIDDEN, "a hidden file")))
        elif length == 0:
            tree.refused.append(Rejected(name, None, Reason(RejectKind.EMPTY, "the file is empty")))
        else:
            _add(tree, name, place, scratch)
    return tree


def is_shard(path: Location, name: str) -> bool:
    """Whether a tar is a shard of a WebDataset: its name ends in a number, as shards' names do, or the first members
    of its first stem are a `.json` or `.cls` beside something else."""
    suffix = suffix_of(name)
    if suffix not in ARCHIVE_SUFFIXES or suffix == ".zip":
        return False
    stem = name.rpartition("/")[2].lower().removesuffix(suffix)
    numbered = re.search(r"(^|[-_.])(\d{5,}|0\d+)$", stem) is not None
    try:
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r|*") as packed:
            names = [member.name for member in islice((m for m in packed if m.isreg()), 4)]
    except DAMAGED:
        return False
    keys = [shard_key(member)[0] for member in names]
    endings = {shard_key(member)[1] for member in names if shard_key(member)[0] == keys[0]}
    together = len(endings) > 1 and len(endings) == keys.count(keys[0])
    return together and (numbered or bool({"json", "cls"} & endings))


def shard_key(member: str) -> tuple[str, str]:
    """(key, ending in lower case) of a member of a WebDataset shard: its name, cut at the first dot."""
    folder, slash, last = member.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _walk(tree: Tree, source: Path, scratch: Path, out: Location) -> None:
    root, skip = source.resolve(), out.resolve() if isinstance(out, Path) else None

    def failed(error: OSError) -> None:
        name = os.path.relpath(str(error.filename), source)
        raise_if_passing(error, name)
        tree.refused.append(Rejected(name, None, Reason(RejectKind.UNREADABLE, f"cannot be opened: {error.strerror}")))

    for folder, folders, names in os.walk(source, onerror=failed):
        here = Path(folder)
        keep = []
        for name in sorted(folders):
            path, shown = here / name, _shown(here / name, source)
            if path.is_symlink():
                tree.refused.append(Rejected(shown, None, Reason(RejectKind.LINK, "a linked folder is not followed")))
            elif path.resolve() == skip:
                continue
            elif name.startswith("."):
                tree.refused.append(Rejected(shown, None, Reason(RejectKind.HIDDEN, "a hidden folder")))
            elif (path / "manifest.json").is_file() and (path / "rejects.jsonl").is_file():
                tree.refused.append(Rejected(shown, None, Reason(RejectKind.PREPARED, "a dataset that Plait prepared")))
            else:
                keep.append(name)
        folders[:] = keep
        for name in sorted(names):
            path, shown = here / name, _shown(here / name, source)
            reason = None
            try:
                status = path.stat()
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    reason = Reason(RejectKind.LINK, "a link that leads out of the source")
                elif not stat.S_ISREG(status.st_mode):
                    reason = Reason(RejectKind.UNKNOWN_FORMAT, "not a regular file")
                elif name.startswith("."):
                    reason = Reason(RejectKind.HIDDEN, "a hidden file")
                elif status.st_size == 0:
                    reason = Reason(RejectKind.EMPTY, "the file is empty")
            except OSError as error:
                raise_if_passing(error, shown)
                reason = Reason(RejectKind.UNREADABLE, f"cannot be opened: {error.strerror}")
            if reason is None and not _valid(name):
                reason = Reason(RejectKind.BAD_NAME, "its name is not valid Unicode")
            if reason:
                tree.refused.append(Rejected(shown, None, reason))
            else:
                _add(tree, shown, path, scratch)


def _valid(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix().encode("utf-8", "backslashreplace").decode()


def _unpack(tree: Tree, path: Location, prefix: str, scratch: Path) -> None:
    """Add an archive's members to the tree as `prefix/member`; unsafe, empty or huge ones are refused. Whether it is a
    zip or a tar is told by its first bytes."""
    tree.archives.append(prefix or ".")
    lead = f"{prefix}/" if prefix else ""
    shown = prefix or str(path).rpartition("/")[2]
    opened: Callable[[], Any]
    # The members' own files are made anew in every run: their content changes with the archive's.
    stamp = tree.stamps.get(prefix, (0, ""))[1] if isinstance(path, str) else str(path.stat().st_mtime_ns)
    claimed: list[str] = []
    try:
        with open_binary(path) as file:
            head = file.read(4)
            file.seek(0)
            if head[:2] == b"PK":
                with zipfile.ZipFile(file) as archive:
                    for info in archive.infolist():
                        if not info.is_dir():
                            linked = stat.S_ISLNK(info.external_attr >> 16)
                            opened = partial(archive.open, info)
                            name, decoded = _zip_name(info)
                            if not decoded:
                                claimed.append(name)
                            if info.flag_bits & 1:
                                tree.refused.append(
                                    Rejected(lead + name, None, Reason(RejectKind.LOCKED, "locked with a password"))
                                )
                                continue
                            _member(tree, lead, name, info.file_size, linked, scratch, opened, stamp)
            else:
                with tarfile.open(fileobj=file, mode="r|*") as packed:
                    for member in packed:
                        if not member.isdir():
                            opened = partial(packed.extractfile, member)
                            _member(tree, lead, member.name, member.size, not member.isreg(), scratch, opened, stamp)
    except (*DAMAGED, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise PlaitError(f"No room to unpack {path} under {scratch.parent}. Free space there.") from error
        raise_if_passing(error, shown)
        tree.refused.append(Rejected(shown, None, Reason(RejectKind.DAMAGED, f"damaged archive: {error}")))
    if claimed:
        tree.warnings.append(
            f"{shown}: {len(claimed):,} names are not UTF-8 and do not say what they are; they are read as a zip's "
            f"are, in code page 437, as '{claimed[0]}'. If that is wrong, pack it again with UTF-8 names."
        )


def _zip_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """A member's name, and whether it is known to be right. A zip's names are code page 437 where no flag says UTF-8,
    but macOS and others write UTF-8 without the flag."""
    name = info.filename
    if name.isascii() or info.flag_bits & 0x800:
        return name, True
    try:
        return name.encode("cp437").decode(), True
    except UnicodeError:
        return name, False


def _member(
    tree: Tree, lead: str, name: str, size: int, linked: bool, scratch: Path, opened: Callable[[], Any], stamp: str
) -> None:
    plain = name.removeprefix("./")
    shown = lead + (unicodedata.normalize("NFC", plain) if _valid(plain) else plain)
    if shown in tree.files:
        shown = lead + plain
    limit = LIMITS.file_bytes if kind_of_suffix(suffix_of(name)) else MEMBER_BYTES
    reason = None
    if not _valid(name):
        shown = shown.encode("utf-8", "backslashreplace").decode()
        reason = Reason(RejectKind.BAD_NAME, "its name is not valid Unicode")
    elif name.startswith("/") or "\\" in name or ".." in name.split("/"):
        reason = Reason(RejectKind.OUTSIDE, "the member's path leads out of the archive")
    elif linked:
        reason = Reason(RejectKind.LINK, "a link or a device in an archive")
    elif name.rpartition("/")[2].startswith(".") or "__MACOSX/" in name:
        reason = Reason(RejectKind.HIDDEN, "a hidden file")
    elif size == 0:
        reason = Reason(RejectKind.EMPTY, "the file is empty")
    elif size > limit:
        reason = Reason(RejectKind.TOO_LARGE, f"larger than {limit >> 20} MiB")
    elif shown in tree.files:
        reason = Reason(RejectKind.DUPLICATE, "the archive holds this name twice")
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
            tree.files[shown], tree.stamps[shown] = target, (target.stat().st_size, stamp)
            return
        except StoreError:
            raise
        except Exception as error:  # what the archive's own decoder raises
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise_if_passing(error, shown)
            reason = Reason(RejectKind.DAMAGED, f"cannot be unpacked: {error}")
    tree.refused.append(Rejected(shown, None, reason))
