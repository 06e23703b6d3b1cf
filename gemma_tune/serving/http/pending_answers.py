"""Brings answers from the engine's thread to the server's event loop, and cancels those that nobody waits for."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from gemma_tune.errors import ConfigError, EngineClosed, EngineFull
from gemma_tune.serving.engine.request import AnswerDelta, Request
from gemma_tune.serving.http.api_errors import ApiError, queue_full, server_failed, shutting_down, timed_out
from gemma_tune.serving.http.prometheus import Metrics
from gemma_tune.serving.http.served_models import Cancellable, RunningEngine

Result = TypeVar("Result")
KEEP_ALIVE_SECONDS = 15.0  # Proxies close connections that are silent for long.


class IndexedDelta(NamedTuple):
    """A delta, and which answer it belongs to.

    Attributes:
        number: Index of the answer's request.
        delta: The delta; None: nothing came for a while, and the connection should be kept alive.
    """

    number: int
    delta: AnswerDelta | None


class PendingAnswers:
    """The answers to the requests of one client, as an asynchronous iterator of `IndexedDelta`.

    The engine accepts all of them or none. They must be closed: those that are not complete then are cancelled.

    Args:
        engine: Engine, started.
        requests: Requests of one client.
        timeout_seconds: Time that all answers may take together.
        metrics: Metrics that count tokens and times.
        model: Model name that tokens are counted under.

    Raises:
        ApiError: The engine accepts no more requests; or, while iterating, an answer failed or timed out.
    """

    def __init__(
        self, engine: RunningEngine, requests: Sequence[Request], timeout_seconds: float, metrics: Metrics, model: str
    ):
        self._timeout_seconds, self._metrics, self._model = timeout_seconds, metrics, model
        self._started = time.monotonic()
        self._queue: asyncio.Queue[IndexedDelta] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._unfinished: dict[int, Cancellable] = {}
        try:
            for index, request in enumerate(requests):
                self._unfinished[index] = engine.submit(request, self._deliver(index))
        except EngineFull:
            self.close()
            raise queue_full() from None
        except EngineClosed:
            self.close()
            raise shutting_down() from None
        except ConfigError as error:  # The request can never be answered.
            self.close()
            raise ApiError(400, str(error), code="invalid_value") from None
        except BaseException:
            self.close()
            raise
        num_prompt_tokens = sum(len(prompt) for prompt in {request.prompt_ids for request in requests})
        metrics.prompt_tokens.labels(model).inc(num_prompt_tokens)

    def close(self) -> None:
        """Cancels the answers that are not complete."""
        if self._unfinished:
            self._metrics.cancelled.inc(len(self._unfinished))
        for handle in self._unfinished.values():
            handle.cancel()
        self._unfinished.clear()

    async def __aiter__(self) -> AsyncIterator[IndexedDelta]:
        """Yields deltas as they come, until all answers are complete."""
        is_first = True
        while self._unfinished:
            indexed = await self._next()
            delta = indexed.delta
            if delta is not None:
                if is_first and delta.token_ids:
                    self._metrics.first_token_seconds.observe(time.monotonic() - self._started)
                    is_first = False
                self._metrics.generated_tokens.labels(self._model).inc(len(delta.token_ids))
                if delta.finish_reason:
                    self._unfinished.pop(indexed.number, None)
                if delta.finish_reason == "error":
                    raise server_failed(delta.error)
                if delta.finish_reason == "cancelled":
                    raise shutting_down()  # While the client still reads, only a closing engine cancels.
            yield indexed

    async def _next(self) -> IndexedDelta:
        """Waits for a delta, or until the connection should be kept alive.

        Raises:
            ApiError: The request timed out.
        """
        remaining = self._timeout_seconds - (time.monotonic() - self._started)
        if remaining <= 0:
            raise timed_out(self._timeout_seconds)
        try:
            async with asyncio.timeout(min(remaining, KEEP_ALIVE_SECONDS)):
                return await self._queue.get()
        except TimeoutError:
            return IndexedDelta(0, None)

    def _deliver(self, index: int):
        """Returns the function that the engine calls, from its thread, with each delta of an answer."""

        def deliver(delta: AnswerDelta) -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed when the server has stopped.
                self._loop.call_soon_threadsafe(self._queue.put_nowait, IndexedDelta(index, delta))

        return deliver


class ClientDisconnected(Exception):
    """The client has closed its connection before its reply was complete."""


async def unless_disconnected(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """Returns the result of some work, which is cancelled when the client closes its connection.

    Raises:
        ClientDisconnected: The client has closed its connection.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((working, disconnecting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for future in (working, disconnecting):
            future.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Waits until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
