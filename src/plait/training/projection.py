"""Where a new projection begins that shows images to a language model: each image as the words that are said of it.

A frozen encoder's features and a language model's embeddings know nothing of each other. To find out by gradient
descent what the one means to the other takes thousands of steps (Liu et al., "Visual Instruction Tuning", 2023, align
on 595,000 pairs). A ridge regression from an image's features to the mean embedding of its words, the rarer ones
counting more, is there in seconds: the model then reads an image as it reads a blend of words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.modalities.base import MediaModality
from plait.modalities.image import HFImageEncoder
from plait.model.multimodal import Multimodal, TokenEmbedding
from plait.training.split import Split

SAMPLES = 2000  # images that it is fitted by, at most
BATCH = 32  # images that are read at a time
FEWEST = 100  # images that say anything
BLOCK, HELD_OUT = 20, 5  # every fifth block of so many chooses the penalty
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # times the mean eigenvalue of the features' Gram matrix
RARE = 3  # a token in fewer texts than this says nothing of others
LEAST = 0.05  # mean cosine on what was held out below which the features say nothing of the words
SPREAD_OF = 20_000  # rows of the table, whose standard deviation is that of embeddings
UNIT = 3**-0.5  # standard deviation of what a linear layer makes of normed features when it is new


@dataclass
class Seen:
    """What an encoder's projection reads of N images, each at G places: F features, normed but for scale and offset."""

    means: Tensor  # (N, F) over the places of each image
    some: Tensor  # (n, G, F) of the first images
    mean: Tensor  # (F,) over all places
    deviation: Tensor  # (F,)


@dataclass
class Fit:
    """A ridge regression."""

    weight: Tensor  # (D, F)
    cosine: float  # of what it says of held-out images and their words, on the mean


def begin_projections(model: Multimodal, split: Split, progress: Callable[[int, int], None]) -> list[str]:
    """Fit the projections of frozen image encoders to the model's own embeddings of the texts beside the images.

    Args:
        model: One that has been extended from a language model, with an encoder that it did not have before.
        split: What it is to learn from. All texts of a record count, whatever column they are of.
        progress: Called with the images that have been read, and how many there are.

    Returns:
        What is to be told.
    """
    lines = []
    for name, modality in model.media.items():
        encoder = modality.encoder
        if not isinstance(encoder, HFImageEncoder) or not encoder.hf_encoder.frozen:
            continue
        places = _places(split, [column for column in split.media if model.vocabulary.columns.get(column) == name])
        if len(places) < FEWEST:
            continue
        seen = _see(modality, encoder, [split.sample(column, record) for column, record in places], progress)
        words = mean_embeddings([_ids(split, record) for _, record in places], model.token_embedding)
        fitted = fit_ridge((seen.means - seen.mean) / seen.deviation, words)
        if fitted.cosine < LEAST:
            continue
        _begin(encoder, seen, fitted.weight, float(_rows(model.token_embedding)[:SPREAD_OF].float().std()))
        lines.append(f"{name}: begins as the words of {len(places):,} records (cosine {fitted.cosine:.2f})")
    return lines


def _places(split: Split, columns: list[str]) -> list[tuple[str, int]]:
    """Columns and records that hold an image beside a text, evenly spaced, SAMPLES at most."""
    texts = np.zeros(len(split), bool)
    for name in split.texts:
        texts |= split.present(name)
    both = [(column, int(record)) for column in columns for record in np.flatnonzero(texts & split.present(column))]
    return [both[i] for i in np.linspace(0, len(both) - 1, min(SAMPLES, len(both))).astype(int)]


def _ids(split: Split, record: int) -> list[int]:
    """The tokens of all texts of a record."""
    return [id for tokens in split.texts.values() for id in tokens[record] or []]


@torch.no_grad()
def _see(
    modality: MediaModality, encoder: HFImageEncoder, samples: list[np.ndarray], progress: Callable[[int, int], None]
) -> Seen:
    """Features of images, one of each sample."""
    means, total, squares, some = [], torch.zeros(()), torch.zeros(()), None
    for start in range(0, len(samples), BATCH):
        values, _ = modality.batch(samples[start : start + BATCH])
        features = encoder.features(values.to(encoder.places.device)).cpu()  # (B, G, F)
        features = F.layer_norm(features, features.shape[-1:])
        means.append(features.mean(1))
        total, squares = total + features.mean(1).sum(0), squares + features.square().mean(1).sum(0)
        some = features if some is None else some
        progress(min(start + BATCH, len(samples)), len(samples))
    assert some is not None
    mean = total / len(samples)
    return Seen(torch.cat(means), some, mean, (squares / len(samples) - mean.square()).clamp(min=0).sqrt() + 1e-5)


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
    """The ridge regression of targets (N, D) on features (N, F), both centred, with the penalty of PENALTIES that is
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
def _begin(encoder: HFImageEncoder, seen: Seen, weight: Tensor, spread: float) -> None:
    """Give the encoder a projection that standardises features and whose output spreads as embeddings do. Its weights
    are of the size that a new layer's have, for the sake of the learning rate."""
    unit = UNIT / float(((seen.some - seen.mean) / seen.deviation @ weight.T).std())
    encoder.norm.weight.copy_(1 / seen.deviation)
    encoder.norm.bias.copy_(-seen.mean / seen.deviation)
    encoder.out.weight.copy_(weight * unit)
    encoder.out.bias.zero_()
    encoder.places.zero_()
    encoder.gain.fill_(spread / UNIT)
