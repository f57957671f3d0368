"""Long work that others wait beside: it says where it may stand still, and whoever runs it what happens there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_hook: ContextVar[Callable[[bool], None] | None] = ContextVar("pause_point", default=None)


class Interrupted(Exception):  # noqa: N818  (not a fault)
    """The work is not wanted any more."""


def pause_point() -> None:
    """Called between two passes of a model, where nothing of a pass is under way: other work may be done meanwhile, in
    this thread. Raises Interrupted where whoever started the work has given it up."""
    if (hook := _hook.get()) is not None:
        hook(True)


def check_interrupted() -> None:
    """`pause_point` where no other work may be done."""
    if (hook := _hook.get()) is not None:
        hook(False)


@contextlib.contextmanager
def pausing(hook: Callable[[bool], None]) -> Iterator[None]:
    """`pause_point` calls `hook` within this block, in this thread, with whether other work may be done."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)
