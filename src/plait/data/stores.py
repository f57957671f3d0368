"""Where files lie: a path here, or a URL of an object store that fsspec reads (s3://, gs://, hf://, memory://, ...).

Light, since the processes that check media read through it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from plait.core.errors import PlaitError

Location = Path | str  # a str is a URL
T = TypeVar("T")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


_PATIENCE = "PLAIT_STORE_PATIENCE"  # seconds that a disk or a store is waited for, 60 by default
_BLOCK = 4 << 20  # bytes that are read of a store's file at a time
# What is wrong with one file, and will be tomorrow: it is not there, or not for us, or no file.
_OF_THE_FILE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
                          errno.ENAMETOOLONG, errno.EINVAL})  # fmt: skip


class StoreError(PlaitError):
    """A disk, a network or a store that failed, after it was tried for a while. It says nothing of the file that was
    asked for, so it ends the work: it is no reason to go on without that file. The message is for people."""


def location(text: str | Path) -> Location:
    """The URL, or the path, that a text names; `~` is the user's home."""
    if isinstance(text, str) and "://" in text and _SCHEME.match(text):
        return text if text.endswith("://") else text.rstrip("/")
    return Path(text).expanduser()


def written_place(place: Location, folder: Path) -> str:
    """How a file in `folder` names a place: relative to the folder where it lies in it, so that the folder may be
    moved, else in full, so that the working directory does not matter."""
    if isinstance(place, str):
        return place
    place, folder = place.resolve(), folder.resolve()
    return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)


def read_place(text: str, folder: Path) -> Location:
    """The place that a file in `folder` names (see `written_place`)."""
    place = location(text)
    return folder / place if isinstance(place, Path) else place


def _filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises StoreError."""
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError, OSError) as error:
        raise StoreError(f"{url} cannot be opened: {error}.") from error


# --- failures -----------------------------------------------------------------------------------------------------


def is_passing(error: BaseException) -> bool:
    """Whether a failure to read a file here lies in the disk, the network or the machine: it says nothing of the file.
    An OSError without a number is a decoder's, which met bytes that it cannot read."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE


def raise_if_passing(error: BaseException, name: str) -> None:
    """Raises StoreError where a failure to read the file of a name says nothing of it (see `is_passing`)."""
    if is_passing(error):
        raise StoreError(
            f"{name} cannot be read: {_words(error)}. The disk or network failed; run it again."
        ) from error


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


def _with_retries(work: Callable[[], T], what: str, failed: Callable[[Exception], bool]) -> T:
    """What `work` returns. Where it fails, and `failed` says that the failure may pass, it is tried again after longer
    and longer pauses, for a minute in all. Raises StoreError after that; other failures come as they are."""
    try:
        patience = float(os.environ.get(_PATIENCE, "60"))
    except ValueError:
        raise PlaitError(f"{_PATIENCE} must be a number of seconds.") from None
    began, pause = time.monotonic(), 0.25
    while True:
        try:
            return work()
        except StoreError:
            raise
        except Exception as error:
            if not failed(error):
                raise
            waited = time.monotonic() - began
            if waited + pause > patience:
                again = "What is done is kept, and the same command goes on from there."
                raise StoreError(f"{what}: {_words(error)} (tried for {waited:.0f} s). {again}") from error
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _store_failed(error: Exception) -> bool:
    """Of a store every failure may pass but one: that there is no such file. A token that expired is "forbidden"."""
    return not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)


# --- reading ------------------------------------------------------------------------------------------------------


class _StoreFile(io.RawIOBase):
    """A file of a store, read in ranges, each tried again where the store fails."""

    def __init__(self, system: Any, path: str, length: int, url: str) -> None:
        self.system, self.path, self.length, self.url = system, path, length, url
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(offset + (0, self.at, self.length)[whence], 0)
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.length)
        if stop <= self.at:
            return 0

        def fetch() -> bytes:
            data = cast("bytes", self.system.cat_file(self.path, start=self.at, end=stop))
            if len(data) != stop - self.at:
                raise OSError(errno.EIO, f"{len(data)} bytes came where {stop - self.at} were asked for")
            return data

        data = _with_retries(fetch, f"{self.url} cannot be read", _store_failed)
        buffer[: len(data)] = data
        self.at = stop
        return len(data)


