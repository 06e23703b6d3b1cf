"""Streams a reply as server-sent events, for as long as the client is connected."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.http.pending_answers import PendingAnswers, wait_for_disconnect

KEEP_ALIVE = b": still there\n\n"
DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """Returns a value as one event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response that sends events until they end or fail, or the client disconnects; then it closes the answers.

    Args:
        events: Complete events. An ApiError that they raise becomes the last event, since the status has been sent.
        answers: Pending answers that the events are made of.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answers: PendingAnswers):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._answers = events, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the reply."""
        sending = asyncio.ensure_future(self._send(send))
        disconnecting = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, disconnecting), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for future in (sending, disconnecting):
                future.cancel()
            await asyncio.gather(sending, disconnecting, return_exceptions=True)
            self._answers.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
