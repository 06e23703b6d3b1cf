"""Decides which requests are let in: by host name, API key, and the length and time of their body.

It is ASGI middleware, so that no body is read from clients that may not send one.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_tune.errors import ConfigError
from gemma_tune.serving.http.api_errors import ApiError

BODY_TIMEOUT_SECONDS = 30.0
_MAX_DISCARDED_BODIES = 10  # Of a refused body, at most this many times the longest allowed one is received.


def read_keys(path: str | Path) -> tuple[str, ...]:
    """Returns the API keys in a file, which has one on each line. Empty lines and lines that begin with # are skipped.

    Raises:
        ConfigError: The file can't be read, or holds no key.
    """
    path = Path(path).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file={path} can't be read: {error}.") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api_key_file={path} contains no key. Write one key on each line.")
    return keys


class AccessControl:
    """Middleware that answers a request with an error unless its host name, key and body are allowed.

    Args:
        app: ASGI application to protect.
        keys: API keys, one of which a request must send; empty: no key is needed.
        open_paths: Paths that need no key. One that ends with a slash includes all paths below it.
        hosts: Allowed host names of the server; empty: any.
        max_body_bytes: Longest allowed body.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str], hosts: Sequence[str], max_body_bytes: int
    ):
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._open_paths, self._hosts, self._max_body_bytes = open_paths, frozenset(hosts), max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if error := self._refusal(scope, headers):
            await self._discard_body(receive)
            await error.response()(scope, receive, send)
            return
        await self._app(scope, self._with_limits(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Returns the error to refuse a request with; None: it is allowed."""
        if self._hosts and _without_port(headers.get("host", "")) not in self._hosts:
            return ApiError(
                403, f"The host name {headers.get('host', '')[:100]!r} is not allowed. See --allowed_hosts.",
                code="host_not_allowed",
            )  # fmt: skip
        if self._keys and not self._is_open(scope["path"]) and not self._has_key(headers):
            return ApiError(
                401, "The API key is missing or wrong. Send it as Authorization: Bearer KEY.",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body_bytes:
            return ApiError(413, self._too_long, code="body_too_large", headers={"Connection": "close"})
        return None

    async def _discard_body(self, receive: Receive) -> None:
        """Receives the rest of a refused body, up to a limit: a client that is still sending when the connection is
        closed would not see the reply.
        """
        received = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                while received < _MAX_DISCARDED_BODIES * self._max_body_bytes:
                    message = await receive()
                    received += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or any(
            len(folder) > 1 and folder.endswith("/") and path.startswith(folder) for folder in self._open_paths
        )

    def _has_key(self, headers: Headers) -> bool:
        """Compares digests, all of them and each whole, so that timing reveals nothing about the keys."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)

    def _with_limits(self, receive: Receive) -> Receive:
        """Returns a `receive` that raises when the body is too long or takes too long."""
        received, is_complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_SECONDS

        async def limited() -> Message:
            nonlocal received, is_complete
            if is_complete:  # From now on only a disconnect can come.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body was not complete within {BODY_TIMEOUT_SECONDS:g} seconds") from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > self._max_body_bytes:
                if not is_complete:
                    await self._discard_body(receive)
                raise HTTPException(413, self._too_long.rstrip("."), headers={"Connection": "close"})
            return message

        return limited

    @property
    def _too_long(self) -> str:
        return f"The request body is longer than {self._max_body_bytes:,} bytes."


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    """Returns `localhost` of `localhost:8000`, and `[::1]` of `[::1]:8000`."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
