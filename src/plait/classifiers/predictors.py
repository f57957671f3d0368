"""What was fitted for columns of several labels and of numbers, stored beside a checkpoint as arrays and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from plait.classifiers.classifier import Features
from plait.classifiers.linear import Linear, NgramFeatures
from plait.classifiers.numbers import Numbers
from plait.classifiers.several import SeveralLabels

Predictor = SeveralLabels | Numbers
FILE, ARRAYS = "predictors.json", "predictors.safetensors"
PREDICTOR_FILES = (FILE, ARRAYS)
VERSION = 1


def save_predictors(predictors: Sequence[Predictor], folder: Path) -> list[str]:
    """Write them into a folder; returns the names of the files."""
    arrays: dict[str, np.ndarray] = {}
    entries = []
    for number, one in enumerate(predictors):
        facts, values = _packed(one)
        arrays |= {f"{number}.{name}": np.ascontiguousarray(value) for name, value in values.items()}
        entries.append(facts)
    text = json.dumps({"version": VERSION, "predictors": entries}, ensure_ascii=False)
    (folder / FILE).write_text(text, encoding="utf-8")
    save_file(arrays, folder / ARRAYS)
    return [FILE, ARRAYS]


def load_predictors(folder: Path) -> list[Predictor]:
    """Those that `save_predictors` wrote; none where it wrote nothing."""
    if not (folder / FILE).is_file():
        return []
    entries = json.loads((folder / FILE).read_text(encoding="utf-8"))["predictors"]
    arrays = load_file(folder / ARRAYS)
    predictors = []
    for number, facts in enumerate(entries):
        start = f"{number}."
        own = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
        predictors.append(_unpacked(facts, own))
    return predictors


def _packed(one: Predictor) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    facts: dict[str, Any] = {"source": one.source, "target": one.target, "measured": one.measured}
    facts |= {"records": one.records, "kind": one.features.kind, "bands": one.features.bands, "grams": None}
    arrays: dict[str, np.ndarray] = {}
    if one.features.grams is not None:
        facts["grams"] = one.features.grams.facts()
        arrays |= {f"idf.{i}": value for i, value in enumerate(one.features.grams.arrays())}
    else:
        assert one.features.mean is not None and one.features.scale is not None
        arrays |= {"mean": one.features.mean, "scale": one.features.scale}
    if isinstance(one, SeveralLabels):
        facts |= {"labels": one.labels, "slope": one.slope}
        arrays |= {"weights": one.linear.weights.astype(np.float16), "bias": one.linear.bias}
        arrays |= {"offsets": one.offsets, "thresholds": one.thresholds}
    else:
        facts |= {"kernel": one.kernel, "low": one.low, "high": one.high}
        arrays |= {"weights": one.weights.astype(np.float32), "residuals": one.residuals}
    return facts, arrays


def _unpacked(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> Predictor:
    grams = facts["grams"]
    if grams is not None:
        restored = NgramFeatures.restore(grams, [arrays[f"idf.{i}"] for i in range(len(grams))])
        features = Features(facts["kind"], grams=restored)
    else:
        features = Features(facts["kind"], facts["bands"], arrays["mean"], arrays["scale"])
    if "labels" in facts:
        linear = Linear(arrays["weights"].astype(np.float32), arrays["bias"])
        return SeveralLabels(
            facts["source"], facts["target"], facts["labels"], features, linear, facts["slope"], arrays["offsets"],
            arrays["thresholds"], facts["measured"], facts["records"],
        )  # fmt: skip
    return Numbers(
        facts["source"], facts["target"], features, arrays["weights"].astype(np.float64), facts["kernel"],
        arrays["residuals"], facts["low"], facts["high"], facts["measured"], facts["records"],
    )  # fmt: skip
