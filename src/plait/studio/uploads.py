"""Uploads: streamed to the disk in pieces, so that a break costs a piece; archives are unpacked within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from plait.core.errors import PlaitError
from plait.core.files import write_json
from plait.studio.workspace import Project, Workspace

SPARE = 512 << 20  # bytes of disk that an upload leaves free
MEMBERS = 200_000  # files of an archive
RATIO = 200  # times that an archive may grow
BATCH = 16 << 20  # bytes of small files that come in one request
UNPACKED = 20 << 30  # bytes of an archive's files
COPY = 1 << 20
LEFT_SECONDS = 3600.0  # after which a half-written file is nobody's


@dataclass(frozen=True)
class Upload:
    """A file on its way.

    Attributes:
        part: The file that it grows in.
        name: The path that it will have in the project.
        size: Its length in bytes.
    """

    part: Path
    name: str
    size: int

    @property
    def received(self) -> int:
        """Bytes that have come so far."""
        return self.part.stat().st_size if self.part.exists() else 0


def begin(workspace: Workspace, project: Project, name: str, size: int, modified: float = 0) -> tuple[str, Upload]:
    """Make room for an upload; returns its id.

    An upload of the same name, size and time of change that broke off is gone on with.
    """
    name = upload_name(name)
    check_room(workspace, project, name, size)
    folder = project.folder / ".uploads"
    folder.mkdir(exist_ok=True)
    described = {"name": name, "size": size, "modified": modified}
    for path in folder.glob("*.json"):
        if json.loads(path.read_text(encoding="utf-8")) == described:
            return path.stem, Upload(path.with_suffix(".part"), name, size)
    number = secrets.token_hex(8)
    write_json(folder / f"{number}.json", described)
    return number, Upload(folder / f"{number}.part", name, size)


def check_room(workspace: Workspace, project: Project, name: str, size: int) -> None:
    """Raises PlaitError where a file of `size` bytes cannot be added to a project."""
    if project.linked is not None:
        raise PlaitError(f"{project.name} reads {project.linked}. Add files there, or make another project.")
    free = workspace.free_bytes()
    if size < 0 or size + SPARE > free:
        raise PlaitError(
            f"{name} has {size / 1e6:,.1f} MB, and the disk has {free / 1e6:,.0f} MB left, of which "
            f"{SPARE / 1e6:,.0f} stay free. Make room, or choose another folder for the studio."
        )


def find(project: Project, number: str) -> Upload:
    """The upload of an id. Raises PlaitError where there is none."""
    path = project.folder / ".uploads" / f"{number}.json"
    if not number.isalnum() or not path.is_file():
        raise PlaitError("That upload is not known. Start it again.")
    description = json.loads(path.read_text(encoding="utf-8"))
    return Upload(path.with_suffix(".part"), description["name"], description["size"])


async def receive(upload: Upload, offset: int, pieces: AsyncIterator[bytes]) -> int:
    """Append pieces at an offset; returns how many bytes there are now."""
    if offset != upload.received:
        return upload.received
    # Each request writes at a place of its own, so that two browsers that send one file do it no harm.
    with upload.part.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        async for piece in pieces:
            if file.tell() + len(piece) > upload.size:
                raise PlaitError(f"{upload.name} is longer than was said.")
            file.write(piece)
    return upload.received


async def receive_many(workspace: Workspace, project: Project, pieces: AsyncIterator[bytes]) -> int:
    """Small files in one request; returns how many there were.

    Args:
        workspace: For the room on its disk.
        project: Where they go.
        pieces: A line of JSON, [[name, bytes], ...], and after it the files' bytes, one behind the other. A request
            that breaks off is sent again as a whole: what came twice is written twice to the same place.
    """
    parts, received = [], 0
    async for piece in pieces:
        parts.append(piece)
        received += len(piece)
        if received > BATCH:
            raise PlaitError(f"Small files come at most {BATCH >> 20} MB at a time.")
    body = b"".join(parts)
    end = body.find(b"\n")
    contents = memoryview(body)[end + 1 :]
    try:
        files = [(upload_name(str(name)), int(size)) for name, size in json.loads(body[: max(end, 0)])]
    except (ValueError, TypeError) as error:
        raise PlaitError("Small files begin with a line of JSON: [[name, bytes], ...].") from error
    if min((size for _, size in files), default=0) < 0 or sum(size for _, size in files) != len(contents):
        raise PlaitError("The sizes of the files do not add up to what has come. Send them again.")
    check_room(workspace, project, f"{len(files)} files", len(contents))
    await asyncio.get_running_loop().run_in_executor(None, _write_files, str(project.uploads), files, contents)
    return len(files)


def _write_files(root: str, files: list[tuple[str, int]], body: memoryview) -> None:
    """Write files that appear whole: hidden ones, as each is until then, are read by nobody. Plain system calls, since
    there are thousands: paths as objects took half of the time."""
    mark, at = secrets.token_hex(6), 0
    existing: set[str] = set()
    for name, size in files:
        folder = f"{root}/{name}".rpartition("/")[0]
        if folder not in existing:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            existing.add(folder)
        temporary = f"{folder}/.{mark}.part"
        try:
            with open(temporary, "wb") as file:  # noqa: PTH123
                file.write(body[at : at + size])
            os.replace(temporary, f"{root}/{name}")  # noqa: PTH105
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        at += size


def sweep(workspace: Workspace) -> None:
    """Remove what a studio that was killed left half written, once it is an hour old."""
    oldest = time.time() - LEFT_SECONDS
    for project in workspace.projects():
        asides = [*project.uploads.rglob(".*.part"), *(project.folder / ".uploads").glob(".*.tmp")]
        for path in asides:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _aside(place: Path) -> Path:
    return place.with_name(f".{secrets.token_hex(6)}.part")


def finish(workspace: Workspace, project: Project, upload: Upload) -> list[str]:
    """Put a whole upload in its place, archives unpacked; returns what was left out and why."""
    if upload.received != upload.size:
        raise PlaitError(f"{upload.name}: {upload.received} of {upload.size} bytes have come.")
    notes: list[str] = []
    if upload.name.lower().endswith(".zip") and zipfile.is_zipfile(upload.part):
        notes = unpack(upload.part, project.uploads, workspace.free_bytes() - SPARE)
        upload.part.unlink()
    else:
        place = project.uploads / upload.name
        place.parent.mkdir(parents=True, exist_ok=True)
        upload.part.replace(place)
    upload.part.with_suffix(".json").unlink(missing_ok=True)
    return notes


def upload_name(name: str) -> str:
    """A path below the project's files: no way up, no hidden parts, no characters that a system forbids."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".", "")]
    clean = ["".join("_" if c in '<>:"|?*' or ord(c) < 32 else c for c in part).strip(" .") for part in parts]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    if not clean or not all(clean) or hidden or ".." in parts or len(name) > 400:
        raise PlaitError(f"'{name[:80]}' is no name for a file here.")
    return "/".join(clean)


