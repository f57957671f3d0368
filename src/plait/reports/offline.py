"""A classifier of images as one page of HTML that works offline, on a phone as well: nothing is loaded from elsewhere.

The page holds the weights of the run's recogniser and some two hundred lines of plain JavaScript that compute with
them. What decides there is the recogniser alone, calibrated alone; the run's other opinions stay behind, and the page
says how often it is right. What is like none of the labels it tells as the run does, by how sure the recogniser is
and by where an image lies among training images (`classifiers.novelty`, the network's view).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import nn

from plait.classifiers.classifier import Classifier
from plait.classifiers.mixture import FEWEST_FAMILIAR, log_softmax, softened, temperature
from plait.classifiers.novelty import CLIP, WEIGHTS
from plait.core.errors import PlaitError
from plait.core.files import write_atomic
from plait.core.pages import PACKAGE, render
from plait.data.dataset import Dataset
from plait.inference.model import PlaitModel
from plait.inference.opinions import network_scores, view_of
from plait.modalities.image import Image
from plait.modalities.media import MEDIA
from plait.modalities.recogniser import ConvNorm, ImageRecogniser, ResidualBlock

FILE = "classifier.html"
MOST = 1000  # records of val and of test that the page is calibrated and measured on
UNLIKE = 0.02  # of val that may look so unfamiliar as to be none of the labels


@dataclass(frozen=True)
class OfflinePage:
    """What was written.

    Attributes:
        file: The page.
        accuracy: Of the page on records of test, None where there are none.
        records: How many these were.
    """

    file: Path
    accuracy: float | None
    records: int


def export_page(model: PlaitModel, dataset: Dataset, folder: Path) -> OfflinePage:
    """Write `classifier.html` into a folder.

    Args:
        model: Of a run that recognises images.
        dataset: What it was trained on, to calibrate on val and measure on test.
        folder: Made where it does not exist.

    Raises PlaitError for a model without a recogniser of images, and where val has no records to calibrate on.
    """
    classifier = _classifier(model)
    modality = model.modality(classifier.source)
    assert isinstance(modality, Image) and isinstance(modality.encoder, ImageRecogniser)
    held, held_truth = _records(model, dataset, classifier, "val")
    held_scores = _scores(model, classifier, held)
    if not len(held_truth):
        raise PlaitError(f"{dataset.path} has no records of val with a label to calibrate the page on.")
    factor = temperature(held_scores, softened(held_truth, len(classifier.labels)))
    familiarity, novelty = _familiarity(model, classifier, held, held_scores)
    asked, truth = _records(model, dataset, classifier, "test")
    scores = _scores(model, classifier, asked)
    accuracy = float((scores.argmax(1) == truth).mean()) if len(truth) else None
    settings = modality.settings
    layers, weights = _layers(modality.encoder, classifier.target)
    weights = np.concatenate([weights, *(array.ravel() for array in novelty)]).astype(np.float32)
    facts = {
        "labels": classifier.labels, "size": settings.size, "channels": settings.channels, "fit": settings.fit,
        "background": settings.background, "mirrored": classifier.mirrored, "factor": factor,
        "familiarity": familiarity, "layers": layers, "accuracy": accuracy, "records": len(truth),
        "pixels": settings.size,
    }  # fmt: skip
    script = (PACKAGE / "reports" / "templates" / "offline.js").read_text(encoding="utf-8")
    data = base64.b64encode(weights.astype("<f4").tobytes()).decode()
    page = render("reports/offline.html", facts=facts, weights=data, script=Markup(script), name=_name(model))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, page)
    return OfflinePage(folder / FILE, accuracy, len(truth))


def page_classifier(model: PlaitModel) -> Classifier | None:
    """The classifier that a page can compute: the run's first of images by a recogniser; None where there is none."""
    for one in model.checkpoint.classifiers:
        if one.features.kind not in MEDIA:
            continue
        encoder = model.modality(one.source).encoder
        if isinstance(encoder, ImageRecogniser) and one.target in encoder.columns:
            return one
    return None


def _classifier(model: PlaitModel) -> Classifier:
    """`page_classifier`. Raises PlaitError where there is none."""
    if (classifier := page_classifier(model)) is not None:
        return classifier
    raise PlaitError(
        f"{model.name} has no recogniser of images, which a page needs that classifies offline. Train one: "
        "plait train DATA --task recognise, with images in folders by label."
    )


def _name(model: PlaitModel) -> str:
    folder = model.folder.resolve() if model.folder else None
    run = next((one for one in folder.parents if (one / "run.json").is_file()), folder) if folder else None
    if run is None:
        return "Plait"
    in_studio = run.parent.name == "runs" and run.name.isdigit()  # its projects number their runs
    return run.parent.parent.name if in_studio else run.name


