"""Occlusion, integrated gradients and the logit lens, each with the checks that say whether to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from plait.core.device import exact_products
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.explain.parts import CodesQuestion, Grid, Part, Question, Value, Words, unmasked

METHODS = ("occlusion", "integrated-gradients", "logit-lens")
STEPS = 64  # of the path that gradients are taken along, times four until the weights add up
MOST = 1024  # of them
POINTS = 12  # of a deletion or insertion curve
RANDOMS = 10  # maps that a map is held against
GAP = 0.05  # of completeness, above which it is warned about


@dataclass
class Areas:
    """Areas under the curves of the answer's probability as units go, the weightiest first, and as they come."""

    deletion: float  # small where what was marked mattered
    insertion: float  # large
    random_deletion: list[float]
    random_insertion: list[float]

    @property
    def random_maps_beaten(self) -> int:
        """How many random maps do worse, by insertion less deletion."""
        own_gap = self.insertion - self.deletion
        pairs = zip(self.random_deletion, self.random_insertion, strict=True)
        return sum(insertion - deletion < own_gap for deletion, insertion in pairs)


@dataclass
class Explanation:
    """How much each part of an input moved an answer."""

    method: str
    answer: str
    measure: str  # what weights are differences of, in nats but for "similarity"
    score: float  # of the whole input
    chance: float
    parts: Sequence[Part]
    weights: list[np.ndarray]  # (units,) by part: positive where a unit speaks for the answer
    lost: dict[str, float] = field(default_factory=dict)  # score lost when a whole part is left out, of several
    areas: Areas | None = None
    steps: int = 0  # of integrated gradients
    gap: float | None = None  # |sum of weights - difference explained| / |difference explained|
    written: Grid | None = None  # what was made, where that is the answer
    regions: np.ndarray | None = None  # (words, cells of its codes) log-likelihood lost without each word
    region_words: list[str] = field(default_factory=list)
    region_grid: tuple[int, int] = (0, 0)
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def explain(question: Question, method: str = "occlusion", steps: int | None = None, seed: int = 0) -> Explanation:
    """Explain an answer; `steps` are those of integrated gradients, by itself as many as make the weights add up;
    `seed` draws the random maps.

    Raises PlaitError for an unknown method, or where it means nothing for this model and input.
    """
    if method not in METHODS:
        raise PlaitError(f"There is no method '{method}'. Methods are {', '.join(METHODS)}.")
    parts = question.parts
    score = float(question.scores([unmasked(parts)])[0])
    chance = float(question.chances(np.array([score]))[0])
    explanation = Explanation(method, question.answer, question.measure, score, chance, parts, [])
    if method == "logit-lens":
        explanation.layers = question.layers()
        return explanation
    if method == "integrated-gradients":
        explanation.weights, explanation.gap, explanation.steps = adding_up(question, steps)
        if explanation.gap > GAP:
            explanation.warnings.append(
                f"The weights miss {explanation.gap:.0%} of the difference that they should add up to: raise the steps."
            )
    else:
        explanation.weights = occlusion(question, score, explanation)
    if len(parts) > 1:
        without = [
            [None if i == gone else value for i, value in enumerate(unmasked(parts))] for gone in range(len(parts))
        ]
        for part, rest in zip(parts, question.scores(without), strict=True):
            name, count = part.name, 2
            while name in explanation.lost:
                name, count = f"{part.name} {count}", count + 1
            explanation.lost[name] = score - float(rest)
    explanation.areas = areas(question, explanation.weights, seed)
    if sum(part.count for part in parts) < 3:
        explanation.warnings.append("There are fewer than three units, which no order can tell from a random one.")
    elif explanation.areas.random_maps_beaten < RANDOMS - 1:
        explanation.warnings.append(
            f"No better than random: {RANDOMS - explanation.areas.random_maps_beaten} of {RANDOMS} random maps do as "
            "well by "
            "deletion and insertion. Do not trust it."
        )
    return explanation


def _inputs(parts: Sequence[Part], keep: np.ndarray) -> list[list[Value]]:
    """The parts with only the units that each row of keep (N, units of all parts) has."""
    cuts = np.cumsum([part.count for part in parts])[:-1]
    return [[part.kept(k) for part, k in zip(parts, np.split(row, cuts), strict=True)] for row in keep]


