"""Files that are whole or absent: atomic writes, folders published at once, locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError


def cache_folder(name: str) -> Path:
    """The user's folder for what can be made again: ~/.cache/plait/NAME, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait" / name


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old or the new content, also after power is lost."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json_text(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A dictionary with the sha256 of its JSON text under "seal", so that a changed byte shows; see `read_sealed`."""
    return {**value, "seal": hashlib.sha256(json_text(value).encode()).hexdigest()}


def intact(value: dict[str, Any]) -> bool:
    """Whether a dictionary that `sealed` made still holds what it held."""
    return value == sealed({name: part for name, part in value.items() if name != "seal"})


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises PlaitError naming the file where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlaitError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlaitError(f"{path} cannot be read as JSON: {error}.") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """The dictionary in a file that `sealed` made. Raises PlaitError naming the file where any byte is another."""
    value = read_json(path)
    if not isinstance(value, dict) or not intact(value) or path.read_bytes() != json_text(value).encode():
        raise PlaitError(f"{path} was altered or cut: it does not match its own seal.")
    return value


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`: written aside, fsynced, renamed.

    A kill leaves the old folder or the new one; between the two renames the old one lies beside, under a name of its
    own, and the next publication puts it back or clears it away. Raises PlaitError where nothing can be written.
    """
    path = Path(path)
    clear_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for file in sorted(aside.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_folder(file)
        fsync_folder(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def clear_leftovers(path: Path) -> None:
    """Put back or remove what a killed process left while it published this folder; the caller is its one writer."""
    for left in sorted(path.parent.glob(f".{path.name}.*")):
        process, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("tmp", "old") or not process.isdecimal() or _alive(int(process)):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`, whatever stood there; a reader sees the old or the new one."""
    aside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        if link.is_symlink() and str(link.readlink()) == target:
            return
        clear_leftovers(link)
        if link.is_dir() and not link.is_symlink():  # a copy that followed links
            link.rename(aside)
            shutil.rmtree(aside)
        aside.symlink_to(target)
        aside.replace(link)
        fsync_folder(link.parent)
    except OSError as error:
        raise PlaitError(f"Cannot write {link}: {error.strerror}. Free space or choose another folder.") from error


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves it whole or gone; `clear_leftovers` takes what is left."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this number: in a restarted container, one's own is often that of the dead."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second writer is refused with the process id of the first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise PlaitError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with -o.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise PlaitError(
                f"{folder} is being written by process {lock.read().strip() or '?'}. "
                "Wait for it, or choose another folder."
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
