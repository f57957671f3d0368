"""Names of figures: typed while they are worked with, "TASK/FROM-TO/METRIC" where people and files see them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TypeAlias

Metric: TypeAlias = dict[str, float | None]  # value, stderr, chance, baseline, n; low and high of the 95 % interval

TIMING = "timing"  # the task of seconds and steps, which say nothing of quality
_CLEAN = "_clean"
# A column's name may hold slashes, and so may a label: the metric is the first plain word after a slash that ends the
# name or has a label behind it.
_KEY = re.compile(r"(?P<task>[^/]*)/(?P<direction>.*?)/(?P<metric>\w+)(?:\[(?P<label>.*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Direction:
    """What is read and what is answered, as columns; `target` is empty where one column is all there is to say."""

    source: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.source}-{self.target}" if self.target else self.source

    @property
    def arrow(self) -> str:
        """As titles have it: "image → label"."""
        return f"{self.source} → {self.target}" if self.target else self.source

    @classmethod
    def parse(cls, text: str, columns: list[str] | tuple[str, ...] = ()) -> Direction:
        """From "image-label". Names of columns may hold hyphens: it is cut between two known columns, else at the
        middle hyphen."""
        places = [i for i, letter in enumerate(text) if letter == "-"]
        if not places:
            return cls(text)
        known = [i for i in places if text[:i] in columns and text[i + 1 :] in columns]
        place = known[0] if known else places[len(places) // 2]
        return cls(text[:place], text[place + 1 :])


@dataclass(frozen=True)
class MetricKey:
    """The name of a figure.

    Attributes:
        task: What was done: "recognition", "retrieval".
        direction: From which column to which.
        metric: What was measured: "accuracy".
        label: The label that it is of; None for a figure of all.
        clean: Whether records with an equal or near-equal one in train are left out.
    """

    task: str
    direction: Direction
    metric: str
    label: str | None = None
    clean: bool = False

    def __str__(self) -> str:
        ending = (_CLEAN if self.clean else "") + ("" if self.label is None else f"[{self.label}]")
        return f"{self.task}/{self.direction}/{self.metric}{ending}"

    @property
    def main(self) -> bool:
        """Whether it is of a whole task: neither of one label, nor a time."""
        return self.label is None and self.task != TIMING

    @classmethod
    def parse(cls, text: str, columns: list[str] | tuple[str, ...] = ()) -> MetricKey:
        """From a key of `metrics.json`; `columns` are those of the dataset. Raises ValueError for any other text."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' is no TASK/FROM-TO/METRIC.")
        metric, direction = match["metric"], Direction.parse(match["direction"], columns)
        clean = metric.endswith(_CLEAN)
        return cls(match["task"], direction, metric.removesuffix(_CLEAN), match["label"], clean)


class Metrics(MutableMapping[MetricKey, Metric]):
    """Figures by their keys, in the order in which they were measured.

    A figure is also found by its key's text: `metrics["recognition/image-label/accuracy"]`.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Metric] = {}
        self._keys: dict[str, MetricKey] = {}

    @classmethod
    def read(cls, figures: Mapping[str, Metric], columns: list[str] | tuple[str, ...] = ()) -> Metrics:
        """From what `metrics.json` holds. Raises ValueError for a key that is none."""
        metrics = cls()
        for text, figure in figures.items():
            metrics[MetricKey.parse(text, columns)] = figure
        return metrics

    def __getitem__(self, key: MetricKey | str) -> Metric:
        return self._figures[str(key)]

    def __setitem__(self, key: MetricKey, figure: Metric) -> None:
        self._keys[str(key)], self._figures[str(key)] = key, figure

    def __delitem__(self, key: MetricKey | str) -> None:
        del self._keys[str(key)], self._figures[str(key)]

    def __iter__(self) -> Iterator[MetricKey]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def keep(
        self,
        key: MetricKey,
        value: float,
        *,
        stderr: float | None = None,
        chance: float | None = None,
        baseline: float | None = None,
        n: int | None = None,
    ) -> None:
        """Add a figure.

        Args:
            key: Its name.
            value: What was measured.
            stderr: Its standard error.
            chance: What guessing has.
            baseline: What the simple alternative has.
            n: Records that it is of.
        """
        self[key] = {"value": value, "stderr": stderr, "chance": chance, "baseline": baseline, "n": n}
