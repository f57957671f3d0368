"""Where files lie: a path here, or a URL of an object store that fsspec reads (s3://, gs://, hf://, memory://, ...).

Light, since the processes that check media read through it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, Any, cast

Location = Path | str  # a str is a URL
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


class StoreError(OSError):
    """A store that cannot be reached. The message is for people."""


def location(text: str | Path) -> Location:
    """The URL, or the path, that a text names; `~` is the user's home."""
    if isinstance(text, str) and "://" in text and _SCHEME.match(text):
        return text
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
        raise StoreError(f"{url} cannot be opened: {error}") from error


def open_binary(place: Location) -> IO[bytes]:
    """A file to read, seekable. Raises OSError."""
    if isinstance(place, Path):
        return place.open("rb")
    system, path = _filesystem(place)
    try:
        return cast("IO[bytes]", system.open(path, "rb"))
    except OSError:
        raise
    except Exception as error:  # each store has errors of its own
        raise StoreError(f"{place} cannot be read: {error}") from error


def read_bytes(place: Location) -> bytes:
    """The whole of a small file. Raises OSError."""
    with open_binary(place) as file:
        return file.read()


def join(place: Location, name: str) -> Location:
    """A file in a folder."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def size(place: Location) -> int | None:
    """A file's bytes, or None where there is none. Raises StoreError where the store cannot be reached."""
    if isinstance(place, Path):
        return place.stat().st_size if place.is_file() else None
    system, path = _filesystem(place)
    try:
        facts = system.info(path)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise StoreError(f"{place} cannot be read: {error}") from error
    return int(facts["size"] or 0) if facts["type"] == "file" else None


def listing(url: str) -> dict[str, tuple[str, int, str]]:
    """The files under a URL: path relative to it -> (URL, bytes, what changes with the content), in order of name.

    A URL of one file lists that file under its own name. Raises StoreError.
    """
    system, root = _filesystem(url)
    try:
        found = system.find(root, detail=True)
    except Exception as error:
        raise StoreError(f"{url} cannot be listed: {error}") from error
    files = {}
    for path, facts in sorted(found.items()):
        inside = path.removeprefix(root.rstrip("/")).lstrip("/") or path.rpartition("/")[2]
        stamp = next((str(facts[key]) for key in ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified",
                                                  "created") if facts.get(key)), "")  # fmt: skip
        files[inside] = str(system.unstrip_protocol(path)), int(facts["size"] or 0), f"{facts['size']}:{stamp}"
    return files


def upload(folder: Path, url: str, last: str) -> None:
    """Copy a folder's files to a URL, the file named `last` after all others; it is taken away there first, so that
    a reader sees the old folder, none, or the new one. Raises StoreError."""
    system, root = _filesystem(url)
    try:
        system.makedirs(root, exist_ok=True)
        if system.exists(f"{root}/{last}"):
            system.rm_file(f"{root}/{last}")
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != last)
        for path in system.ls(root, detail=False):
            if path.rpartition("/")[2].endswith(".parquet") and path.rpartition("/")[2] not in names:
                system.rm_file(path)
        for name in [*names, last]:
            system.put_file(str(folder / name), f"{root}/{name}")
        system.invalidate_cache()
    except Exception as error:
        raise StoreError(f"{url} cannot be written: {error}") from error
