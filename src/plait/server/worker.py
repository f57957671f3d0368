"""One thread a model: it runs the engine's steps, and between them whatever else needs the model."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from plait.core.errors import PlaitError
from plait.core.interruption import Interrupted, pausing
from plait.core.system import total_memory
from plait.inference.base import Model
from plait.inference.engine import Engine, Job
from plait.inference.model import PlaitModel
from plait.inference.requests import Delta, Request, Result
from plait.server.limits import ApiError, Limits, as_api_error

DEEPEST = 8  # calls that stand still while another one runs
LONG = 0.1  # seconds after which a call lets another one, that waits, run in between
log = logging.getLogger("plait.server")


class PendingRequest:
    """A request on its way, as the event loop sees it. It ends with the job, with an ApiError, or with `cancel`."""

    def __init__(self, worker: Worker, request: Request, updated: asyncio.Event) -> None:
        self.worker, self.request, self.open, self.updated = worker, request, request.n, updated
        self.begun = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None
        self.updates: deque[Delta] = deque()
        self.error: ApiError | None = None
        self.job: Job | None = None

    @property
    def result(self) -> Result:
        """What was written, once `follow` has come to its end."""
        if self.job is None:
            raise ApiError(500, "The request was lost.")
        return self.job.result

    def take(self, updates: list[Delta]) -> None:
        self.updates.extend(updates)
        self.open -= sum(update.finish is not None for update in updates)
        if not self.open:
            self._close()
        self.updated.set()

    def fail(self, error: ApiError) -> None:
        """Give the request up and tell whoever waits for it."""
        self.error = self.error or error
        self.cancel()
        self.updated.set()

    def cancel(self) -> None:
        """Free its places in the batch. Nothing happens where it has ended."""
        if self in self.worker.pending_requests:
            self._close()
            if self.job is not None:
                self.job.cancel()

    def _close(self) -> None:
        self.worker.pending_requests.discard(self)
        if self.timer is not None:
            self.timer.cancel()


async def follow(pending_requests: list[PendingRequest]) -> AsyncIterator[list[tuple[int, Delta]]]:
    """The updates of tickets that were submitted together, each with its ticket's index, as they come; ends when all
    have ended. Raises ApiError where one was given up. Leaving the loop cancels nothing."""
    while True:
        updates = []
        open_ = False
        for i, pending in enumerate(pending_requests):
            if pending.error is not None:
                raise pending.error
            updates += [(i, update) for update in pending.updates]
            pending.updates.clear()
            open_ |= pending.open > 0
        if updates:
            yield updates
        elif not open_:
            return
        else:
            pending_requests[0].updated.clear()
            await pending_requests[0].updated.wait()


class Worker:
    """Runs one model for many requests at once. All methods but `run` belong to the event loop's thread."""

    def __init__(self, name: str, model: Model, limits: Limits) -> None:
        self.name, self.model, self.limits = name, model, limits
        self.engine: Engine | None = None
        if (plait_model := model.plait_model) is not None:
            self.engine = Engine(plait_model.checkpoint, plait_model.device, _rows(plait_model, limits.batch))
            plait_model.engine = self.engine  # the verbs' too: one set of rows, one cache
        self.pending_requests: set[PendingRequest] = set()
        self.calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self.futures: set[asyncio.Future[Any]] = set()  # of the calls that wait or run
        self.outbox: list[tuple[PendingRequest, Delta]] = []  # of the step that runs; this model's thread only
        self.wake = threading.Condition()
        self.stopped = False
        self.stay = 1.0  # seconds from request to end, lately
        self.thread = threading.Thread(target=self.run, name=f"model {name}", daemon=True)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it up to five seconds."""
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.thread.join(5)

    # --- requests ---------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples being written or waiting."""
        return sum(pending.open for pending in self.pending_requests)

    def admit(self, samples: int) -> None:
        """Raises ApiError: 429 where the queue has no room for so many more now, 413 where it never has."""
        rows = self.engine.max_rows if self.engine is not None else 1
        ahead = self.samples + len(self.futures)
        if samples > rows + self.limits.queue:
            most_samples = rows + self.limits.queue
            raise ApiError(
                413, f"The request asks for {samples} samples; at most {most_samples} are taken. Ask for fewer."
            )
        if ahead + samples > rows + self.limits.queue:
            seconds = min(max(math.ceil(self.stay * (ahead + samples - rows) / max(rows, 1)), 1), 60)
            raise ApiError(
                429, f"The model is busy and its queue is full. Try again in {seconds} s.", code="overloaded",
                headers={"Retry-After": str(seconds)},
            )  # fmt: skip

    def submit(self, requests: list[Request], deadline: float) -> list[PendingRequest]:
        """Queue requests, to be given up at `deadline` (the loop's time). Raises ApiError: 429 where there is no room,
        400 where one cannot be met; then none is queued."""
        if self.engine is None:
            raise ApiError(400, f"{self.name} runs in transformers and does not generate here.", "model")
        self.admit(sum(request.n for request in requests))
        updated, outbox, pending_requests = asyncio.Event(), self.outbox, list[PendingRequest]()

        def enter(request: Request) -> PendingRequest:
            pending = PendingRequest(self, request, updated)
            watched_request = replace(request, on_delta=lambda update: outbox.append((pending, update)))
            pending.job = self.engine.submit(watched_request) if self.engine is not None else None
            self.pending_requests.add(pending)
            pending.timer = self.loop.call_at(deadline, pending.fail, late())
            return pending

        try:
            for request in requests:
                pending_requests.append(enter(request))
        except PlaitError as error:
            for pending in pending_requests:
                pending.cancel()
            raise as_api_error(error) from error
        with self.wake:
            self.wake.notify()
        return pending_requests

    async def call(self, work: Callable[[], Any], deadline: float) -> Any:
        """What `work` returns, run by the model's thread between two steps, which go on wherever the work has a
        `pause_point`; there it ends too once the deadline is over or its client has left. PlaitErrors become
        ApiErrors."""
        self.admit(1)
        future: asyncio.Future[Any] = self.loop.create_future()
        self.futures.add(future)
        future.add_done_callback(self.futures.discard)
        with self.wake:
            self.calls.append((work, future))
            self.wake.notify()
        try:
            async with asyncio.timeout_at(deadline):
                return await future
        except TimeoutError:
            raise late() from None
        except PlaitError as error:
            raise as_api_error(error) from error

    def give_up(self, error: ApiError) -> None:
        """End all that is under way."""
        for pending in list(self.pending_requests):
            pending.fail(error)
        for future in [*self.futures]:
            if not future.done():
                future.set_exception(error)

    # --- the model's thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        busy = False
        while True:
            with self.wake:
                while not (busy or self.calls or self.stopped or (self.engine is not None and self.engine.pending)):
                    self.wake.wait()
                if self.stopped:
                    return
                call = self.calls.popleft() if self.calls else None
            if call is not None:
                self._run_call(*call)
            if self.engine is not None:
                busy = self._step(self.engine)

    def _run_call(self, work: Callable[[], Any], future: asyncio.Future[Any], depth: int = 0) -> None:
        """Run one call; `depth` of others stand still meanwhile, at their pause points."""
        if future.done():
            return
        started = time.monotonic()

        def pause(others: bool) -> None:
            if future.done() or self.stopped:
                raise Interrupted
            if not others:
                return
            if self.engine is not None and (self.engine.samples or self.engine.pending):
                self._step(self.engine)
            if depth < DEEPEST and time.monotonic() - started > LONG and self.calls:
                self._run_call(*self.calls.popleft(), depth + 1)

        try:
            with pausing(pause):
                result = work()
        except Interrupted:
            if not future.done():
                self.loop.call_soon_threadsafe(_settle, future, None, ApiError(503, "The server is stopping."))
        except PlaitError as error:
            self.loop.call_soon_threadsafe(_settle, future, None, error)
        except Exception as error:
            log_fault("call", error)
            self.loop.call_soon_threadsafe(_settle, future, None, ApiError(500, "Something went wrong in the model."))
        else:
            self.loop.call_soon_threadsafe(_settle, future, result, None)

    def _step(self, engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:
            log_fault("step", error)
            self.loop.call_soon_threadsafe(self.give_up, ApiError(500, "Something went wrong in the model."))
            return False
        finally:
            if self.outbox:
                sent, self.outbox[:] = list(self.outbox), []
                self.loop.call_soon_threadsafe(self._deliver, sent)

    def _deliver(self, sent: list[tuple[PendingRequest, Delta]]) -> None:
        updates_by_request: dict[PendingRequest, list[Delta]] = {}
        for pending, update in sent:
            updates_by_request.setdefault(pending, []).append(update)
        for pending, updates in updates_by_request.items():
            pending.take(updates)
        for pending in updates_by_request:
            if not pending.open:
                self.stay = 0.9 * self.stay + 0.1 * (time.monotonic() - pending.begun)


def late() -> ApiError:
    """The error for a request whose time is over."""
    return ApiError(504, "The request took longer than this server allows. Ask for less at once.", code="deadline")


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # its client has gone
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _rows(model: PlaitModel, most: int) -> int:
    """As many rows as `most`, or as a quarter of the memory holds the cache of."""
    config = model.checkpoint.model.config.backbone
    row_bytes = (
        2 * config.layers * config.kv_heads * config.head_width * config.max_length * model.device.dtype.itemsize
    )
    if model.device.torch.type == "cuda":
        import torch

        memory = torch.cuda.mem_get_info(model.device.torch)[0]
    else:
        memory = total_memory()
    return max(min(most, memory // 4 // row_bytes), 2)


def log_fault(where: str, error: BaseException) -> None:
    """An unforeseen error: its class and places in the code. Its message may quote what a client sent."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")  # noqa: PTH119
        trace = trace.tb_next
    log.error("fault", extra={"fields": {"where": where, "error": type(error).__name__, "trace": places}})
