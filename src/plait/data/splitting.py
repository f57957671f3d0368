"""Which records are train, val and test, and which splits hold the same."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa

from plait.data.duplicates import SplitPair
from plait.data.files import Plan
from plait.data.grouping import split_groups
from plait.data.record import SPLITS, are_labels
from plait.modalities.media import KINDS

_VAL_MOST = 5000  # records that become val where a source names other splits alone
STRATIFIED = 5000  # records up to which each label is split by itself: beyond, a hash does as well, and stays put
_LABEL_BYTES = 200  # of a text that may be a label
_FEWEST_SPLIT = 10  # records without labels below which all are trained on


def columns_of(paths: list[Path], source_plan: Plan) -> dict[str, str]:
    """The columns that have a value somewhere: those of the plan, then those that turned up, by kind and name."""
    there: dict[str, str] = {}
    for path in paths:
        there |= json.loads(read_chunk(path).schema.metadata[b"kinds"])
    late = sorted(set(there) - set(source_plan.columns), key=lambda name: (KINDS.index(there[name]), len(name), name))
    return {name: there[name] for name in [*source_plan.columns, *late] if name in there}


def split_records(
    given_split: np.ndarray, content_hash: np.ndarray, source_plan: Plan, labels: np.ndarray | None
) -> tuple[np.ndarray, str]:
    """The split of each record, (N,) as numbers in SPLITS, and the rule in words.

    Args:
        given_split: (N,) what the source says, -1 where it says nothing.
        content_hash: (N,) in [0, 1).
        source_plan: how the source is read.
        labels: (N,) numbers of the records' labels, where they have any.
    """
    if source_plan.group_by and not source_plan.grown:
        return _whole_groups(given_split, content_hash, source_plan.group_by)
    if not (given_split >= 0).any() and len(content_hash) < _FEWEST_SPLIT and labels is None:
        return np.zeros(len(content_hash), np.int64), f"fewer than {_FEWEST_SPLIT} records, so all are train"
    if source_plan.tail:
        return np.where(given_split < 0, 0, given_split), "the last tenth of each text is val and test, half each"
    if source_plan.grown:
        rule = "what was there stays; new records 80/10/10 by a hash of the content, equal media with what was there"
        return np.where(given_split < 0, _beside(given_split, content_hash), given_split), rule
    if not (given_split >= 0).any():
        if labels is not None and len(content_hash) <= STRATIFIED:
            rule = "80/10/10 of each label by a hash of the content; equal media share a split"
            return _stratified(content_hash, labels), rule
        rule = "80/10/10 by a hash of the content; equal media share a split"
        by_hash = np.digitize(content_hash, [0.8, 0.9])
        if len(np.unique(by_hash)) < len(SPLITS) <= len(np.unique(content_hash)):
            return _in_order(content_hash), rule.replace("by a hash", "by the order of a hash, since they are few,")
        return by_hash, rule
    split = np.where(given_split < 0, 0, given_split)
    train = int((split == 0).sum())
    # Three standard deviations below the most, since a hash decides.
    share = 0.0 if (given_split == 1).any() or not train else min(0.1, (_VAL_MOST - 3 * _VAL_MOST**0.5) / train)
    words = f", and {share:.1%} of train becomes val by a hash of the content" if share else ""
    return np.where((split == 0) & (content_hash < share), 1, split), "as the source says" + words


def _whole_groups(given_split: np.ndarray, content_hash: np.ndarray, by: str) -> tuple[np.ndarray, str]:
    """Splits (N,) of whole groups, which have equal draws, and the rule; those that the source names stay."""
    if not (given_split >= 0).any():
        return split_groups(content_hash), f"about 80/10/10 in whole groups ({by}), by a hash of the group"
    split = np.where(given_split < 0, 0, given_split)
    train = np.flatnonzero(split == 0)
    if (given_split == 1).any() or not len(train):
        return split, f"as the source says, whatever the groups ({by}) are"
    split[train] = split_groups(content_hash[train], splits=(1,))
    return split, f"as the source says, and about a tenth of train becomes val, in whole groups ({by})"


def _in_order(content_hash: np.ndarray) -> np.ndarray:
    """Splits (N,), none of them empty: of the different hashes in their order the last tenth is test, the tenth before
    it val, one each at least."""
    _, place = np.unique(content_hash, return_inverse=True)
    count = int(place.max()) + 1
    tenth = max(round(count / 10), 1)
    return np.digitize(place, [count - 2 * tenth, count - tenth])


def _beside(given_split: np.ndarray, content_hash: np.ndarray) -> np.ndarray:
    """Splits (N,) by the hash of the content, but those of equal content whose split is given."""
    by_hash = np.digitize(content_hash, [0.8, 0.9])
    with_split = np.flatnonzero(given_split >= 0)
    with_split = with_split[np.argsort(content_hash[with_split], kind="stable")]
    place = np.searchsorted(content_hash[with_split], content_hash).clip(max=len(with_split) - 1)
    return (
        np.where(content_hash[with_split][place] == content_hash, given_split[with_split][place], by_hash)
        if len(with_split)
        else by_hash
    )


def _stratified(content_hash: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A tenth of each label's records for val, and one for test, those that `content_hash` puts last.

    What rounding leaves over counts for the labels that come next. Equal hashes share a split, whatever their labels
    are."""
    split = np.zeros(len(content_hash), np.int64)
    place: dict[float, int] = {}
    due = taken = 0.0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        distinct = [value for value in np.unique(content_hash[members]).tolist() if value not in place]
        due += len(distinct) / 10
        count = min(round(due - taken), len(distinct) // 3)
        taken += count
        border = len(distinct) - 2 * count
        for rank, value in enumerate(distinct):
            place[value] = 0 if rank < border else 1 if rank < border + count else 2
        split[members] = [place[value] for value in content_hash[members].tolist()]
    return split


def few_labels(paths: list[Path], used: np.ndarray, source_plan: Plan) -> np.ndarray | None:
    """The labels (N,) of the records that are used, as numbers, -1 where one has none: by the first column of few and
    short texts. None where there is no such column."""
    for column, kind in columns_of(paths, source_plan).items():
        if kind != "text" or column in source_plan.chats:
            continue
        cells = [cell for path in paths for cell in _cells(path, column)]
        used_cells = [cell for cell, use in zip(cells, used, strict=True) if use]
        filled_cells = [cell for cell in used_cells if cell is not None]
        number = {cell: place for place, cell in enumerate(dict.fromkeys(filled_cells))}
        short = all(len(cell.encode()) <= _LABEL_BYTES for cell in number)
        if short and are_labels(column, len(number), len(filled_cells), per_label=4):
            return np.array([-1 if cell is None else number[cell] for cell in used_cells])
    return None


def _cells(path: Path, column: str) -> list[str | None]:
    """The texts of a column in a chunk."""
    table, name = read_chunk(path), f"part:{column}"
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def overlap_of(split: np.ndarray, group: np.ndarray) -> dict[SplitPair, int]:
    """Records of one split whose media (or text) stand in another too."""
    there = np.zeros((len(split), len(SPLITS)), bool)  # in the row of a group's first record
    there[group, split] = True
    overlap = {}
    for first, second in combinations(range(len(SPLITS)), 2):
        if count := int((there[group, first] & (split == second)).sum()):
            overlap[SplitPair(SPLITS[second], SPLITS[first])] = count
    return dict(sorted(overlap.items()))


def read_chunk(path: Path) -> pa.Table:
    """The table of a chunk, its bytes left on the disk until they are needed."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
