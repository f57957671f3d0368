"""Memory that large requests leave in the allocator's arenas: few arenas, and what is free is given back.

glibc makes an arena for each thread that allocates, and what a large body was decoded into stays there as free memory
that no other thread uses. So a server has two arenas, for its event loop and its models, and after large requests the
heap is trimmed, once for all that come within half a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys
from collections.abc import Callable

ARENAS = 2
M_ARENA_MAX = -8  # as glibc's malloc.h has it
LARGE = 256 << 10  # bytes of a body from which its memory is given back
DELAY = 0.5  # seconds after it


class HeapTrimmer:
    """Trims the heap half a second after a large request; where there is no glibc, does nothing."""

    def __init__(self) -> None:
        self._trim = _malloc_trim()
        self._due = False

    def after(self, size: int) -> None:
        """Note that a request whose body has so many bytes is over."""
        if self._trim is None or self._due or size < LARGE:
            return
        self._due = True
        asyncio.get_running_loop().call_later(DELAY, self._run)

    def _run(self) -> None:
        self._due = False
        if self._trim is not None:
            asyncio.get_running_loop().run_in_executor(None, self._trim, 0)


def limit_arenas() -> None:
    """Let this process have ARENAS arenas at most; where there is no glibc, do nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    except (OSError, AttributeError):  # musl
        return None
