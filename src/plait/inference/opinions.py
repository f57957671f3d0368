"""What a model and the classifier beside it think of inputs, opinion by opinion; see `classifiers.classifier`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from plait.classifiers.classifier import Classifier
from plait.core.device import Device
from plait.modalities.recogniser import Recogniser
from plait.model import multimodal
from plait.model.checkpoint import Checkpoint

CHUNK = 256  # samples that the recogniser reads at a time


class Scores(Protocol):
    """What is needed of a model; `plait.load` returns one."""

    checkpoint: Checkpoint
    device: Device

    def score(self, contexts: list[multimodal.Sequence], column: str, texts: list[str]) -> np.ndarray: ...

    def embed_sequences(self, sequences: list[multimodal.Sequence]) -> np.ndarray: ...

    def context(self, parts: Any, column: str | None = None) -> multimodal.Sequence: ...

    def alone(self, value: Any, limit: int) -> list[multimodal.Sequence]: ...


def network_scores(
    checkpoint: Checkpoint,
    device: Device,
    source: str,
    target: str,
    samples: Sequence[np.ndarray],
    mirrored: bool,
    shifted: bool = True,
) -> np.ndarray:
    """Logits (N, labels) of a recogniser's head, the mean over views: `shifted` ones, and where `mirrored` each of them
    mirrored too."""
    model = checkpoint.model
    modality = model.media[model.vocabulary.columns[source]]
    encoder = modality.encoder
    assert isinstance(encoder, Recogniser)
    scores = []
    with torch.inference_mode():
        for start in range(0, len(samples), CHUNK):
            chunk = list(samples[start : start + CHUNK])
            views = modality.test_views(chunk) if shifted else [chunk]
            if mirrored:
                views = [*views, *([np.ascontiguousarray(value[:, ::-1]) for value in view] for view in views)]
            logits = []
            for view in views:
                values, lengths = modality.batch(list(view))
                logits.append(encoder.logits(values.to(device.torch), lengths.to(device.torch))[target].float())
            scores.append(torch.stack(logits).mean(0).double().cpu().numpy())
    return np.concatenate(scores)


def novelty_scores(model: Scores, classifier: Classifier, inputs: Sequence[Any]) -> list[np.ndarray]:
    """How unlike training records inputs are, (N,) a view."""
    return [novelty(view_of(model, classifier, view, inputs)) for view, novelty in classifier.novelty.items()]


def view_of(model: Scores, classifier: Classifier, view: str, inputs: Sequence[Any]) -> Any:
    """What a view of novelty reads of inputs, (N, F): simple features, or what the network's heads read."""
    if view == "features":
        return classifier.features(inputs)
    modality = model.checkpoint.model.media[model.checkpoint.model.vocabulary.columns[classifier.source]]
    encoder = modality.encoder
    assert isinstance(encoder, Recogniser)
    views = []
    with torch.inference_mode():
        for start in range(0, len(inputs), CHUNK):
            values, lengths = modality.batch(list(inputs[start : start + CHUNK]))
            pooled = encoder.pooled(values.to(model.device.torch), lengths.to(model.device.torch))
            views.append(pooled.float().cpu().numpy())
    return np.concatenate(views)


def ood_scores(
    model: Scores, classifier: Classifier, inputs: Sequence[Any], scores: dict[str, np.ndarray]
) -> np.ndarray:
    """(N,) in [0, 1]: the share of validation records that look more familiar than each input; `scores` are the
    opinions about it."""
    return classifier.mixture.ood_scores(scores, novelty_scores(model, classifier, inputs))


def available(checkpoint: Checkpoint, source: str, target: str) -> list[str]:
    """The opinions that a model can have about `target` from `source`."""
    model = checkpoint.model
    kind = model.vocabulary.columns[source]
    names = ["linear"]
    if kind != "text":
        encoder = model.media[kind].encoder
        if isinstance(encoder, Recogniser) and target in encoder.columns:
            names.append("network")
    if target not in model.config.read_only and "text" not in model.config.read_only:
        names.append("likelihood")
    if model.config.embed_dim and kind != "text":
        names.append("nearest")
    return names


def opinion_scores(
    model: Scores, classifier: Classifier, inputs: Sequence[Any], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Opinion -> scores (N, labels) of inputs: texts, or samples of the source's modality."""
    source, target, labels = classifier.source, classifier.target, classifier.labels
    kind = classifier.features.kind

    def sequences() -> list[multimodal.Sequence]:
        if kind != "text":
            return [model.context([(source, value)]) for value in inputs]
        limit = model.checkpoint.model.config.backbone.max_length // 2
        return [model.alone(value, limit)[0] for value in inputs]

    def nearest() -> np.ndarray:
        places = model.embed_sequences([model.context([label]) for label in labels])
        return np.asarray(model.embed_sequences(sequences()) @ places.T, np.float64)

    compute: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: classifier.linear_scores(inputs),
        "network": lambda: network_scores(
            model.checkpoint, model.device, source, target, list(inputs), classifier.mirrored
        ),
        "likelihood": lambda: model.score(sequences(), target, labels),
        "nearest": nearest,
    }
    return {name: compute[name]() for name in names}
