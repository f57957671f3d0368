"""Small CNNs that were fitted as alternatives, kept in the user's cache by what they learnt from: none is fitted
twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes

from plait.core.files import cache_folder, write_atomic
from plait.evaluation.reference_classifier import ReferenceClassifier, blank_classifier

FORM = 1  # of the network and of how it is fitted; another number fits all anew


def kept(facts: dict[str, Any], fit: Callable[[], ReferenceClassifier]) -> tuple[ReferenceClassifier, bool]:
    """The classifier that `facts` describe in full: data, columns, settings, seconds, seed. Returns it and whether it
    was there already; else it is fitted by `fit`, and kept."""
    key = hashlib.sha256(json.dumps({"form": FORM, **facts}, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder("alternatives") / f"{key}.safetensors"
    stored = _read(path)
    if stored is not None:
        return stored, True
    judge = fit()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in judge.network.state_dict().items()}
    write_atomic(path, tensors_to_bytes(tensors, {"classifier": json.dumps(judge.facts())}))
    return judge, False


def _read(path: Path) -> ReferenceClassifier | None:
    """The classifier in a file; None where there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["classifier"])
        judge = blank_classifier(facts)
        judge.network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None
    return judge
