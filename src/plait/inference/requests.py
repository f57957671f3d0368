"""What the engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plait.inference.constrained import TextConstraint
from plait.inference.sampling import Sampling
from plait.model.multimodal import Sequence

GREEDY = Sampling(greedy=True)


@dataclass(frozen=True)
class TopIds:
    """The likeliest ids at one place, likeliest first, and log P of each in nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Delta:
    """What one step added to one sample; `finish` is set in its last update."""

    sample: int
    ids: list[int]
    text: str = ""
    finish: str | None = None
    logprobs: tuple[float, ...] = ()  # one an id, where the request wants them
    top: tuple[TopIds, ...] = ()  # likewise


@dataclass
class Request:
    """One context and what to write after it. The context ends where writing begins: with an opener, or with text."""

    context: Sequence
    token_type: str = "text"
    sampling: Sampling = GREEDY
    n: int = 1
    max_new_tokens: int | None = None  # None: as many as the context and the grammar have room for
    min_new_tokens: int = 0  # ids before the end becomes possible
    guidance: float = 1.0  # 1 is none
    seed: int = 0
    first_sample: int = 0  # samples are drawn as numbers first_sample .. first_sample + n - 1 of the seed
    stop: tuple[str, ...] = ()  # strings that end a text; they are left out of it
    logprobs: bool = False
    top_logprobs: int = 0  # the likeliest ids at each place, so many; they need `logprobs`
    constraint: TextConstraint | None = None  # what a text must be
    adapter: int = -1  # of the backbone's, by its number; -1: none, or the default
    on_delta: Callable[[Delta], None] | None = None  # called by the thread that runs the engine


@dataclass
class Completion:
    """One sample: its ids without the end, and for text what they spell. `finish` is "end", "length", "stop" or
    "cancelled"; `logprobs` (nats, one an id, then the end's) are the model's own, before guidance and settings."""

    ids: list[int]
    finish: str
    text: str | None = None
    logprobs: list[float] | None = None
    top: list[TopIds] | None = None  # one a log probability, where they were asked for


@dataclass
class Result:
    """What the engine made of a request: its samples, as many as were asked for."""

    samples: list[Completion]