def unpack(archive: Path, target: Path, room: int) -> list[str]:
    """Unpack a zip below a folder; returns what was left out and why. Raises PlaitError for one that is damaged or
    larger than `room` bytes, before anything is written."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if len(members) > MEMBERS or total > min(UNPACKED, max(room, 0)):
                raise PlaitError(f"The archive holds {len(members)} files of {total >> 20} MB, more than fits here.")
            if total > 10 << 20 and total > RATIO * archive.stat().st_size:
                raise PlaitError("The archive grows beyond measure when it is unpacked; it was left alone.")
            names = {member: _member_name(member) for member in members}
            prefix = _common_folder([name for name in names.values() if name])
            return _write_members(file, names, prefix, target)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise PlaitError(f"The archive cannot be read: {error}.") from error


def _write_members(file: zipfile.ZipFile, names: dict[zipfile.ZipInfo, str], prefix: str, target: Path) -> list[str]:
    notes = []
    for member, name in names.items():
        if not name:
            if not member.filename.startswith("__MACOSX"):
                notes.append(f"{member.filename[:80]}: no name for a file here")
            continue
        place = target / name.removeprefix(prefix)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = _aside(place)
        try:
            _write_member(file, member, temporary)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    return notes


def _write_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    remaining = member.file_size
    with file.open(member) as source, path.open("wb") as out:
        while piece := source.read(min(COPY, remaining + 1)):
            remaining -= len(piece)
            if remaining < 0:
                raise PlaitError(f"{member.filename[:80]} is longer than the archive says.")
            out.write(piece)


def _member_name(member: zipfile.ZipInfo) -> str:
    """The path of a member, "" for one that has none here (links, ways up, hidden files)."""
    if (member.external_attr >> 16) & 0o170000 == 0o120000:
        return ""
    name = member.filename
    if not member.flag_bits & 0x800:  # macOS writes UTF-8 without saying so
        try:
            name = name.encode("cp437").decode("utf-8")
        except (UnicodeEncodeError, UnicodeDecodeError):
            name = member.filename
    try:
        return upload_name(name)
    except PlaitError:
        return ""


def _common_folder(names: list[str]) -> str:
    """The one folder that all of an archive lies in, when there are folders below it: it is no label."""
    tops = {name.split("/")[0] for name in names}
    deep = all(name.count("/") >= 2 for name in names)
    return f"{tops.pop()}/" if len(tops) == 1 and deep else ""
