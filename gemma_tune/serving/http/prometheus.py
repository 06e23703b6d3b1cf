"""Prometheus metrics of the server, and the middleware that counts and times requests."""

import functools
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
        gauges: Function that returns the current numbers of running answers, of queued answers, and of compilations
            since the start, which should stay 0.
    """

    def __init__(self, gauges: Callable[[], tuple[float, float, float]]):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "gemma_tune_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "gemma_tune_request_seconds",
            "Seconds from a request to the end of its reply.",
            ["path"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "gemma_tune_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("gemma_tune_prompt_tokens", "Prompt tokens.", ["model"], registry=registry)
        self.generated_tokens = Counter(
            "gemma_tune_generated_tokens", "Generated tokens.", ["model"], registry=registry
        )
        self.cancelled = Counter(
            "gemma_tune_cancelled_answers",
            "Answers that were cancelled: the client disconnected, or the request timed out.",
            registry=registry,
        )
        for index, (name, text) in enumerate(
            (
                ("gemma_tune_running_answers", "Answers that are being generated."),
                ("gemma_tune_queued_answers", "Answers that wait in the queue."),
                ("gemma_tune_compilations_since_start", "Programs compiled since the server was ready; should be 0."),
            )
        ):
            Gauge(name, text, registry=registry).set_function(functools.partial(lambda at: gauges()[at], index))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """ASGI middleware that counts and times requests.

    Args:
        app: ASGI application.
        metrics: Metrics to update.
        paths: Paths that are counted by their name; all others are counted together.
        log: Function called with a line for each request, or None.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], log: Callable[[str], None] | None):
        self._app, self._metrics, self._paths, self._log = app, metrics, paths, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and records its status and time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            seconds = time.monotonic() - started
            path = scope["path"] if scope["path"] in self._paths else "other"  # Clients can invent any number of paths.
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(seconds)
            if self._log is not None:
                self._log(f"{scope['method']} {scope['path']!r:.200} {status} {seconds:.3f} s")
