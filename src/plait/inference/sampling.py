"""From logits to ids: pure functions on (B, V), every setting one number a row, so that requests share a batch.

Logits come first through `penalise`, then temperature, top-k, top-p, min-p and top-a, in the order and in the sense of
transformers. A draw inverts the distribution function at one uniform number, which is a function of the request's
seed, the sample's index and the place: so a request's result does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from plait.core.config import GenerationConfig
from plait.core.errors import PlaitError

if TYPE_CHECKING:
    from plait.inference.constrained import TextConstraint

LOWEST = float("-inf")


class SamplingOptions(TypedDict, total=False):
    """How ids are chosen, as users say it; what is left out or None is the checkpoint's default. Names and meanings are
    those of transformers, but for `top_a`."""

    do_sample: bool | None  # None: where a setting of sampling is given, several results are asked for, or for media
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_a: float | None  # ids whose probability is at least this times the square of the greatest
    repetition_penalty: float | None


class Options(SamplingOptions, total=False):
    """What every verb that generates takes."""

    guidance: float | None  # 1 is none; None is the checkpoint's default for the modality
    seed: int
    max_new_tokens: int | None
    stop: str | list[str] | None
    constraint: TextConstraint | None  # of texts; `PlaitModel.constraint` compiles one


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen. `top_k` 0, `top_p` 1, `min_p` 0, `top_a` 0 and `repetition_penalty` 1 do nothing."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_a: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = ""
        if not self.greedy and not self.temperature > 0:
            wrong = f"temperature must be above 0, not {self.temperature}; for the likeliest id use do_sample=False"
        elif self.top_k < 0:
            wrong = f"top_k must be 0 (off) or more, not {self.top_k}"
        elif not 0 < self.top_p <= 1:
            wrong = f"top_p must be above 0 and at most 1, not {self.top_p}"
        elif not 0 <= self.min_p <= 1:
            wrong = f"min_p must be from 0 to 1, not {self.min_p}"
        elif not 0 <= self.top_a <= 1:
            wrong = f"top_a must be from 0 to 1, not {self.top_a}"
        elif not self.repetition_penalty > 0:
            wrong = f"repetition_penalty must be above 0, not {self.repetition_penalty}"
        if wrong:
            raise PlaitError(wrong + ".")


def check_options(options: Mapping[str, object]) -> None:
    """Raises PlaitError where an option is none of `Options`."""
    known = list(Options.__annotations__)
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise PlaitError(f"There is no option '{name}'. {hint}")


def make_sampling(options: SamplingOptions, defaults: GenerationConfig, token_type: str, n: int = 1) -> Sampling:
    """The settings of n samples of a token type, with a checkpoint's defaults where an option is not given.

    Raises PlaitError where they cannot be met.
    """
    named = {name: value for name, value in options.items() if name in Sampling.__dataclass_fields__}
    named = {name: value for name, value in named.items() if value is not None}
    do_sample = options.get("do_sample")
    if do_sample is None and options.get("temperature") == 0:
        do_sample = False
    if do_sample is None:
        do_sample = token_type != "text" or n > 1 or bool(named.keys() - {"repetition_penalty"})
    if not do_sample and n > 1:
        raise PlaitError("Without sampling all results are the same. Ask for one, or leave do_sample out.")
    temperature = defaults.temperature if token_type == "text" else defaults.media_temperature.get(token_type, 1.0)
    standard = {"temperature": temperature, "top_k": defaults.top_k, "top_p": defaults.top_p}
    return Sampling(greedy=not do_sample, **{**standard, **named})  # type: ignore[arg-type]


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of ids already seen (B, V, bool) by the penalty (B,)."""
    factor = penalty[:, None].to(logits.dtype)
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)


