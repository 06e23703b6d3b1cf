"""Answers under way: from the engine's thread to the server's loop, with an end for each that nobody waits for."""

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
_SECONDS_OF_SILENCE = 15.0  # Proxies close connections over which nothing comes for long.


class IndexedDelta(NamedTuple):
    """A piece, and of which of the requests, counted from 0. None: nothing came for a while."""

    number: int
    piece: AnswerDelta | None


class PendingAnswers:
    """The answers to some requests, all accepted by the engine or none, as an asynchronous iterator of `IndexedDelta`.

    Must be closed: what is still under way then is cancelled, and its place in the engine is free.

    Args:
        engine: Started.
        requests: Of one client.
        seconds: How long they may take together.
        metrics: Counts tokens and waiting.
        model: The name it counts them under.

    Raises:
        ApiError: The engine takes no more; or, while iterating, an answer failed or took too long.
    """

    def __init__(
        self, engine: RunningEngine, requests: Sequence[Request], seconds: float, metrics: Metrics, model: str
    ):
        self._seconds, self._metrics, self._model = seconds, metrics, model
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
        except ConfigError as error:  # It can't be answered, whenever it is asked.
            self.close()
            raise ApiError(400, str(error), code="invalid_value") from None
        except BaseException:
            self.close()
            raise
        num_prompt_tokens = sum(len(prompt) for prompt in {request.prompt_ids for request in requests})
        metrics.prompt_tokens.labels(model).inc(num_prompt_tokens)

    def close(self) -> None:
        """Cancels what is still under way."""
        if self._unfinished:
            self._metrics.cancelled.inc(len(self._unfinished))
        for handle in self._unfinished.values():
            handle.cancel()
        self._unfinished.clear()

    async def __aiter__(self) -> AsyncIterator[IndexedDelta]:
        """Yields pieces as they come, until all answers are whole."""
        is_first = True
        while self._unfinished:
            delivered = await self._next()
            piece = delivered.piece
            if piece is not None:
                if is_first and piece.token_ids:
                    self._metrics.first_token_seconds.observe(time.monotonic() - self._started)
                    is_first = False
                self._metrics.generated_tokens.labels(self._model).inc(len(piece.token_ids))
                if piece.finish_reason:
                    self._unfinished.pop(delivered.number, None)
                if piece.finish_reason == "error":
                    raise server_failed(piece.error)
                if piece.finish_reason == "cancelled":
                    raise shutting_down()  # Only the engine's own end does so while somebody still reads.
            yield delivered

    async def _next(self) -> IndexedDelta:
        """Waits for a piece, or for as long as may be silence."""
        left = self._seconds - (time.monotonic() - self._started)
        if left <= 0:
            raise timed_out(self._seconds)
        try:
            async with asyncio.timeout(min(left, _SECONDS_OF_SILENCE)):
                return await self._queue.get()
        except TimeoutError:
            return IndexedDelta(0, None)

    def _deliver(self, index: int):
        """Returns what the engine calls, from its thread, with each piece of an answer."""

        def deliver(piece: AnswerDelta) -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed: the server is gone.
                self._loop.call_soon_threadsafe(self._queue.put_nowait, IndexedDelta(index, piece))

        return deliver


class ClientDisconnected(Exception):
    """Nobody waits for the reply any more."""


async def unless_disconnected(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """Awaits something, and stops it when the client closes its connection.

    Raises:
        ClientLeft: It did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for future in (working, leaving):
            future.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Waits until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
