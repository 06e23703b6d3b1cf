"""Runs the server: binds its socket, and shuts it down so that running answers can finish."""

import asyncio
import signal
import socket
import types
from collections.abc import Callable
from typing import Any

import uvicorn

from gemma_tune.errors import ConfigError
from gemma_tune.serving.http.served_models import RunningEngine

_FAREWELL_SECONDS = 5.0  # Time to tell clients that their answers were cancelled.
_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """Binds a port without listening yet, so that a port in use is noticed before a model is loaded.

    Raises:
        ConfigError: The port can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--host={host} --port={port} can't be used: {error.strerror or error}. Another program may be using "
            "the port: choose another --port, or 0 for any free one."
        ) from error
    return bound


def serve(
    app: Any, engine: RunningEngine, bound: socket.socket, drain_seconds: float, ready: Callable[[], None]
) -> None:
    """Serves until SIGTERM or Ctrl-C, then shuts down: it takes no more requests, and gives those it has drain_seconds
    to finish. Answers that aren't complete then end with an error. At the end it raises the signal again.

    Args:
        app: Application from `make_app`.
        engine: Engine behind it.
        bound: Socket from `open_socket`.
        drain_seconds: Time for running answers; a second Ctrl-C ends it.
        ready: Function called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(drain_seconds + _FAREWELL_SECONDS),
    )
    server = _DrainingServer(config, engine, drain_seconds, ready)
    server.run(sockets=[bound])
    if server.ended_by is not None:  # uvicorn has raised it within its event loop, where it had no effect.
        signal.raise_signal(server.ended_by)


class _DrainingServer(uvicorn.Server):
    """A uvicorn server that drains and closes the engine while it shuts down."""

    def __init__(self, config: uvicorn.Config, engine: RunningEngine, seconds: float, ready: Callable[[], None]):
        super().__init__(config)
        self._engine, self._seconds, self._ready = engine, seconds, ready
        self.ended_by: int | None = None

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Remembers the signal, and begins to shut down."""
        self.ended_by = sig
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shuts down the connections and the engine together."""
        closing = asyncio.ensure_future(self._close_engine())
        await super().shutdown(sockets)
        await closing

    async def _close_engine(self) -> None:
        draining = asyncio.ensure_future(asyncio.to_thread(self._engine.drain, self._seconds))
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._engine.close)
        await draining
