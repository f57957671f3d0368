"""What is told about requests: metrics for Prometheus, and log lines as JSON. Never a prompt, a medium or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from plait.server.worker import Worker

FIELDS = 64  # fields without effect that are counted by name
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class RequestContext:
    """What becomes known of a request on its way, for its log line."""

    id: str
    begun: float = field(default_factory=time.monotonic)
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: float | None = None  # seconds to the first token
    end: str = ""  # how it ended, where that was not by its answer
    key: str = ""  # the name of the key that was sent
    ignored: set[str] = field(default_factory=set)  # fields that had no effect
    status: int = 0
    complete: bool = False


class Metrics:
    """All figures under /metrics; labels take few values, whatever clients send."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("plait_requests", "Requests answered", ["route", "status"], **make)
        self.seconds = Histogram("plait_request_seconds", "From head to end", ["route"], buckets=SECONDS, **make)
        self.first = Histogram("plait_first_token_seconds", "To the first token", ["model"], buckets=SECONDS, **make)
        self.ignored = Counter("plait_ignored_fields", "Fields of requests that had no effect", ["field"], **make)
        self.tokens = Counter("plait_tokens", "Tokens read and written", ["model", "kind"], **make)
        self.closed = Counter("plait_connections_closed_early", "Connections given up", ["reason"], **make)
        self.fields: set[str] = set()
        self.workers: list[Worker] = []
        self.connections: Any = ()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges, read when they are asked for."""
        batch = GaugeMetricFamily("plait_batch_samples", "Samples in the batch", labels=["model"])
        queue = GaugeMetricFamily("plait_queue_samples", "Samples and calls that wait", labels=["model"])
        for worker in self.workers:
            running = len(worker.engine.samples) if worker.engine is not None else 0
            waiting = len(worker.engine.pending) if worker.engine is not None else 0
            batch.add_metric([worker.name], running)
            queue.add_metric([worker.name], waiting + len(worker.calls))
        yield batch
        yield queue
        yield GaugeMetricFamily("plait_connections", "Open connections", len(self.connections))

    def count_ignored(self, field: str) -> None:
        """Count a field that had no effect. Clients choose their names, so that only the first few are told apart."""
        if field not in self.fields and len(self.fields) < FIELDS:
            self.fields.add(field)
        self.ignored.labels(field if field in self.fields else "other").inc()

    def count(self, request_context: RequestContext, route: str) -> None:
        """Count a request that is over."""
        self.requests.labels(route, str(request_context.status)).inc()
        self.seconds.labels(route).observe(time.monotonic() - request_context.begun)
        if request_context.model:
            self.tokens.labels(request_context.model, "prompt").inc(request_context.prompt_tokens)
            self.tokens.labels(request_context.model, "completion").inc(request_context.completion_tokens)
            if request_context.first is not None:
                self.first.labels(request_context.model).observe(request_context.first)


class _Lines(logging.Formatter):
    """One JSON object a line. Of an error, its class and places in the code: messages may quote what was sent."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            fields = {**fields, "error": record.exc_info[0].__name__}
            fields["trace"] = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(record.exc_info[2])]
        return json.dumps({**line, **fields}, ensure_ascii=False)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def set_up_logging() -> None:
    """JSON lines of the server on stderr; of libraries only what went wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    logging.getLogger("plait").setLevel(logging.INFO)
