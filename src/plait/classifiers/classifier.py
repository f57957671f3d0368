"""A column's classifier: what was fitted beside the model's own weights, as arrays and JSON.

Its opinions are named: `linear` (features or n-grams, no network), `network` (the recogniser's head), `likelihood`
(of the label as text), `nearest` (label in the embedding space). The model gives the last three; this file knows the
first and how all are mixed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from plait.classifiers.linear import Linear, NgramFeatures
from plait.classifiers.mixture import Mixture
from plait.classifiers.novelty import Novelty
from plait.core.errors import PlaitError
from plait.modalities.media import MEDIA

FILE, ARRAYS = "classifiers.json", "classifiers.safetensors"
VERSION = 5
PORTABLE = ("linear", "network")  # the opinions that need no backbone


@dataclass
class Features:
    """How inputs of one kind become rows of numbers: fixed features, centred and scaled, or n-grams of texts."""

    kind: str  # "text", or a modality with files
    bands: int = 0  # the modality's setting of that name; 0 where it has none
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None
    grams: NgramFeatures | None = None

    @classmethod
    def fit(cls, kind: str, inputs: Sequence[Any], bands: int = 0, words: bool = True) -> Features:
        """`inputs` are texts, or samples of the modality; without `words` of texts only the characters count."""
        if kind == "text":
            return cls(kind, grams=NgramFeatures.fit(inputs, words))
        raw = cls(kind, bands).raw(inputs)
        return cls(kind, bands, raw.mean(0), (raw.std(0) + 1e-3) / MEDIA[kind].simple_weights(raw.shape[1]))

    def raw(self, inputs: Sequence[Any]) -> np.ndarray:
        """Features of media as they are, (N, F)."""
        return MEDIA[self.kind].simple_features(inputs, self.bands)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """(N, F), dense for media and sparse for texts."""
        if self.grams is not None:
            return self.grams(inputs)
        return (self.raw(inputs) - self.mean) / self.scale


@dataclass
class Classifier:
    """What decides about `labels` of the column `target`, from the column `source`.

    `mirrored`: images mean the same when mirrored, so both are asked. `measured` tells what `records` of validation
    showed: opinion -> accuracy; `guess` is that of always saying train's most frequent label. `portable` mixes those
    opinions alone that need no backbone, for programs of others; None where it was not fitted.
    """

    source: str
    target: str
    labels: list[str]
    features: Features
    linear: Linear
    mixture: Mixture
    mirrored: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    guess: float = 0.0
    records: int = 0
    novelty: dict[str, Novelty] = field(default_factory=dict)  # "features", "network": views of what is unlike
    portable: Mixture | None = None
    fitting: list[str] = field(default_factory=list)  # what to tell of how it was fitted; not stored

    def linear_scores(self, inputs: Sequence[Any]) -> np.ndarray:
        """The linear opinion, (N, labels)."""
        scores = self.linear(self.features(inputs))
        if self.mirrored:
            scores = (scores + self.linear(self.features([value[:, ::-1] for value in inputs]))) / 2
        return scores


def save_classifiers(classifiers: Sequence[Classifier], folder: Path) -> list[str]:
    """Write them into a folder; returns the names of the files."""
    arrays: dict[str, np.ndarray] = {}
    entries = []
    for number, one in enumerate(classifiers):
        values = {"weights": one.linear.weights.astype(np.float16), "bias": one.linear.bias.astype(np.float32)}
        if one.features.grams is not None:
            values |= {f"idf.{i}": value for i, value in enumerate(one.features.grams.arrays())}
        else:
            assert one.features.mean is not None and one.features.scale is not None
            values |= {"mean": one.features.mean, "scale": one.features.scale}
        for view, novelty in one.novelty.items():
            parts = {**novelty.arrays, "centre": novelty.centre, "spread": novelty.spread}
            values |= {f"novelty.{view}.{name}": value.astype(np.float32) for name, value in parts.items()}
        arrays |= {f"{number}.{name}": np.ascontiguousarray(value) for name, value in values.items()}
        entries.append(
            {
                "source": one.source,
                "target": one.target,
                "labels": one.labels,
                "kind": one.features.kind,
                "bands": one.features.bands,
                "grams": one.features.grams.facts() if one.features.grams else None,
                "mixture": asdict(one.mixture),
                "mirrored": one.mirrored,
                "novelty": list(one.novelty),
                "measured": one.measured,
                "guess": one.guess,
                "records": one.records,
                "portable": asdict(one.portable) if one.portable else None,
            }
        )
    facts = {"version": VERSION, "classifiers": entries}
    (folder / FILE).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    save_file(arrays, folder / ARRAYS)
    return [FILE, ARRAYS]


def load_classifiers(folder: Path) -> list[Classifier]:
    """Those that `save_classifiers` wrote; none where it wrote nothing. Raises PlaitError for another version's."""
    if not (folder / FILE).is_file():
        return []
    facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if facts["version"] != VERSION:
        raise PlaitError(
            f"{folder / FILE} has version {facts['version']}; this Plait reads {VERSION}, whose features are computed "
            "otherwise. Train the run again."
        )
    arrays = load_file(folder / ARRAYS)
    classifiers = []
    for number, entry in enumerate(facts["classifiers"]):

        def take(name: str, number: int = number) -> np.ndarray:
            return arrays[f"{number}.{name}"]

        grams = entry["grams"]
        if grams is not None:
            restored = NgramFeatures.restore(grams, [take(f"idf.{i}") for i in range(len(grams))])
            features = Features(entry["kind"], grams=restored)
        else:
            features = Features(entry["kind"], entry["bands"], take("mean"), take("scale"))
        linear = Linear(take("weights").astype(np.float32), take("bias").astype(np.float64))
        mixture = Mixture(**entry["mixture"])
        novelty = {}
        for view in entry["novelty"]:
            start = f"{number}.novelty.{view}."
            parts = {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}
            novelty[view] = Novelty(parts, parts.pop("centre"), parts.pop("spread"))
        classifiers.append(
            Classifier(
                entry["source"], entry["target"], entry["labels"], features, linear, mixture, entry["mirrored"],
                entry["measured"], entry["guess"], entry["records"], novelty,
                Mixture(**entry["portable"]) if entry["portable"] else None,
            )
        )  # fmt: skip
    return classifiers
