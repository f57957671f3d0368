"""Labels of files: the folder that a file lies in, and edits over it that can be undone. No file is ever changed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.core.errors import PlaitError
from plait.core.files import write_atomic

Action = Literal["move", "rename", "delete"]
REMOVED = None  # the label of a file that an edit took out


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        action: "move" gives `files` the label `label`; "rename" gives it to all files of the label `old` (where
            `label` exists already, the two are merged); "delete" leaves `files` out.
        files: Paths relative to the project's source.
        label: The new label.
        old: The label that is renamed.
        at: Seconds since the epoch.
    """

    action: Action
    files: tuple[str, ...] = ()
    label: str = ""
    old: str = ""
    at: float = 0.0


class LabelEdits:
    """The edits of a project, in the file `labels.jsonl`.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.edits = _read(path)

    def apply(self, labels: dict[str, str]) -> dict[str, str | None]:
        """The labels of files after all edits.

        Args:
            labels: File -> the label that its folder gives it, "" for none.

        Returns:
            File -> label, None for a file that was taken out.
        """
        labels_now: dict[str, str | None] = dict(labels)
        for edit in self.edits:
            if edit.action == "rename":
                for file, label in labels_now.items():
                    if label == edit.old:
                        labels_now[file] = edit.label
                continue
            for file in edit.files:
                if file in labels_now:
                    labels_now[file] = edit.label if edit.action == "move" else REMOVED
        return labels_now

    def move(self, files: Iterable[str], label: str) -> None:
        """Give files another label."""
        self._add(Edit("move", tuple(files), clean_label(label), at=time.time()))

    def rename(self, old: str, new: str) -> None:
        """Give a label another name, or merge it into one that exists."""
        self._add(Edit("rename", label=clean_label(new), old=old, at=time.time()))

    def delete(self, files: Iterable[str]) -> None:
        """Leave files out of what is trained on; they stay on the disk."""
        self._add(Edit("delete", tuple(files), at=time.time()))

    def undo(self) -> Edit | None:
        """Take the last edit back; returns it, None where there is none."""
        if not self.edits:
            return None
        last = self.edits.pop()
        self._write()
        return last

    def _add(self, edit: Edit) -> None:
        self.edits.append(edit)
        self._write()

    def _write(self) -> None:
        write_atomic(self.path, "".join(json.dumps(_row(edit), ensure_ascii=False) + "\n" for edit in self.edits))


def clean_label(label: str) -> str:
    """A label without white space around it. Raises PlaitError where nothing or too much is left."""
    label = " ".join(label.split())
    if not label or len(label) > 200:
        raise PlaitError("A label has between 1 and 200 characters.")
    return label


def _row(edit: Edit) -> dict[str, Any]:
    row = {"action": edit.action, "files": list(edit.files), "label": edit.label, "old": edit.old, "at": edit.at}
    return {name: value for name, value in row.items() if value}


def _read(path: Path) -> list[Edit]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    edits = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            edits.append(Edit(row["action"], tuple(row.get("files", ())), row.get("label", ""), row.get("old", ""),
                              row.get("at", 0.0)))  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise PlaitError(f"{path}, line {number} is no edit of labels: {error}. Mend or remove it.") from error
    return edits