def open_binary(place: Location) -> IO[bytes]:
    """A file to read, seekable. Raises OSError where it is not there or may not be read, StoreError where the disk or
    the store fails for a minute."""
    if isinstance(place, Path):
        return _with_retries(lambda: place.open("rb"), f"{place} cannot be read", is_passing)
    system, path = _filesystem(place)
    facts = _with_retries(lambda: system.info(path), f"{place} cannot be read", _store_failed)
    if facts.get("size") is None:  # a server that does not say: the whole of it
        return io.BytesIO(_with_retries(lambda: system.cat_file(path), f"{place} cannot be read", _store_failed))
    return io.BufferedReader(_StoreFile(system, path, int(facts["size"]), place), _BLOCK)


def read_bytes(place: Location, max_bytes: int = -1) -> bytes:
    """A file's bytes, `max_bytes` at most. Raises as `open_binary` does."""
    if isinstance(place, str):
        system, path = _filesystem(place)
        end = None if max_bytes < 0 else max_bytes
        fetch = lambda: cast("bytes", system.cat_file(path, start=0, end=end))  # noqa: E731
        return _with_retries(fetch, f"{place} cannot be read", _store_failed)

    def read() -> bytes:
        with place.open("rb") as file:
            return file.read(max_bytes)

    return _with_retries(read, f"{place} cannot be read", is_passing)


def join(place: Location, name: str) -> Location:
    """A file in a folder."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def size(place: Location) -> int | None:
    """A file's bytes, or None where there is none. Raises StoreError where the store cannot be reached."""
    if isinstance(place, Path):
        return place.stat().st_size if place.is_file() else None
    system, path = _filesystem(place)
    try:
        facts = _with_retries(lambda: system.info(path), f"{place} cannot be read", _store_failed)
    except FileNotFoundError:
        return None
    return int(facts["size"] or 0) if facts["type"] == "file" else None


def listing(url: str) -> dict[str, tuple[str, int, str]]:
    """The files under a URL: path relative to it -> (URL, bytes, what changes with the content), in order of name.

    A URL of one file lists that file under its own name. Raises StoreError.
    """
    system, root = _filesystem(url)

    def find() -> dict[str, Any]:
        system.invalidate_cache()
        return cast("dict[str, Any]", system.find(root, detail=True))

    listed = _with_retries(find, f"{url} cannot be listed", _store_failed)
    files = {}
    for path, facts in sorted(listed.items()):
        inside = path.removeprefix(root.rstrip("/")).lstrip("/") or path.rpartition("/")[2]
        stamp = next((str(facts[key]) for key in ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified",
                                                  "created") if facts.get(key)), "")  # fmt: skip
        files[inside] = str(system.unstrip_protocol(path)), int(facts["size"] or 0), f"{facts['size']}:{stamp}"
    return files


# --- writing ------------------------------------------------------------------------------------------------------


def check_writable(url: str) -> None:
    """Raises StoreError where nothing can be written under a URL: this is to be known before the work."""
    system, root = _filesystem(url)
    place = f"{root}/.plait-{os.getpid()}"

    def probe() -> None:
        _make_folder(system, root)
        system.pipe_file(place, b"plait")
        system.rm_file(place)

    _with_retries(probe, f"{url} cannot be written", _store_failed)


def _make_folder(system: Any, root: str) -> None:
    """Make a folder where the store has folders: flat ones have none until a file is in it."""
    with contextlib.suppress(FileExistsError, NotImplementedError):
        system.makedirs(root, exist_ok=True)


def upload(folder: Path, url: str, last: str) -> None:
    """Copy a folder's files to a URL, the file named `last` after all others; it is taken away there first, so that
    a reader sees the old folder, none, or the new one. Raises StoreError."""
    system, root = _filesystem(url)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != last)

    def with_retries(work: Callable[[], T]) -> T:
        return _with_retries(work, f"{url} cannot be written", lambda error: True)

    def clear() -> None:
        _make_folder(system, root)
        system.invalidate_cache()
        if system.exists(f"{root}/{last}"):
            system.rm_file(f"{root}/{last}")
        try:
            there = system.ls(root, detail=False)
        except FileNotFoundError:  # a flat store has no folder without files
            return
        for path in there:
            if path.rpartition("/")[2].endswith(".parquet") and path.rpartition("/")[2] not in names:
                system.rm_file(path)

    with_retries(clear)
    for name in [*names, last]:

        def put(name: str = name) -> None:
            system.put_file(str(folder / name), f"{root}/{name}")
            system.invalidate_cache()
            length = system.info(f"{root}/{name}")["size"]
            if length != (folder / name).stat().st_size:
                raise OSError(errno.EIO, f"{name} has {length} bytes there")

        with_retries(put)
