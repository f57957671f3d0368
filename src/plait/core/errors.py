"""Errors that are told to people: what was wrong, where, and what to do."""

from __future__ import annotations


class PlaitError(Exception):
    """A fault that the user can mend. The message says what was wrong, where, and what to do; never a traceback."""


class DivergedError(PlaitError):
    """A loss that is not finite, or that exploded: these settings do not train."""


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, nobody's `except Exception` may swallow it; exit code 143."""


class ContextLengthError(PlaitError):
    """A prompt that is longer than the model reads."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory was left: Python's own, PyTorch's of a GPU, or that of its CPU allocator,
    which has no class of its own."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "allocate memory" in str(error)
