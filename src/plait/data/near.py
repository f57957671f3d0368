"""Near-duplicates: which images, audio clips or texts are one thing twice, from their fingerprints.

Two steps each. Candidates come from sorting short codes several ways and comparing neighbours, which takes time in
proportion to n log n. Then each pair of candidates is laid over one another and compared in full. All sums that decide
are over integers, so that the answer does not depend on threads or on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from plait.data.fingerprints import PERMUTATIONS
from plait.modalities.audio_files import BANDS
from plait.modalities.descriptor import Comparison
from plait.modalities.image_files import CHROMA, PRINT
from plait.modalities.image_files import PRINT_SIDE as SIDE

IMAGES, AUDIO, TEXTS = 0.1, 0.16, 0.25  # distances up to which two are near-duplicates
_TABLES, _WINDOW = 16, 4  # orders in which codes are sorted, and places that are compared in each
_BITS = 13  # of 64 that may differ between candidates
_NEAREST, _FEW = 8, 64  # candidates of one thing; things of which all pairs are candidates
_CROWD = 4  # others that may lie within twice the distance of a copy
_LONG = 18  # frames of an audio clip that tell it well
_INDEXED = 6  # parts of an image that are in the index
_BAND = 4  # places of a text's sketch that must agree for a candidate
_PLACES = [(1, 1), (0, 0), (0, 2), (2, 0), (2, 2), (0, 1), (1, 0), (1, 2), (2, 1)]  # of a part in the whole

_MIDDLE = 1 << 16  # images by whose medians codes are cut
_AT_A_TIME = 4096  # pairs of texts, of which both sketches are in memory: 4 MB
MOST_TEXTS = 16_000_000

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # first and second number, first < second; distance
NO_PAIRS: Pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


class Fingerprints(Sequence[bytes]):
    """Fingerprints on disk, one after another; no more of them is in memory than is looked at."""

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.offsets = offsets
        self.flat = np.memmap(path, np.uint8, "r") if offsets[-1] else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: Any) -> Any:
        return self.flat[self.offsets[place] : self.offsets[place + 1]].tobytes()

    def there(self) -> np.ndarray:
        """The places of those that are not empty."""
        return np.flatnonzero(np.diff(self.offsets))

    def matrix(self, dtype: str, width: int) -> np.ndarray:
        """Those that are not empty, which have one length, as rows (N, width)."""
        return self.flat.view(dtype).reshape(-1, width)


def _candidates(keys: Iterable[np.ndarray], codes: np.ndarray, owner: np.ndarray, window: int) -> np.ndarray:
    """Pairs of owners (P, 2), ascending and distinct: of entries that stand within `window` places of one another in
    the order of one of the keys (M,), and whose codes (M,) differ in few bits; of each owner the nearest few.

    An owner's first entry is its whole; of two entries one must be a whole. Owners count from 0, wholes come first.
    Of few owners all pairs are candidates.
    """
    count = int(owner.max()) + 1
    if count <= _FEW:
        return np.stack(np.triu_indices(count, 1), 1)
    candidates: list[np.ndarray] = []
    for key in keys:
        order = np.argsort(key, kind="stable")
        for step in range(1, min(window, len(order) - 1) + 1):
            left, right = order[:-step], order[step:]
            bits = np.bitwise_count(codes[left] ^ codes[right]).astype(np.int64)
            keep = (bits <= _BITS) & (owner[left] != owner[right]) & ((left < count) | (right < count))
            a, b = owner[left[keep]], owner[right[keep]]
            candidates.append((np.minimum(a, b) * count + np.maximum(a, b)) * 64 + bits[keep])
        candidates = [np.unique(np.concatenate(candidates))]
    pairs, bits = candidates[0] // 64, candidates[0] % 64
    pairs, first = np.unique(pairs, return_index=True)  # the least number of bits comes first
    ends = np.stack([pairs // count, pairs % count], 1)
    near = np.zeros(len(ends), bool)
    for side in (0, 1):
        order = np.lexsort((ends[:, 1 - side], bits[first], ends[:, side]))
        rank = np.arange(len(order)) - np.searchsorted(ends[order, side], ends[order, side])
        near[order[rank < _NEAREST]] = True
    return ends[near]


# --- images ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _windows() -> list[np.ndarray]:
    """Parts of an image that a cut may leave, as matrices (576, 576) that resample it: all of it, nine places of 95 %
    of each side, the middle 90 %. The first six are in the index."""

    def resample(size: float, start: float) -> np.ndarray:
        at = (np.arange(SIDE) + 0.5) * size + start * SIDE - 0.5
        at = np.clip(at, 0, SIDE - 1)
        low = np.minimum(at.astype(int), SIDE - 2)
        matrix = np.zeros((SIDE, SIDE), np.float32)
        matrix[np.arange(SIDE), low] = 1 - (at - low)
        matrix[np.arange(SIDE), low + 1] = at - low
        return matrix

    parts = [(1.0, 0.0, 0.0), *((0.95, 0.025 * y, 0.025 * x) for y, x in _PLACES), (0.9, 0.05, 0.05)]
    return [np.kron(resample(size, top), resample(size, left)).T for size, top, left in parts]


def _cosines(side: int, count: int) -> np.ndarray:
    """The first `count` waves of a two-dimensional cosine transform by frequency, (side * side, count)."""
    waves = np.cos(np.pi * np.outer(np.arange(side), np.arange(side) + 0.5) / side)
    order = sorted(product(range(side), range(side)), key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    return np.stack([np.outer(waves[y], waves[x]).ravel() for y, x in order[:count]], 1)


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]


def _shuffled(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Codes (M,) as sort keys, in several orders of their bits."""
    rng = np.random.Generator(np.random.PCG64(64))
    for _ in range(_TABLES):
        order, keys = rng.permutation(64), np.empty_like(codes)
        for start in range(0, len(codes), 1 << 16):
            part = np.ascontiguousarray(codes[start : start + (1 << 16)])
            bits = np.unpackbits(part.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
            keys[start : start + (1 << 16)] = _packed(np.ascontiguousarray(bits[:, order]))
        yield keys


def near_images(prints: np.ndarray, max_distance: float = IMAGES) -> Pairs:
    """Pairs among images, `prints` (N, 704) uint8, whose distance is at most `max_distance`.

    The distance is the mean square of what differs over that of what is in the images, the smaller of the two laid
    on the best-fitting part of the other.
    """
    count = len(prints)
    waves = _cosines(SIDE, 48)
    tint = np.rint(1000 * _cosines(CHROMA, 8))

    # Integers below 2**53 in float64: exact in any order of summation.
    parts = [np.rint(1000 * (part.astype(np.float64) @ waves)) for part in _windows()[:_INDEXED]]

    def projected(rows: np.ndarray, part: np.ndarray) -> np.ndarray:
        """(n, 64): a part's brightness, and the colours of the whole."""
        values = rows.astype(np.float64)
        chosen = values[:, : SIDE * SIDE] @ part
        return np.concatenate((chosen, *(values[:, at : at + 64] @ tint for at in (SIDE * SIDE, SIDE * SIDE + 64))), 1)

    sample = prints[np.unique(np.linspace(0, count - 1, min(count, _MIDDLE)).astype(np.int64))]
    blocks = [projected(sample[start : start + 4096], parts[0]) for start in range(0, len(sample), 4096)]
    middle = np.median(np.concatenate(blocks), axis=0)
    codes = np.empty((_INDEXED, count), np.uint64)
    for start in range(0, count, 4096):
        for n, part in enumerate(parts):
            codes[n, start : start + 4096] = _packed(projected(prints[start : start + 4096], part) > middle)
    flat = codes.reshape(-1)
    owner = np.tile(np.arange(count, dtype=np.int64), len(codes))
    pairs = _candidates(_shuffled(flat), flat, owner, _WINDOW)
    return _distinct(pairs, _image_distances(prints, pairs), count, max_distance)


def _image_distances(prints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Distances (P,) float32 of pairs (P, 2). Each image's parts are made once."""
    split = SIDE * SIDE
    parts = np.stack(_windows()).transpose(1, 0, 2).reshape(split, -1)
    cut, whole_images = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]])
    order = np.argsort(cut, kind="stable")
    least = np.zeros(len(cut), np.float32)
    borders = np.searchsorted(cut[order], np.arange(0, len(prints) + 512, 512))
    for start, stop in pairwise(borders):
        for at in range(start, stop, 4096):
            rows = order[at : min(at + 4096, stop)]
            cut_images, place = np.unique(cut[rows], return_inverse=True)
            images_in_parts = (prints[cut_images, :split].astype(np.float32) @ parts).reshape(
                len(cut_images), -1, split
            )
            other = prints[whole_images[rows], :split].astype(np.float32)
            squares = (images_in_parts**2).sum(2)[place] + (other**2).sum(1)[:, None]
            least[rows] = (squares - 2 * np.einsum("pwk,pk->pw", images_in_parts[place], other, optimize=True)).min(
                1
            ) / split
    luma = np.minimum(least[: len(pairs)], least[len(pairs) :])
    spread = np.zeros(len(prints), np.float32)
    for at in range(0, len(prints), 4096):
        rows = prints[at : at + 4096]
        spread[at : at + 4096] = rows[:, :split].astype(np.float32).var(1)
        spread[at : at + 4096] += rows[:, split:].reshape(len(rows), 2, -1).astype(np.float32).var(2).mean(1)
    tint = np.zeros(len(pairs), np.float32)
    for at in range(0, len(pairs), 4096):
        a, b = (prints[pairs[at : at + 4096, n], split:].astype(np.float32) for n in (0, 1))
        tint[at : at + 4096] = ((a - b) ** 2).mean(1)
    return (luma + tint) / ((spread[pairs[:, 0]] + spread[pairs[:, 1]]) / 2 + 16.0)


