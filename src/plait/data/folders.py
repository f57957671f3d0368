"""Which folders of a source are splits, and which are classes, told from how they stand beside one another.

A folder called `train` is a split beside `test` and `val`, and a class beside `car` and `bus`; below a split every
folder is a class, whatever its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from plait.data.files import ARCHIVE_SUFFIXES, suffix_of
from plait.data.record import split_name, split_of_file


class Folders:
    """The folders of a set of files, given by their paths in the source. An archive counts as a folder."""

    def __init__(self, names: Iterable[str]) -> None:
        self.children: dict[tuple[str, ...], set[str]] = {}
        for path in {folders_of(name) for name in names}:
            for depth, part in enumerate(path):
                self.children.setdefault(path[:depth], set()).add(part)
        self.notes: dict[tuple[str, ...], str] = {}  # of places where it is not clear
        self._known: dict[tuple[str, ...], int | None] = {}

    def _splits(self, parent: tuple[str, ...]) -> bool:
        """Whether those folders in `parent` that have the name of a split are splits."""
        names = self.children[parent]
        reserved = {name for name in names if split_name(name)}
        others = names - reserved
        if not others:
            return True
        splits = {split_name(name) for name in reserved}
        decided = "train" in splits and len(splits) > 1 and len(others) <= len(reserved)
        if reserved:
            shown, beside = _named_few(reserved), _named_few(others)
            one = len(reserved) == 1
            self.notes[parent] = (
                f"{'The folder' if one else 'The folders'} {shown} {'stands' if one else 'stand'} beside {beside}: "
                + ("taken for splits, and the others for none" if decided else "taken for classes, not for splits")
                + ". If that is not meant, rename or move them."
            )
        return decided

    def _depth(self, path: tuple[str, ...]) -> int | None:
        """At which depth of a path the split stands, or None."""
        if path not in self._known:
            places = (n for n, part in enumerate(path) if split_name(part) and self._splits(path[:n]))
            self._known[path] = next(places, None)
        return self._known[path]

    def split(self, name: str) -> str | None:
        """The split that a file's folders name, or None."""
        path = folders_of(name)
        depth = self._depth(path)
        return None if depth is None else split_name(path[depth])

    def label(self, name: str) -> str | None:
        """The class that a file's folders name: the nearest one that is no split, or None."""
        classes = self._classes(name)
        return classes[-1] if classes else None

    def _classes(self, name: str) -> tuple[str, ...]:
        """A file's folders without the split."""
        path = folders_of(name)
        depth = self._depth(path)
        return path if depth is None else path[:depth] + path[depth + 1 :]

    def note_namesakes(self, names: Iterable[str]) -> None:
        """Note classes whose name folders in several places have: they are one class."""
        places: dict[str, set[str]] = {}
        for classes in {self._classes(name) for name in names}:
            if classes:
                places.setdefault(classes[-1], set()).add("/".join(classes))
        several = {label: where for label, where in places.items() if len(where) > 1}
        if several:
            label, where = min(several.items())
            more = f" (and {len(several) - 1} more such names)" if len(several) > 1 else ""
            self.notes["namesakes",] = (
                f"The folders {_named_few(where)} give one class, '{label}'{more}. If they are different classes, give "
                "them names of their own."
            )


class FileSplits:
    """Which tables or shards belong to a split by their own name, else by their folders."""

    def __init__(self, names: list[str]) -> None:
        self.folders = Folders(names)
        by_name = {name: split_of_file(_stem(name)) for name in names}
        # `train.csv`, `train-00000-of-00001.parquet` are plain; `test_prompts.csv` is, beside a `train_prompts.csv`.
        several = len({split for split in by_name.values() if split}) > 1
        self.by_name = {
            name: split for name, split in by_name.items() if split and (several or _only_numbered(_stem(name)))
        }
        self.notes = [
            f"{name} begins like the name of a split, and no other table does: its rows are split as any others. If "
            f"all of it is {split}, put it in a folder called {split}."
            for name, split in by_name.items()
            if split and name not in self.by_name and not self.folders.split(name)
        ]

    def split(self, name: str) -> str | None:
        """The split of all rows of a table that do not say another one, or None."""
        return self.by_name.get(name) or self.folders.split(name)


@lru_cache(maxsize=4096)
def folders_of(name: str) -> tuple[str, ...]:
    """The folders of a path; an archive counts as a folder of its own name without the ending."""
    parts = name.split("/")[:-1]
    return tuple(p.removesuffix(suffix_of(p)) if suffix_of(p) in ARCHIVE_SUFFIXES else p for p in parts)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].split(".")[0]


def _only_numbered(stem: str) -> bool:
    """Whether nothing but numbers follows the word that a name begins with."""
    return re.fullmatch(r"[A-Za-z]+([-_ ]?(\d+|of|part|shard|split|data|set))*", stem) is not None


def _named_few(names: set[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