def _records(
    model: PlaitModel, dataset: Dataset, classifier: Classifier, split: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Samples of a split that have a label, at most MOST, and their classes (N,)."""
    number = {label: i for i, label in enumerate(classifier.labels)}
    samples, truth = [], []
    modality = model.modality(classifier.source)
    for record in dataset.iterate(dataset.indices(split)[:MOST], [classifier.source, classifier.target]):
        label, value = record.parts.get(classifier.target), record.parts.get(classifier.source)
        if label in number and value is not None:
            samples.append(modality.windows(value)[0])
            truth.append(number[str(label)])
    return samples, np.array(truth, np.int64)


def _scores(model: PlaitModel, classifier: Classifier, samples: list[np.ndarray]) -> np.ndarray:
    """The recogniser's log-probabilities (N, labels) of samples."""
    if not samples:
        return np.zeros((0, len(classifier.labels)))
    scores = network_scores(
        model.checkpoint, model.device, classifier.source, classifier.target, samples, classifier.mirrored,
        shifted=False,  # the page's script asks about images as they are, and is calibrated so
    )  # fmt: skip
    return log_softmax(scores)


def _familiarity(
    model: PlaitModel, classifier: Classifier, held: list[np.ndarray], scores: np.ndarray
) -> tuple[dict[str, Any] | None, list[np.ndarray]]:
    """What the page tells unlike images by, and the arrays that go with it, in the order in which its script reads
    them. None where val has too few records to say what is like them.

    Args:
        held: Samples of val.
        scores: Log-probabilities (N, labels) of them.
    """
    if len(held) < FEWEST_FAMILIAR:
        return None, []
    surest = scores.max(1)
    facts: dict[str, Any] = {"centre": float(surest.mean()), "spread": float(surest.std() + 1e-6), "novelty": None}
    familiar, arrays = (surest - facts["centre"]) / facts["spread"], list[np.ndarray]()
    if (novelty := classifier.novelty.get("network")) is not None:
        familiar = familiar - novelty(view_of(model, classifier, "network", held))
        arrays = [novelty.arrays[name] for name in ("mean", "basis", "whitening", "centres", "records")]
        facts["novelty"] = {
            "centre": novelty.centre.tolist(), "spread": novelty.spread.tolist(), "weights": WEIGHTS.tolist(),
            "clip": CLIP, "features": len(arrays[0]), "dimensions": arrays[1].shape[1],
            "classes": len(arrays[3]), "records": len(arrays[4]),
        }  # fmt: skip
    return {**facts, "least": float(np.quantile(familiar, UNLIKE))}, arrays


def _layers(encoder: ImageRecogniser, column: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The steps that the page's script computes, and all weights in their order, float32."""
    layers: list[dict[str, Any]] = []
    weights: list[np.ndarray] = []

    def convolution(layer: ConvNorm) -> dict[str, Any]:
        kernel, bias = _folded(layer)
        weights.extend((kernel.ravel(), bias))
        inner = layer[0]
        assert isinstance(inner, nn.Conv2d)
        return {"into": kernel.shape[3], "from": kernel.shape[2], "stride": int(inner.stride[0])}

    for stage in encoder.trunk:
        assert isinstance(stage, nn.Sequential)
        for layer in stage:
            if isinstance(layer, ConvNorm):
                layers.append({"step": "convolution", **convolution(layer)})
            elif isinstance(layer, nn.SiLU):
                layers.append({"step": "silu"})
            elif isinstance(layer, nn.MaxPool2d):
                layers.append({"step": "pool"})
            elif isinstance(layer, ResidualBlock):
                parts = [convolution(layer.first), convolution(layer.second)]
                layers.append({"step": "residual", "parts": parts})
            else:
                raise PlaitError(f"The page cannot compute {type(layer).__name__}.")
    head = encoder.heads[encoder.columns.index(column)]
    assert isinstance(head, nn.Linear)
    weights += [head.weight.detach().float().cpu().numpy().T.ravel(), head.bias.detach().float().cpu().numpy()]
    layers.append({"step": "head", "from": head.in_features, "into": head.out_features})
    return layers, np.concatenate(weights).astype(np.float32)


def _folded(layer: ConvNorm) -> tuple[np.ndarray, np.ndarray]:
    """A convolution with its batch norm as one: kernel (3, 3, from, into), bias (into,)."""
    convolution, norm = layer[0], layer[1]
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).float().cpu()
        bias = norm.bias.float().cpu() - norm.running_mean.float().cpu() * scale
        kernel = convolution.weight.float().cpu() * scale[:, None, None, None]
    return kernel.permute(2, 3, 1, 0).contiguous().numpy(), bias.numpy()
