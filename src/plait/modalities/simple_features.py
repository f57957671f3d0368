"""Features that need no training: gradients and colours of images, the spectrum of audio clips over time.

They are what a good practitioner takes before trying a network, and the network's companion where data are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIDE = 32  # pixels to which images are reduced
CELL, STRIDE, BINS = 8, 4, 9  # of the histograms of oriented gradients
EMPTY = 1e-3  # of a bin's share, below which it hardly counts
COLOUR_GRID = 4  # places, a side, whose mean colour and spread is told
SEGMENTS, CEPSTRA = 12, 20  # of an audio clip
FLAT = 1e-3  # by which every frame counts as loud, in log-mel; a clip of one level is loud everywhere
GRID_WEIGHT = 0.5  # of what an audio clip's segments say beside what holds wherever in it something sounds
CHANGES, BEATS = (4, 16), (2, 5, 10, 20, 40)  # frames over which cepstra change, and after which loudness comes again


def image_features(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Images, uint8 (H, W, C) of one shape, to float32 (N, F): HOG on an overlapping grid (Dalal and Triggs, 2005),
    mean and spread of colours on a coarse grid, a histogram of colours."""
    parts = [_image_chunk(np.stack(samples[at : at + 512])) for at in range(0, len(samples), 512)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _image_chunk(pixels: np.ndarray) -> np.ndarray:
    sums, brightest = _reduced(pixels)
    return np.concatenate([_oriented_gradients(sums, brightest), _colours(sums / brightest)], 1)


def _reduced(pixels: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(N, H, W, C) to at most SIDE pixels a side: sums over whole blocks, and the largest that there can be.

    Sums of bytes are exact, so that equal gradients are equal, and the same one is taken, wherever this is computed.
    """
    block = max(min(pixels.shape[1:3]) // SIDE, 1)
    height, width = (size // block * block for size in pixels.shape[1:3])
    cut = pixels[:, :height, :width].astype(np.float32)
    sums = cut.reshape(len(cut), height // block, block, width // block, block, -1).sum((2, 4))
    return sums, np.float32(255 * block**2)


def _oriented_gradients(values: np.ndarray, brightest: np.float32) -> np.ndarray:
    """(N, H, W, C) from 0 to `brightest` to (N, places * BINS): gradients of the channel in which they are strongest,
    by direction."""
    down, right = np.gradient(values, axis=(1, 2))
    strongest = (down * down + right * right).argmax(-1)[..., None]
    down, right = (np.take_along_axis(one, strongest, -1)[..., 0] for one in (down, right))
    size = np.sqrt(down * down + right * right) / brightest
    turn = (np.arctan2(down, right) % math.pi) * (BINS / math.pi)
    low, share = np.floor(turn).astype(int) % BINS, turn % 1
    planes = np.zeros((*size.shape, BINS), np.float32)
    np.put_along_axis(planes, low[..., None], (size * (1 - share))[..., None], -1)
    upper = np.zeros_like(planes)
    np.put_along_axis(upper, ((low + 1) % BINS)[..., None], (size * share)[..., None], -1)
    sums = np.pad((planes + upper).cumsum(1, np.float64).cumsum(2), ((0, 0), (1, 0), (1, 0), (0, 0)))
    cell = min(CELL, *size.shape[1:])
    tops, lefts = (np.arange(0, extent - cell + 1, STRIDE) for extent in size.shape[1:])
    a, b = tops[:, None], lefts[None, :]
    cells = sums[:, a + cell, b + cell] - sums[:, a, b + cell] - sums[:, a + cell, b] + sums[:, a, b]
    cells = cells.clip(0)  # differences of sums are not exact
    for _ in range(2):  # normed, cut and normed again
        cells = np.minimum(cells / (np.linalg.norm(cells, axis=-1, keepdims=True) + 0.05), 0.4)
    # A root is infinitely steep at nothing: what rounding leaves in an empty bin would count.
    return (np.sqrt(cells + EMPTY) - math.sqrt(EMPTY)).reshape(len(values), -1).astype(np.float32)


def _colours(values: np.ndarray) -> np.ndarray:
    """(N, H, W, C) to mean and spread on a grid, and for colour images a histogram of 4 x 4 x 4 colours."""
    rows, columns = (np.array_split(np.arange(extent), COLOUR_GRID) for extent in values.shape[1:3])
    places = [values[:, r[0] : r[-1] + 1, c[0] : c[-1] + 1] for r in rows for c in columns if len(r) and len(c)]
    statistics = [part.mean((1, 2)) for part in places] + [part.std((1, 2)) for part in places]
    if values.shape[-1] == 3:
        codes = (values * 3.999).astype(int) @ np.array([16, 4, 1])
        counts = np.stack([np.bincount(row.ravel(), minlength=64) for row in codes])
        statistics.append(np.sqrt(counts / codes[0].size))
    return np.concatenate(statistics, 1).astype(np.float32)


def audio_features(samples: Sequence[np.ndarray], bands: int) -> np.ndarray:
    """Log-mel clips (T, at least `bands`) to float32 (N, F).

    First cepstra in twelve equal segments of each clip, without its mean spectrum, which is the microphone's: what
    words are told by. Then what holds wherever in a clip something sounds, as rain and barking are told by: means,
    spreads, extremes and changes of cepstra, their mean weighted by how loud it is, how loudness moves and comes again,
    and the length.
    """
    places = np.arange(bands) + 0.5
    basis = np.cos(math.pi / bands * np.outer(places, np.arange(CEPSTRA))) / math.sqrt(bands)
    rows = []
    for sample in samples:
        values = np.asarray(sample[:, :bands], np.float32)
        cepstra = values @ basis
        centred = cepstra - cepstra.mean(0)
        edges = np.linspace(0, len(centred), SEGMENTS + 1)
        starts = np.minimum(np.floor(edges[:-1]).astype(int), len(centred) - 1)
        stops = np.maximum(np.ceil(edges[1:]).astype(int), starts + 1)
        grid = [centred[a:b].mean(0) for a, b in zip(starts, stops, strict=True)]
        level = values.mean(1)
        above = np.maximum(level - level.mean(), 0) + FLAT
        loud = above @ cepstra / above.sum()
        rest = [*_steady(cepstra), loud, *_loudness(level), [math.log(len(sample))]]
        rows.append(np.concatenate([*grid, *rest]))
    return np.array(rows, np.float32)


def audio_weights(count: int) -> np.ndarray:
    """How much each of so many features of audio counts, (F,): those of segments less than the others."""
    weights = np.ones(count, np.float32)
    weights[: SEGMENTS * CEPSTRA] = GRID_WEIGHT
    return weights


def _steady(cepstra: np.ndarray) -> list[np.ndarray]:
    """Of cepstra (T, C) means, spreads, extremes, skewness and changes, each (C,)."""
    mean = cepstra.mean(0)
    skewness = np.cbrt(((cepstra - mean) ** 3).mean(0))
    changes = [_moved(cepstra, frames) for frames in (1, *CHANGES)]
    return [mean, cepstra.std(0), cepstra.max(0), cepstra.min(0), skewness, *changes]


def _moved(values: np.ndarray, frames: int) -> np.ndarray:
    """The mean absolute change over so many frames, zero in a shorter clip."""
    if len(values) <= frames:
        return np.zeros(values.shape[1])
    moved: np.ndarray = np.abs(values[frames:] - values[:-frames]).mean(0)
    return moved


def _loudness(level: np.ndarray) -> list[np.ndarray]:
    """Of a clip's loudness (T,): extremes, spread, and how much it is like itself some frames later."""
    spread = level.std()
    unit = (level - level.mean()) / (spread + 1e-3)
    again = [float((unit[n:] * unit[:-n]).mean()) if len(unit) > n else 0.0 for n in BEATS]
    return [np.array([level.max(), level.min(), spread, *again])]
