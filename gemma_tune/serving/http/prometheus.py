"""Counts for Prometheus, and what every request goes through to be counted."""

import functools
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WHOLE = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's counts, in a registry of their own.

    Args:
        now: Called for what changes by itself: answers that are written, answers that wait, and compilations since the
            start, of which there should be none.
    """

    def __init__(self, now: Callable[[], tuple[float, float, float]]):
        self.registry = here = CollectorRegistry()
        self.requests = Counter(
            "gemma_tune_requests", "Requests by path and status.", ["path", "status"], registry=here
        )
        self.request_seconds = Histogram(
            "gemma_tune_request_seconds",
            "From a request to the end of its reply.",
            ["path"],
            buckets=_WHOLE,
            registry=here,
        )
        self.first_token_seconds = Histogram(
            "gemma_tune_first_token_seconds", "From a request to its first token.", buckets=_FIRST_TOKEN, registry=here
        )
        self.prompt_tokens = Counter("gemma_tune_prompt_tokens", "Tokens of prompts.", ["model"], registry=here)
        self.generated_tokens = Counter("gemma_tune_generated_tokens", "Tokens of answers.", ["model"], registry=here)
        self.cancelled = Counter(
            "gemma_tune_cancelled_answers", "Answers that ended early: the client left, or time was up.", registry=here
        )
        for index, (name, text) in enumerate(
            (
                ("gemma_tune_running_answers", "Answers that are written."),
                ("gemma_tune_queued_answers", "Answers that wait."),
                ("gemma_tune_compilations_since_start", "Programs compiled since the server was ready."),
            )
        ):
            Gauge(name, text, registry=here).set_function(functools.partial(lambda at: now()[at], index))

    def text(self) -> bytes:
        """Returns all of it as Prometheus reads it."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """ASGI middleware: counts and times requests, and calls `log` with a line for each."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], log: Callable[[str], None] | None):
        self._app, self._metrics, self._paths, self._log = app, metrics, paths, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        finally:
            seconds = time.monotonic() - started
            path = scope["path"] if scope["path"] in self._paths else "other"  # Not as many as clients can think of.
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(seconds)
            if self._log is not None:
                self._log(f"{scope['method']} {scope['path']!r:.200} {status} {seconds:.3f} s")
