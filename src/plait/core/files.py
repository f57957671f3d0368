"""Files that are whole or absent: atomic writes, folders published at once, locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from plait.core.errors import PlaitError
from plait.core.system import is_running

LINK_NAME = ".link"  # in a folder that stands in for a link: the name of what it stands for


def cache_folder(name: str) -> Path:
    """The user's folder for what can be made again, NAME below the system's cache: ~/.cache/plait (or
    XDG_CACHE_HOME) on Linux, ~/Library/Caches/plait, %LOCALAPPDATA%\\plait\\Cache.

    A systemd unit with CacheDirectory= has its own, which CACHE_DIRECTORY names. Raises RuntimeError where there is no
    home.
    """
    configured = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if configured:
        return Path(configured) / name
    folder = platformdirs.user_cache_path("plait", appauthor=False)
    if not folder.is_absolute():  # a home that is not known is left as "~"
        raise RuntimeError("There is no home folder: set HOME or XDG_CACHE_HOME.")
    return folder / name


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make the names in a folder last through a loss of power. Windows writes them with the files."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old or the new content, also after power is lost."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error


def json_text(value: object) -> str:
    """A value as JSON, indented by one space, with a newline at its end."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically."""
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_folder(file)
        fsync_folder(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PlaitError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(path: Path) -> None:
    """Put back or remove what a killed process left while it published this folder; the caller is its one writer."""
    for left in sorted(path.parent.glob(f".{path.name}.*")):
        process, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("tmp", "old") or not process.isdecimal() or is_running(int(process)):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to the folder `target` beside it, whatever stood there; a reader sees
    the old or the new one.

    Where links are refused (Windows without the right to make them, exFAT) a folder with hard links to the files, or
    copies of them, stands in; `link_target` knows both.
    """
    if link_target(link) == target and (link.is_symlink() or not _symlinks_work(link.parent)):
        return
    clear_leftovers(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        if not _symlinks_work(link.parent):
            with publish_folder(link) as folder:
                link_files(link.parent / target, folder)
                write_atomic(folder / LINK_NAME, target)
            return
        if link.is_dir() and not link.is_symlink():  # a copy that followed links
            link.rename(temporary)
            shutil.rmtree(temporary)
        temporary.symlink_to(target)
        temporary.replace(link)
        fsync_folder(link.parent)
    except OSError as error:
        raise PlaitError(f"Cannot write {link}: {error.strerror}. Free space or choose another folder.") from error


def link_target(link: Path) -> str | None:
    """The name of what `point` made `link` lead to; None where it leads nowhere."""
    if link.is_symlink():
        return link.readlink().name
    if (link / LINK_NAME).is_file():
        return (link / LINK_NAME).read_text(encoding="utf-8").strip()
    return None


def _symlinks_work(folder: Path) -> bool:
    """Whether symbolic links can be made in a folder."""
    probe = folder / f".link.{os.getpid()}.tmp"
    try:
        probe.symlink_to(".")
        probe.unlink()
    except (OSError, NotImplementedError):
        return False
    return True


def link_files(source: Path, target: Path) -> None:
    """The files below `source` under the same names below `target`: hard links, or copies where there are none."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir()
            continue
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves it whole or gone; `clear_leftovers` takes what is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second writer is refused with the process id of the first.

    The system lets go of the lock when its process ends, however it ends. The number of the process is in a file of its
    own: a locked file cannot be read on Windows.
    """
    writer = folder / ".writer"
    lock = filelock.FileLock(folder / ".lock", blocking=False, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        holder = writer.read_text(encoding="ascii", errors="replace").strip() if writer.is_file() else "?"
        raise PlaitError(
            f"{folder} is being written by process {holder}. Wait for it, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise PlaitError(f"Cannot write to {folder}: {why}. Choose another folder with -o.") from error
    try:
        writer.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explained_when_full(folder: Path) -> Iterator[None]:
    """A full disk is the user's to mend, wherever it shows."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PlaitError(
            f"Cannot write {error.filename or folder}: {error.strerror}. Free space; the same command goes on."
        ) from error