def _distinct(pairs: np.ndarray, distance: np.ndarray, count: int, max_distance: float) -> Pairs:
    """The pairs that are near, and nearer than what is usual where they lie: where more than a few others are within
    twice the distance of one of the two, likeness is what the data are like, and no sign of a copy."""
    both = np.concatenate([pairs[:, 0], pairs[:, 1]])
    far = np.concatenate([distance, distance])
    order = np.lexsort((far, both))
    both, far = both[order], far[order]
    keep = np.flatnonzero(distance <= max_distance)
    # Neighbours of each end within twice the distance, by binary search in one sorted key.
    key = both.astype(np.float64) * 8 + np.minimum(far, 7.9)
    first = np.searchsorted(both, pairs[keep])
    within = np.searchsorted(key, pairs[keep] * 8.0 + np.minimum(2 * distance[keep], 7.9)[:, None], "right")
    keep = keep[(distance[keep] <= max_distance / 10) | ((within - first).max(1) <= _CROWD)]
    return pairs[keep, 0], pairs[keep, 1], distance[keep]


# --- audio ------------------------------------------------------------------------------------------------------


def _audio_features(spectrogram: np.ndarray) -> np.ndarray:
    """What does not change where an audio clip begins later: its bands' levels and how they go together and follow,
    int64."""
    values = spectrogram.astype(np.int64)
    low = values.reshape(len(values), 8, BANDS // 8).sum(2)
    features = [values.reshape(len(values), 16, BANDS // 16).sum((0, 2)) * 512 // len(values)]
    centred = low * len(low) - low.sum(0)
    upper = np.triu_indices(8)
    spread = max(len(low) ** 3, 1)
    for lag in (0, 3, 8):
        a, b = centred[: max(len(low) - lag, 0)], centred[lag:]
        together = a.T @ b
        features.append(together[upper] // (spread // 64 + 1) if lag == 0 else together.ravel() // (spread // 64 + 1))
    return np.concatenate(features)


def near_audio(prints: Sequence[bytes], max_distance: float = AUDIO) -> Pairs:
    """Pairs among clips, spectrograms (frames, 64) uint8 as bytes, whose distance is at most `max_distance`: one minus
    the correlation of the spectrograms' patterns at the best shift in time, 80 % of the longer one overlapping; times
    .6 s over the length of a shorter one, which tells less."""
    clips = [np.frombuffer(value, np.uint8).reshape(-1, BANDS) for value in prints]
    heard = np.array([n for n, value in enumerate(clips) if len(value) >= 4], np.int64)
    if len(heard) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    features = np.stack([_audio_features(clips[n]) for n in heard])
    rng = np.random.Generator(np.random.PCG64(65))
    scale = np.maximum(np.abs(features - np.median(features, axis=0).astype(np.int64)).mean(0).astype(np.int64), 1)
    level = np.clip((features - np.median(features, axis=0).astype(np.int64)) * 256 // scale, -1024, 1024)
    mix = rng.integers(-8, 9, (features.shape[1], 64))
    values = level.astype(np.float64) @ mix.astype(np.float64)
    bits = values > np.median(values, axis=0)
    codes = _packed(bits)
    pairs = heard[_candidates(_shuffled(codes), codes, np.arange(len(heard)), 4 * _WINDOW)]
    distance = np.array([_audio_distance(clips[a], clips[b]) for a, b in pairs], np.float32)
    return _distinct(pairs, distance, len(clips), max_distance)


def _audio_distance(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < len(second):
        first, second = second, first
    least = int(np.ceil(0.8 * len(first)))
    if len(second) < least:
        return 1.0
    a, b = first.astype(np.float32), second.astype(np.float32)
    best = 0.0
    for shift in range(least - len(b), len(a) - least + 1):
        x = a[max(shift, 0) : shift + len(b)]
        y = b[max(-shift, 0) :][: len(x)]
        x, y = _patterned(x), _patterned(y)
        best = max(best, float(np.vdot(x, y) / np.sqrt(np.vdot(x, x) * np.vdot(y, y) + 1.0)))
    return (1.0 - best) * max(1.0, _LONG / len(second))


def _patterned(values: np.ndarray) -> np.ndarray:
    """A spectrogram without what each moment and each band have throughout: loudness, and a voice's colour."""
    return values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()


# --- text -------------------------------------------------------------------------------------------------------


def near_texts(prints: np.ndarray, max_distance: float = TEXTS) -> Pairs:
    """Pairs among texts, `prints` (N, 128) uint32, whose distance is at most `max_distance`: one minus the
    estimated share of runs of five characters that two texts have in common."""
    neighbours, near = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for band in range(PERMUTATIONS // _BAND):
        keys = _band_keys(prints[:, band * _BAND : (band + 1) * _BAND])
        order = np.argsort(keys, kind="stable")
        both = [np.zeros(0, np.int64)]
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            left, right = order[:-step], order[step:]
            keep = keys[left] == keys[right]
            both.append(np.minimum(left, right)[keep] * len(prints) + np.maximum(left, right)[keep])
        new = np.setdiff1d(np.concatenate(both), neighbours)
        distance = _text_distances(prints, new)
        place = np.argsort(merged := np.concatenate((neighbours, new[distance <= max_distance])), kind="stable")
        neighbours, near = merged[place], np.concatenate((near, distance[distance <= max_distance]))[place]
    return neighbours // max(len(prints), 1), neighbours % max(len(prints), 1), near


def _band_keys(rows: np.ndarray) -> np.ndarray:
    """A hash (N,) of a few places of sketches (N, _BAND)."""
    keys = np.zeros(len(rows), np.uint64)
    with np.errstate(over="ignore"):
        for n in range(_BAND):
            keys = (keys ^ rows[:, n].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(31)
    return keys


def _text_distances(prints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Distances (P,) float32 of pairs (P,), first * N + second."""
    same = np.zeros(len(pairs), np.float64)
    for at in range(0, len(pairs), _AT_A_TIME):
        first, second = np.divmod(pairs[at : at + _AT_A_TIME], len(prints))
        same[at : at + _AT_A_TIME] = (prints[first] == prints[second]).sum(1)
    return (1 - same / PERMUTATIONS).astype(np.float32)


def _near_pixels(prints: Fingerprints) -> Pairs:
    return near_images(prints.matrix("u1", PRINT))


def _near_spectrograms(prints: Fingerprints) -> Pairs:
    return near_audio(prints)


# How each kind of fingerprint is compared.
NEAR: dict[Comparison, Callable[[Fingerprints], Pairs]] = {
    Comparison.PIXELS: _near_pixels,
    Comparison.SPECTROGRAM: _near_spectrograms,
}
# Things up to which it is done.
MOST = {Comparison.PIXELS: 2_000_000, Comparison.SPECTROGRAM: 200_000}
