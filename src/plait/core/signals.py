"""Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from plait.core.errors import Terminated

GRACE = 20  # seconds after SIGTERM in which a step, a validation or a save may come to its end


class Signals:
    """Ctrl-C and SIGTERM while a run trains. Outside of `held` they act at once; inside they are noted, and obeyed
    where `check` is called. A second Ctrl-C, or the end of the grace, acts at once again."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = False

    def check(self) -> None:
        """Raise KeyboardInterrupt or Terminated where a signal came."""
        if self.received is not None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For what must not be cut in the middle."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _receive(self, number: int, frame: object) -> None:
        again = self.received is not None
        self.received = signal.SIGTERM if number == signal.SIGALRM else number
        if not self._held or (again and number != signal.SIGTERM):
            self.check()
        elif number == signal.SIGTERM:
            signal.alarm(signal.alarm(0) or GRACE)


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Listen to Ctrl-C and SIGTERM; only the main thread can, elsewhere nothing is received."""
    listening = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield listening
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, listening._receive) for number in numbers]
    try:
        yield listening
    finally:
        signal.alarm(0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