def occlusion(
    question: Question, score: float | None = None, explanation: Explanation | None = None
) -> list[np.ndarray]:
    """What of the score is lost when units are taken away, by part: a unit's weight is the mean over the sets of
    units that it is taken away with (Zeiler and Fergus, 2014). Notes in `explanation` what was made depends on."""
    parts = question.parts
    score = float(question.scores([unmasked(parts)])[0]) if score is None else score
    total = sum(part.count for part in parts)
    weights, start, keeps = [], 0, []
    for part in parts:
        gone = part.occluders()
        keep = np.ones((len(gone), total), bool)
        keep[:, start : start + part.count] = ~gone
        keeps.append(keep)
        start += part.count
    inputs = _inputs(parts, np.concatenate(keeps))
    drops = score - question.scores(inputs)
    for part, lost in zip(parts, np.split(drops, np.cumsum([len(keep) for keep in keeps])[:-1]), strict=True):
        gone = part.occluders().astype(float)
        weights.append(gone.T @ lost / gone.sum(0))
    if explanation is not None and hasattr(question, "by_code"):
        _regions(cast(CodesQuestion, question), explanation, inputs)
    return weights


def _regions(question: CodesQuestion, explanation: Explanation, inputs: list[list[Value]]) -> None:
    """Which cells of what was made lose likelihood without each word."""
    rows, start = [], 0
    for part in question.parts:
        count = len(part.occluders())
        if isinstance(part, Words):
            rows += inputs[start : start + count]
            explanation.region_words += [word.strip() for word in part.words]
        start += count
    if not rows:
        return
    codes = question.by_code([unmasked(question.parts), *rows])
    drops = codes[0] - codes[1:]
    explanation.written = question.written
    explanation.region_grid, shares = question.shown()
    explanation.regions = drops @ shares


def integrated_gradients(question: Question, steps: int = STEPS) -> tuple[list[np.ndarray], float]:
    """Weights by part, and the completeness gap (Sundararajan, Taly and Yan, 2017), with captum.

    The path leads from the parts with nothing in them: regions as `removed` has them, words as the model's padding.
    Raises PlaitError where captum is missing or the question has no gradients.
    """
    captum = import_extra("captum.attr", "explain", "The method integrated-gradients")
    if steps < 2:
        raise PlaitError(f"Integrated gradients need at least 2 steps, not {steps}.")
    path = question.path()
    device = path.inputs[0].device
    with exact_products(device), torch.enable_grad():
        grads = captum.IntegratedGradients(path.score).attribute(
            path.inputs, path.baseline, n_steps=steps, internal_batch_size=min(steps, 32)
        )
    with exact_products(device), torch.no_grad():
        explained = float(path.score(*path.inputs)[0] - path.score(*path.baseline)[0])
    worth = [grad[0].detach().double().cpu().numpy() for grad in grads]
    gap = abs(sum(float(w.sum()) for w in worth) - explained) / max(abs(explained), 1e-9)
    return path.by_unit(worth), gap


def adding_up(question: Question, steps: int | None = None) -> tuple[list[np.ndarray], float, int]:
    """Integrated gradients at so many steps, or at as many as make the gap close, up to `MOST`; and how many."""
    taken = steps or STEPS
    weights, gap = integrated_gradients(question, taken)
    while steps is None and gap > GAP and taken < MOST:
        taken *= 4
        weights, gap = integrated_gradients(question, taken)
    return weights, gap, taken


def areas(question: Question, weights: list[np.ndarray], seed: int = 0, randoms: int = RANDOMS) -> Areas:
    """Deletion and insertion (Petsiuk, Das and Saenko, 2018) of a map, beside those of random maps."""
    flat = np.concatenate(weights)
    rng = np.random.default_rng(seed)
    orders = [np.argsort(-flat, kind="stable"), *(rng.permutation(len(flat)) for _ in range(randoms))]
    counts = np.unique(np.linspace(0, len(flat), POINTS + 1).round().astype(int))
    ranks = np.array([np.argsort(order) for order in orders])  # the place of each unit in each order
    gone = ranks[:, None] < counts[:, None]  # (orders, points, units)
    keep = np.concatenate((~gone, gone)).reshape(-1, len(flat))
    distinct, back = np.unique(keep, axis=0, return_inverse=True)
    curves = question.chances(question.scores(_inputs(question.parts, distinct)))[back.ravel()]
    area_values = np.trapezoid(curves.reshape(2, len(orders), len(counts)), counts / len(flat), axis=-1)
    deletion, insertion = area_values.tolist()
    return Areas(deletion[0], insertion[0], deletion[1:], insertion[1:])
