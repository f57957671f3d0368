"""Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator

from plait.core.errors import Terminated

GRACE = 20  # seconds after SIGTERM in which a step, a validation or a save may come to its end
ALARM: int | None = getattr(signal, "SIGALRM", None)  # interrupts what waits; Windows has none
BREAK: int | None = getattr(signal, "SIGBREAK", None)  # what Windows sends in place of SIGTERM


class _Grace:
    """Calls the handler of `ALARM`, or of SIGTERM where there is no such signal, when the grace ends."""

    def __init__(self) -> None:
        self.over = False
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Nothing, where it has begun already."""
        if ALARM is not None:
            signal.alarm(signal.alarm(0) or GRACE)
        elif self._timer is None:
            self._timer = threading.Timer(GRACE, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self.over = True
        _thread.interrupt_main(signal.SIGTERM)

    def cancel(self) -> None:
        if ALARM is not None:
            signal.alarm(0)
        if self._timer is not None:
            self._timer.cancel()


class Signals:
    """Ctrl-C and SIGTERM while a run trains. Outside of `held` they act at once; inside they are noted, and obeyed
    where `check` is called. A second Ctrl-C, or the end of the grace, acts at once again."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = False
        self._grace = _Grace()

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
        interrupt = number == signal.SIGINT
        self._grace.over = self._grace.over or number == ALARM
        self.received = signal.SIGINT if interrupt else signal.SIGTERM
        if not self._held or self._grace.over or (again and interrupt):
            self.check()
        elif not interrupt:
            self._grace.begin()


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Listen to Ctrl-C and SIGTERM; only the main thread can, elsewhere nothing is received."""
    listening = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield listening
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, ALARM, BREAK) if number is not None]
    before = [signal.signal(number, listening._receive) for number in numbers]
    try:
        yield listening
    finally:
        listening._grace.cancel()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
