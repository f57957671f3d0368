"""A workspace: a folder of projects, each a plain folder. Everything that the studio shows is read from the disk.

    WORKSPACE/
      NAME/
        files/            what was uploaded; or `source.txt`, which names a folder elsewhere that is only read
        labels.jsonl      edits of labels, one a line; the files themselves stay as they are
        data/             the dataset that `plait prepare` made
        runs/1, runs/2    what `plait train` made
        jobs/1, jobs/2    the work that made them: its state, its log

What the command line puts into these folders appears in the studio, and the other way round.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from plait.core.errors import PlaitError
from plait.core.files import remove_folder, write_atomic

_NAME = re.compile(r"[^\W_][\w .-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}


@dataclass(frozen=True)
class Project:
    """A project of a workspace.

    Attributes:
        folder: The project's own folder.
    """

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def uploads(self) -> Path:
        """The folder of what was uploaded."""
        return self.folder / "files"

    @property
    def linked(self) -> Path | None:
        """The folder or file elsewhere that the project reads, None where files were uploaded."""
        try:
            return Path((self.folder / "source.txt").read_text(encoding="utf-8").strip())
        except OSError:
            return None

    @property
    def source(self) -> Path:
        """Where the project's files are."""
        return self.linked or self.uploads

    @property
    def data(self) -> Path:
        """The prepared dataset's folder."""
        return self.folder / "data"

    @property
    def has_files(self) -> bool:
        """Whether there is anything to prepare."""
        source = self.source
        return source.is_file() or (source.is_dir() and any(source.iterdir()))

    @property
    def runs(self) -> list[Path]:
        """The runs, the newest first."""
        folders = [path for path in (self.folder / "runs").glob("*") if path.is_dir() and not path.name.startswith(".")]
        return sorted(folders, key=lambda path: (len(path.name), path.name), reverse=True)

    def run(self, name: str) -> Path:
        """The folder of a run. Raises PlaitError where there is none of that name."""
        path = self.folder / "runs" / safe_name(name)
        if not path.is_dir():
            raise PlaitError(f"There is no run '{name}' in {self.name}.")
        return path

    def next_run(self) -> Path:
        """The folder that the next run will have: runs/1, runs/2, ..."""
        numbers = [int(path.name) for part in ("runs", "jobs") for path in (self.folder / part).glob("[0-9]*")
                 if path.name.isdecimal()]  # fmt: skip
        return self.folder / "runs" / str(max(numbers, default=0) + 1)

    def link(self, path: Path) -> None:
        """Read a folder or file of this machine in place: nothing is copied, and nothing there is written."""
        path = path.expanduser().absolute()
        if not path.exists():
            raise PlaitError(f"{path} does not exist.")
        if any(self.uploads.glob("*")):
            raise PlaitError(f"{self.name} has uploaded files already. Make another project for {path}.")
        write_atomic(self.folder / "source.txt", f"{path}\n")


class Workspace:
    """The folder of all projects.

    Args:
        root: Made where it does not exist. Raises PlaitError where it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlaitError(f"Cannot make {root}: {error.strerror}. Choose another folder.") from error

    def projects(self) -> list[Project]:
        """All projects, the one touched last first. Links are left out: they may lead out of the workspace."""
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()]
        named = [path for path in folders if _NAME.fullmatch(path.name)]
        return [Project(path) for path in sorted(named, key=lambda path: path.stat().st_mtime, reverse=True)]

    def project(self, name: str) -> Project:
        """The project of a name. Raises PlaitError where there is none."""
        folder = self.root / safe_name(name)
        if not folder.is_dir() or folder.is_symlink():
            raise PlaitError(f"There is no project '{name}'.")
        return Project(folder)

    def create(self, name: str) -> Project:
        """A new, empty project. Raises PlaitError for a name that cannot be used or is taken."""
        folder = self.root / safe_name(name)
        try:
            folder.mkdir()
        except FileExistsError:
            raise PlaitError(f"There is a project '{name}' already.") from None
        except OSError as error:
            raise PlaitError(f"Cannot make {folder}: {error.strerror}.") from error
        return Project(folder)

    def free_name(self, name: str) -> str:
        """The name, or the name with a number where it is taken."""
        number, candidate = 1, name
        while (self.root / candidate).exists():
            number += 1
            candidate = f"{name} {number}"
        return candidate

    def delete(self, name: str) -> None:
        """Remove a project with its files and runs; a linked folder stays."""
        remove_folder(self.project(name).folder)

    def free_bytes(self) -> int:
        """What the disk still holds, in bytes."""
        return shutil.disk_usage(self.root).free


def safe_name(name: str) -> str:
    """A name that is one folder below another on every system. Raises PlaitError for any other."""
    name = name.strip()
    if not _NAME.fullmatch(name) or name.endswith((".", " ")) or name.split(".")[0].lower() in _RESERVED:
        raise PlaitError("A name has letters, digits, spaces, dots, - and _, begins with a letter or digit, and has at "
                         "most 64 characters.")  # fmt: skip
    return name


def safe_path(root: Path, relative: str) -> Path:
    """A file below a folder, named by its relative path. Raises PlaitError for one that lies elsewhere, links
    followed."""
    path = (root / relative).resolve()
    if "\0" in relative or not path.is_relative_to(root.resolve()):
        raise PlaitError("That file is not in this project.")
    return path
