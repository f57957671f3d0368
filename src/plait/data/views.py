"""A dataset as people look at it: its report, what was rejected, as a data frame, in a notebook."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.frames import data_frame, html_table
from plait.data.record import SPLITS, Record, Rejected
from plait.data.stores import Location, join, open_binary, size

if TYPE_CHECKING:
    from plait.data.dataset import Manifest


class DatasetViews:
    """The part of `Dataset` that shows it."""

    path: Location
    manifest: Manifest
    columns: dict[str, str]

    def indices(self, split: str) -> np.ndarray:
        """The numbers of a split's records; see `Dataset`."""
        raise NotImplementedError

    def iterate(self, indices: Iterable[int] | None = None, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Records in an order; see `Dataset`."""
        raise NotImplementedError

    @property
    def counts(self) -> dict[str, int]:
        """Records by split."""
        return dict(self.manifest.counts)

    @property
    def report(self) -> Path:
        """The page with columns, splits, examples and what was rejected. Raises PlaitError where there is none."""
        if not isinstance(self.path, Path) or not (self.path / "report.html").is_file():
            raise PlaitError(f"{self.path} has no report.html on this machine.")
        return self.path / "report.html"

    @property
    def rejects(self) -> list[Rejected]:
        """What could not be used: file, line and reason of each."""
        place = join(self.path, "rejects.jsonl")
        if size(place) is None:
            return []
        with open_binary(place) as file:
            rows = [json.loads(line) for line in file.read().decode("utf-8").splitlines() if line.strip()]
        return [Rejected.of_row(row) for row in rows]

    def to_pandas(self, split: str | None = None, media: bool = False) -> Any:
        """The records as a pandas DataFrame, indexed by id, with a column `split`.

        Args:
            split: "train", "val" or "test"; all if left out.
            media: also the encoded bytes of images and audio clips, which may be large.

        Raises PlaitError where pandas is not installed or the split is unknown.
        """
        numbers = np.concatenate([self.indices(name) for name in ([split] if split else SPLITS)])
        names = [name for name, kind in self.columns.items() if media or kind == "text"]
        records = list(self.iterate(numbers.tolist(), names))
        columns: dict[str, list[Any]] = {"split": [record.split for record in records]}
        columns |= {name: [record.parts.get(name) for record in records] for name in names}
        columns["source"] = [record.source for record in records]
        return data_frame(columns, [record.id for record in records], "id")

    def summary(self) -> str:
        """Counts, what was rejected and warnings, in a few lines of text."""
        counts = ", ".join(f"{split} {count:,}" for split, count in self.manifest.counts.items())
        kinds = ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())
        lines = [f"Dataset {self.path}: {counts}. Columns: {kinds}. Rejected: {self.manifest.rejected}."]
        if self.manifest.groups:
            lines.append(f"Groups by {self.manifest.group_by}, each in one split: {self.manifest.groups_told}.")
        lines += [f"Note: {warning}" for warning in self.manifest.warnings]
        if self.manifest.rejected:
            lines.append(f"What was rejected, and why: {join(self.path, 'rejects.jsonl')}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}={count}" for split, count in self.manifest.counts.items())
        return f"Dataset({str(self.path)!r}, columns={self.columns}, {counts})"

    def _repr_html_(self) -> str:
        rows = []
        for name, kind in self.columns.items():
            lengths = self.manifest.statistics.get(name)
            span = f"{lengths.min:.4g} to {lengths.max:.4g} {lengths.unit}" if lengths else ""
            rows.append([name, kind, lengths.records if lengths else "", span])
        counts = ", ".join(f"{split} {count:,}" for split, count in self.manifest.counts.items())
        caption = f"{self.path}: {counts}; rejected {self.manifest.rejected}"
        notes = [["note", "", "", warning] for warning in self.manifest.warnings]
        return html_table(["column", "kind", "records", "length"], [*rows, *notes], caption)
