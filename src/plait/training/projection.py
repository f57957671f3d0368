"""Where a new projection begins that shows images to a language model: each image as the words that are said of it.

A frozen encoder's features and a language model's embeddings know nothing of each other. To find out by gradient
descent what the one means to the other takes thousands of steps (Liu et al., "Visual Instruction Tuning", 2023, align
on 595,000 pairs). A ridge regression from an image's features to the mean embedding of its words, the rarer ones
counting more, is there in seconds: the model then reads an image as it reads a blend of words.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.modalities.image import HFImageEncoder
from plait.model.multimodal import Multimodal, TokenEmbedding
from plait.training.split import Split

SAMPLES = 2000  # images that it is fitted by, at most
FEWEST = 100  # images that say anything
BLOCK, HELD_OUT = 20, 5  # every fifth block of so many chooses the penalty
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # times the mean eigenvalue of the features' Gram matrix
RARE = 3  # a token in fewer texts than this says nothing of others
LEAST = 0.05  # mean cosine on what was held out below which the features say nothing of the words
SPREAD_OF = 20_000  # rows of the table, whose standard deviation is that of embeddings
UNIT = 3**-0.5  # standard deviation of what a linear layer makes of normed features when it is new


@dataclass
class Fit:
    """A ridge regression."""

    weight: Tensor  # (D, H)
    cosine: float  # of what it says of held-out images and their words, on the mean


def begin_projections(model: Multimodal, split: Split) -> list[str]:
    """Fit the projections of frozen image encoders to the model's own embeddings of the texts beside the images.

    Args:
        model: One that has been extended from a language model, with an encoder that it did not have before.
        split: What it is to learn from.

    Returns:
        What is to be told.
    """
    lines = []
    for column, modality in model.vocabulary.columns.items():
        encoder = model.media[modality].encoder if modality in model.media else None
        if not isinstance(encoder, HFImageEncoder) or not encoder.hf_encoder.frozen or column not in split.media:
            continue
        records = _records(split, column)
        if len(records) < FEWEST:
            continue
        features = torch.cat([_features(encoder, split.sample(column, record)) for record in records])  # (N, G, H)
        words = mean_embeddings([_ids(split, record) for record in records], model.token_embedding)
        mean, deviation = features.mean((0, 1)), features.std((0, 1)) + 1e-5
        features = (features - mean) / deviation
        fitted = fit_ridge(features.mean(1), words)
        if fitted.cosine < LEAST:
            continue
        unit = UNIT / float((features @ fitted.weight.T).std())
        spread = float(_rows(model.token_embedding)[:SPREAD_OF].float().std())
        _begin(encoder, mean, deviation, fitted.weight * unit, spread)
        lines.append(f"{column}: begins as the words of {len(records):,} records (cosine {fitted.cosine:.2f})")
    return lines


def _records(split: Split, column: str) -> list[int]:
    """Records with an image and a text, evenly spaced, SAMPLES at most."""
    texts = np.zeros(len(split), bool)
    for name in split.texts:
        texts |= split.present(name)
    both = np.flatnonzero(texts & split.present(column))
    return [int(both[i]) for i in np.linspace(0, len(both) - 1, min(SAMPLES, len(both))).astype(int)]


def _ids(split: Split, record: int) -> list[int]:
    """The tokens of all texts of a record."""
    return [id for tokens in split.texts.values() for id in tokens[record] or []]


@torch.no_grad()
def _features(encoder: HFImageEncoder, sample: np.ndarray) -> Tensor:
    """What the projection reads of an image, (1, grid * grid, H), normed but for scale and offset."""
    places = encoder.places.device
    features = encoder.features(torch.tensor(np.asarray(sample))[None].to(places))
    return F.layer_norm(features, features.shape[-1:]).cpu()


def mean_embeddings(texts: list[list[int]], embedding: TokenEmbedding) -> Tensor:
    """(N, D): the mean embedding of the tokens of each text, weighted by their inverse document frequency, without what
    all texts have in common."""
    counts = Counter(id for ids in texts for id in set(ids))
    rows = _rows(embedding)
    means = torch.zeros(len(texts), rows.shape[1])
    for place, ids in enumerate(texts):
        said = sorted({id for id in ids if counts[id] >= RARE})
        weights = torch.tensor([math.log(len(texts) / counts[id]) for id in said])
        if said and float(weights.sum()) > 0:
            means[place] = (weights / weights.sum()) @ rows[said].float().cpu()
    return means - means.mean(0)


def _rows(embedding: TokenEmbedding) -> Tensor:
    """The embeddings of text ids, (V, D) or more rows."""
    return (embedding.free if embedding.text_rows is None else embedding.text_rows).detach()


def fit_ridge(features: Tensor, targets: Tensor) -> Fit:
    """The ridge regression of targets (N, D) on features (N, H), both centred, with the penalty of PENALTIES that is
    best on blocks of held-out samples: neighbours may be of one image. In its dual form, since samples are fewer than
    features."""
    held_out = torch.arange(len(features)) // BLOCK % HELD_OUT == HELD_OUT - 1
    learnt = ~held_out
    values, vectors, unit = _spectrum(features[learnt])
    rotated = vectors.T @ targets[learnt]
    across = features[held_out] @ features[learnt].T @ vectors
    cosines = {}
    for penalty in PENALTIES:
        said = across @ (rotated / (values + penalty * unit)[:, None])
        cosines[penalty] = float(F.cosine_similarity(said, targets[held_out]).mean())
    best = max(cosines, key=lambda penalty: cosines[penalty])
    values, vectors, unit = _spectrum(features)
    dual = vectors @ ((vectors.T @ targets) / (values + best * unit)[:, None])  # (N, D)
    return Fit(dual.T @ features, cosines[best])


def _spectrum(features: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (N,), eigenvectors (N, N) and the mean eigenvalue of the features' Gram matrix."""
    values, vectors = torch.linalg.eigh(features @ features.T)
    return values.clamp(min=0), vectors, float(values.clamp(min=0).mean())


@torch.no_grad()
def _begin(encoder: HFImageEncoder, mean: Tensor, deviation: Tensor, weight: Tensor, spread: float) -> None:
    """Give the encoder a projection that standardises features and whose output spreads as embeddings do. Its weights
    are of the size that a new layer's have, for the sake of the learning rate."""
    encoder.norm.weight.copy_(1 / deviation)
    encoder.norm.bias.copy_(-mean / deviation)
    encoder.out.weight.copy_(weight)
    encoder.out.bias.zero_()
    encoder.places.zero_()
    encoder.gain.fill_(spread / UNIT)
