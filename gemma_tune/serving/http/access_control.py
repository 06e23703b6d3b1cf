"""What a request must get past before anything reads it: the name it asks for, its key, its length, its time.

ASGI middleware, so that a body is neither kept nor read from who may not send it.
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

_SECONDS_FOR_A_BODY = 30.0
_FORGOTTEN_BODIES = 10  # As long as so many of the longest that is let in.


def read_keys(path: str | Path) -> tuple[str, ...]:
    """Returns the keys in a file: one a line; empty lines and those that begin with # don't count.

    Raises:
        ConfigError: It can't be read, or holds no key.
    """
    path = Path(path).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file={path} can't be read: {error}.") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api_key_file={path} holds no key. Write one on each line.")
    return keys


class AccessControl:
    """Lets in what asks for an allowed name, brings a key where one is needed, and is not too long.

    Args:
        app: What is behind.
        keys: Of which a request must bring one; empty: none is needed.
        open_paths: Where none is needed in any case; one that ends with a slash: all below it too.
        hosts: Names by which the server may be addressed; empty: any.
        max_body_bytes: Longest body.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str], hosts: Sequence[str], max_body_bytes: int
    ):
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._open_paths, self._hosts, self._max_body_bytes = open_paths, frozenset(hosts), max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers with what keeps it out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if error := self._reason(scope, headers):
            await self._forget(receive)
            await error.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _reason(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Returns why a request is kept out; None: it isn't."""
        if self._hosts and _without_port(headers.get("host", "")) not in self._hosts:
            return ApiError(
                403, f"The server isn't to be addressed as {headers.get('host', '')[:100]!r}. See --allowed_hosts.",
                code="host_not_allowed",
            )  # fmt: skip
        if self._keys and not self._is_open(scope["path"]) and not self._has_key(headers):
            return ApiError(
                401, "A key is needed, as Authorization: Bearer KEY, and there was none, or a wrong one.",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body_bytes:
            return ApiError(413, self._too_long, code="body_too_large", headers={"Connection": "close"})
        return None

    async def _forget(self, receive: Receive) -> None:
        """Receives the rest of a body that isn't wanted, as far as it is not absurd: a client that still sends
        when the connection is closed would not see the reply.
        """
        received = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS_FOR_A_BODY):
                while received < _FORGOTTEN_BODIES * self._max_body_bytes:
                    message = await receive()
                    received += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or any(
            len(folder) > 1 and folder.endswith("/") and path.startswith(folder) for folder in self._open_paths
        )

    def _has_key(self, headers: Headers) -> bool:
        """Compares digests, all of them and each whole, so that time tells nothing of the keys."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)

    def _limited(self, receive: Receive) -> Receive:
        """Returns a `receive` that ends when the body is too long or doesn't come."""
        received, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + _SECONDS_FOR_A_BODY

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:  # What is waited for now is the client's leaving.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {_SECONDS_FOR_A_BODY:g} seconds") from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > self._max_body_bytes:
                if not is_whole:
                    await self._forget(receive)
                raise HTTPException(413, self._too_long.rstrip("."), headers={"Connection": "close"})
            return message

        return limited

    @property
    def _too_long(self) -> str:
        return f"A body may have {self._max_body_bytes:,} bytes; this one has more."


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    """Returns `localhost` of `localhost:8000`, and `[::1]` of `[::1]:8000`."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
