"""The table beside media that says what they are: `metadata.jsonl`, `.csv` or `.parquet`.

A user's table is never altered. Where labels were edited, a `metadata.jsonl` with the edits takes its place, and the
table waits beside it as a hidden file until the edits are undone.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import sha256_file, write_atomic
from plait.modalities.media import MEDIA
from plait.studio.workspace import Project

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
WRITTEN = "metadata.sha256"  # in the project's folder: the sha256 of the table that the studio wrote
LABEL = "label"

Row = dict[str, Any]


def user_table(project: Project) -> Path | None:
    """The user's own table, wherever it is by now; None where there is none."""
    if project.source.is_file():
        return None
    for name in NAMES:
        table = project.source / name
        if table.is_file() and not _is_ours(project, table):
            return table
    return next((hidden_table for name in NAMES if (hidden_table := project.source / f".{name}").is_file()), None)


def read_table(path: Path) -> dict[str, list[Row]]:
    """The rows of a table by the file that they name, in the table's order.

    Raises PlaitError where it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: list[Any] = pq.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise PlaitError(f"{path.name.lstrip('.')} cannot be read: {error}. Mend it, or take it away.") from error
    rows_by_file: dict[str, list[Row]] = {}
    for row in rows:
        name = _file_of(row) if isinstance(row, dict) else ""
        if name:
            rows_by_file.setdefault(name, []).append(row)
    return rows_by_file


def _file_of(row: Row) -> str:
    name = next((row[files.file_column] for files in MEDIA.values() if row.get(files.file_column)), "")
    return str(name).replace("\\", "/").removeprefix("./")


def write_table(project: Project, rows: list[Row]) -> None:
    """Put rows in the place of the user's table, which is put aside."""
    place = project.uploads / NAMES[0]
    for name in NAMES:
        table = project.uploads / name
        if table.is_file() and not _is_ours(project, table):
            table.replace(table.with_name(f".{name}"))
    write_atomic(place, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    write_atomic(project.folder / WRITTEN, sha256_file(place))


def restore_table(project: Project) -> None:
    """Take the table with edits away, and bring the user's back."""
    place = project.uploads / NAMES[0]
    if place.is_file() and _is_ours(project, place):
        place.unlink()
        for name in NAMES:
            if (hidden_table := project.uploads / f".{name}").is_file():
                hidden_table.replace(project.uploads / name)
    (project.folder / WRITTEN).unlink(missing_ok=True)


def _is_ours(project: Project, table: Path) -> bool:
    try:
        return sha256_file(table) == (project.folder / WRITTEN).read_text(encoding="utf-8").strip()
    except OSError:
        return False