def keep_top_k(logits: Tensor, k: Tensor, largest: int) -> Tensor:
    """-inf below each row's k-th largest logit; k (B,), 0 for all; `largest` is the greatest k."""
    size = logits.shape[-1]
    top = logits.topk(min(largest, size)).values
    threshold = top.gather(1, (k.clamp(1, top.shape[1]) - 1)[:, None])
    threshold = threshold.masked_fill((k == 0)[:, None], LOWEST)
    return logits.masked_fill(logits < threshold, LOWEST)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """-inf outside the smallest set of likeliest ids whose probability reaches p (B,)."""
    ascending = logits.sort(-1).values
    tail = ascending.softmax(-1).cumsum(-1) <= (1 - p)[:, None]
    first = tail[:, :-1].sum(-1, keepdim=True)  # the likeliest always stays
    threshold = ascending.gather(1, first).masked_fill((p >= 1)[:, None], LOWEST)
    return logits.masked_fill(logits < threshold, LOWEST)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """-inf where the probability is below p (B,) times the greatest."""
    threshold = logits.amax(-1, keepdim=True) + p.to(logits.dtype).log()[:, None]
    return logits.masked_fill(logits < threshold, LOWEST)


def keep_top_a(logits: Tensor, a: Tensor) -> Tensor:
    """-inf where the probability is below a (B,) times the square of the greatest: few ids where the model is sure,
    many where it is not."""
    log_chances = logits.log_softmax(-1)
    threshold = 2 * log_chances.amax(-1, keepdim=True) + a.to(logits.dtype).log()[:, None]
    return logits.masked_fill(log_chances < threshold, LOWEST)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One id a row, (B,): the distribution function inverted at `uniforms` (B,) in [0, 1)."""
    total = logits.softmax(-1).cumsum(-1)
    # Strictly below the total, also after rounding: the id found then has a probability.
    target = uniforms.to(total.dtype).clamp(max=1 - 2.0**-23) * total[:, -1]
    return torch.searchsorted(total, target[:, None], right=True)[:, 0]


class BatchSamplingParams:
    """The settings of a batch's rows as tensors, made once while the batch stays the same."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device) -> None:
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

        self.greedy = column("greedy", torch.bool)
        self.all_greedy = all(row.greedy for row in rows)
        self.any_greedy = any(row.greedy for row in rows)
        drawn = [row for row in rows if not row.greedy]
        # Beyond these bounds quotients leave fp32; the likeliest id is all that is left long before.
        self.temperature = column("temperature").masked_fill(self.greedy, 1.0).clamp(1e-4, 1e4)
        self.any_temperature = any(row.temperature != 1 for row in drawn)
        self.top_k = column("top_k", torch.long)
        self.largest_k = max((row.top_k for row in drawn), default=0)
        self.top_p = column("top_p")
        self.any_top_p = any(row.top_p < 1 for row in drawn)
        self.min_p = column("min_p")
        self.any_min_p = any(row.min_p > 0 for row in drawn)
        self.top_a = column("top_a")
        self.any_top_a = any(row.top_a > 0 for row in drawn)
        self.penalty = column("repetition_penalty").clamp(1e-4, 1e4)
        self.penalised = any(row.repetition_penalty != 1 for row in rows)

    def choose(self, logits: Tensor, uniforms: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """Ids (B,) from logits (B, V) in fp32; `uniforms` (B,) are drawn by, and not needed where all rows are greedy;
        `seen` (B, V) goes with a repetition penalty."""
        if seen is not None:
            logits = penalise(logits, seen, self.penalty)
        if self.all_greedy or uniforms is None:
            return logits.argmax(-1)
        likeliest = logits.argmax(-1) if self.any_greedy else None
        if self.any_temperature:
            logits = logits / self.temperature[:, None]
        if self.largest_k:
            logits = keep_top_k(logits, self.top_k, self.largest_k)
        if self.any_top_p:
            logits = keep_top_p(logits, self.top_p)
        if self.any_min_p:
            logits = keep_min_p(logits, self.min_p)
        if self.any_top_a:
            logits = keep_top_a(logits, self.top_a)
        drawn = draw(logits, uniforms)
        return drawn if likeliest is None else torch.where(self.greedy, likeliest, drawn)
