"""Groups of records that must not be parted: what one speaker said, one patient's images, one session's photos.

A split at random puts some of each speaker into train and some into test, and what is measured then is how well the
model knows these speakers. With a group each, records of a group share a split.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np

from plait.core.errors import PlaitError
from plait.data.dataset import Lengths
from plait.data.files import Item, Media, Plan, RawRecord

FOLDER, NAME = "folder", "name:"  # what groups are made by, beside the name of a column
FEWEST = 3  # groups: one for each split
# Names of columns that say where records come from.
GROUP_NAMES = (
    "speaker", "patient", "subject", "participant", "session", "person", "author", "user", "rater", "client", "site",
    "hospital", "camera", "device",
)  # fmt: skip
_MARKS = re.compile(r"[-_. ]+")  # between the parts of a file's name
_WATCHED = 5000  # files whose names are looked at
_ENOUGH = 20  # files without which their names say nothing

GroupOf = Callable[[RawRecord], str | None]


def grouped_plan(plan: Plan, by: str) -> Plan:
    """A plan whose records have groups: by a column (or a named group of the pattern), which is then not learnt; by
    `folder`, the folder that a file lies in; or by `name:N`, the Nth part of a file's name.

    Raises PlaitError for a column that is not there or holds no text.
    """
    columns = dict(plan.columns)
    if by == FOLDER:
        group_of: GroupOf = _folder
        note = "the folder of a file -> group"
    elif by.startswith(NAME):
        group_of = _name_part(by)
        note = f"part {by.removeprefix(NAME)} of a file's name -> group"
    else:
        if columns.get(by) != "text":
            known = ", ".join(name for name, kind in columns.items() if kind == "text") or "none"
            raise PlaitError(
                f"--group-by {by}: there is no such column of texts (there are: {known}). Name one, a named group of "
                "--pattern, folder, or name:N for the Nth part of files' names."
            )
        del columns[by]

        def group_of(item: RawRecord) -> str | None:
            value = item.parts.pop(by, None)
            return value if isinstance(value, str) else None

        note = f"{by} -> group, which is not learnt"

    def read() -> Iterator[Item]:
        for item in plan.read():
            if isinstance(item, RawRecord):
                group = group_of(item)
                item.group = item.group if group is None else group
            yield item

    return dataclasses.replace(plan, columns=columns, read=read, notes=[*plan.notes, note], group_by=by)


def _file(item: RawRecord) -> PurePosixPath:
    """The file that a record is of: its first medium, or the table that it stands in."""
    name = next((part.name for part in item.parts.values() if isinstance(part, Media)), None)
    return PurePosixPath(name or item.place)


def _folder(item: RawRecord) -> str:
    return str(_file(item).parent)


def _name_part(by: str) -> GroupOf:
    number = by.removeprefix(NAME)
    if not number.isdigit() or int(number) < 1:
        raise PlaitError(f"--group-by {by}: write name:N, where N counts the parts of a file's name from 1.")

    def group_of(item: RawRecord) -> str | None:
        parts = _MARKS.split(_file(item).stem)
        return parts[int(number) - 1] if len(parts) >= int(number) else None

    return group_of


def split_groups(group_hash: np.ndarray, splits: tuple[int, ...] = (2, 1)) -> np.ndarray:
    """The split (N,) of records whose groups have equal `group_hash` (N,): about a tenth of the records for each of
    `splits`, whole groups, one at least; the others are train (0). Which, follows from the draws, which are hashes.

    Raises PlaitError for fewer groups than splits and train need.
    """
    values, place, counts = np.unique(group_hash, return_inverse=True, return_counts=True)
    if len(values) <= len(splits):
        raise PlaitError(
            f"There are {len(values)} groups, too few for train and {len(splits)} more splits of whole groups. Name "
            "the splits yourself (a column `split`), or group by something else."
        )
    split = np.zeros(len(values), np.int64)
    for split_number in splits:
        target, taken = len(group_hash) / 10, 0
        free = np.flatnonzero(split == 0)
        for group in free[::-1]:
            fits = taken + counts[group] / 2 <= target
            if fits and (split == 0).sum() > 1:
                split[group], taken = split_number, taken + int(counts[group])
        if not taken:  # every group is large
            split[free[np.argmin(counts[free])]] = split_number
    return np.asarray(split[place])


def group_folds(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) the fold of each record, below `folds`: whole groups, the next to the fold that has fewest records."""
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order], kind="stable")]
    fold, filled = np.zeros(len(counts), np.int64), np.zeros(folds, np.int64)
    for group in order:
        fold[group] = filled.argmin()
        filled[fold[group]] += counts[group]
    return np.asarray(fold[place])


# --- hints --------------------------------------------------------------------------------------------------------


def column_hint(statistics: dict[str, Lengths]) -> str | None:
    """What to say of a column whose name says where records come from; None where there is none."""
    for name, lengths in statistics.items():
        words = re.split(r"[^a-z]+", name.lower())
        several = lengths.distinct is not None and FEWEST <= lengths.distinct <= lengths.records / 2
        if several and any(word in GROUP_NAMES for word in words):
            return (
                f"Column '{name}' says where records come from, and every split has some of each: figures are of "
                f"known {name}s. To keep each in one split: --group-by {name}"
            )
    return None


class NameWatch:
    """Looks at the names of files as they pass, for a part that says where a file comes from, as in
    `7_jackson_12.wav` of a folder for each label."""

    def __init__(self) -> None:
        self.names: list[tuple[list[str], str]] = []  # parts of a name, and the label

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items as they are, the names of their files taken note of."""
        for item in items:
            if isinstance(item, RawRecord) and len(self.names) < _WATCHED:
                label = item.parts.get("label")
                medium = any(isinstance(part, Media) for part in item.parts.values())
                if medium and isinstance(label, str):
                    self.names.append((_MARKS.split(_file(item).stem), label))
            yield item

    def hint(self) -> str | None:
        """What to say of it; None where names have no such part."""
        lengths = {len(parts) for parts, _ in self.names}
        if len(self.names) < _ENOUGH or len(lengths) != 1:
            return None
        labels = {label for _, label in self.names}
        for place in range(lengths.pop()):
            seen = defaultdict(set)
            for parts, label in self.names:
                seen[parts[place]].add(label)
            words = all(re.search("[^0-9]", value) for value in seen)
            crosses = np.mean([len(labels_of_part) for labels_of_part in seen.values()]) >= max(len(labels) / 2, 2)
            if words and crosses and FEWEST <= len(seen) <= len(self.names) / 4:
                examples = ", ".join(f"'{value}'" for value in sorted(seen)[:3])
                return (
                    f"Part {place + 1} of the files' names ({examples}, ...) seems to say where a file comes from, and "
                    f"every split has some of each: figures are of known ones. To keep each in one split: "
                    f"--group-by {NAME}{place + 1}"
                )
        return None
