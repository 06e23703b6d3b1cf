"""The process that serves: the socket, and an end in which what is under way may finish."""

import asyncio
import signal
import socket
import types
from collections.abc import Callable
from typing import Any

import uvicorn

from gemma_tune.errors import ConfigError
from gemma_tune.serving.http.served_models import RunningEngine

_SECONDS_TO_SAY_SO = 5.0  # For the last words to clients whose answers didn't end in time.
_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """Binds a port without listening yet, so that one in use is known before a model is loaded.

    Raises:
        ConfigError: It can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--host={host} --port={port} can't be used: {error.strerror or error}. Another program may have it: take "
            "another --port, or 0 for a free one."
        ) from error
    return bound


def serve(
    app: Any, engine: RunningEngine, bound: socket.socket, drain_seconds: float, ready: Callable[[], None]
) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then ends: no new ones, those under way have drain_seconds, and what
    isn't done then is told so. Raises the signal again at the end.

    Args:
        app: From `make_app`.
        engine: Behind it.
        bound: From `open_socket`.
        drain_seconds: A second Ctrl-C cuts it short.
        ready: Called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(drain_seconds + _SECONDS_TO_SAY_SO),
    )
    server = _DrainingServer(config, engine, drain_seconds, ready)
    server.run(sockets=[bound])
    if server.ended_by is not None:  # uvicorn has raised it within its event loop, and that came to nothing.
        signal.raise_signal(server.ended_by)


class _DrainingServer(uvicorn.Server):
    """Ends the engine's answers while uvicorn ends its connections."""

    def __init__(self, config: uvicorn.Config, engine: RunningEngine, seconds: float, ready: Callable[[], None]):
        super().__init__(config)
        self._engine, self._seconds, self._ready = engine, seconds, ready
        self.ended_by: int | None = None

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Begins to end."""
        self.ended_by = sig
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends."""
        ending = asyncio.ensure_future(self._end_answers())
        await super().shutdown(sockets)
        await ending

    async def _end_answers(self) -> None:
        draining = asyncio.ensure_future(asyncio.to_thread(self._engine.drain, self._seconds))
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._engine.close)
        await draining
