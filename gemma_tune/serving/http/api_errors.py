"""The server's errors, all in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from gemma_tune.errors import GemmaTuneError

INVALID, SERVER, RATE = "invalid_request_error", "server_error", "rate_limit_error"
RETRY_AFTER_SECONDS = 1
_LOG = logging.getLogger("gemma_tune.serving")
_CODES = {
    400: "invalid_body",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    415: "not_json",
}


class ApiError(Exception):
    """An error with its HTTP status and the fields of OpenAI's error body.

    Args:
        status: HTTP status code.
        message: Message for people.
        kind: Type of the error, as OpenAI names it.
        param: Name of the wrong parameter, if there is one.
        code: Code for programs.
        headers: HTTP headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, _printable(message), kind, code
        self.param = param and _printable(param)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def _printable(text: str) -> str:
    """Escapes lone surrogates, which names in a request may contain and no reply can."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(param: str, message: str) -> ApiError:
    """Returns the error for a wrong parameter."""
    return ApiError(400, f"{param}: {message}.", param=param, code="invalid_value")


def queue_full() -> ApiError:
    """Returns the error for a request that finds the queue full."""
    return ApiError(
        429,
        "The request queue is full. Try again later.",
        kind=RATE,
        code="rate_limit_exceeded",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def shutting_down() -> ApiError:
    """Returns the error for a request that comes while the server stops."""
    return ApiError(
        503,
        "The server is shutting down.",
        kind=SERVER,
        code="shutting_down",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def timed_out(seconds: float) -> ApiError:
    """Returns the error for a request that took longer than is allowed."""
    # The header keeps OpenAI's clients from sending the same request again.
    return ApiError(
        504,
        f"The answer was not complete within {seconds:g} seconds. Ask for fewer tokens (max_tokens).",
        kind=SERVER,
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def server_failed(message: str = "") -> ApiError:
    """Returns the error for a failure that is no fault of the request."""
    return ApiError(500, message or "Internal server error. See the server's log.", kind=SERVER, code="server_error")


def install_error_handlers(app: FastAPI) -> None:
    """Makes an application answer all errors in this form."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}."
        found = ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers)
        return found.response()

    @app.exception_handler(GemmaTuneError)
    async def on_package_error(request: Request, error: GemmaTuneError) -> JSONResponse:
        _LOG.error("%s %s: %s", request.method, request.url.path, error)
        return server_failed(str(error)).response()

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return server_failed().response()  # Starlette raises it again, so that its traceback is logged.


def _validation_error(error: RequestValidationError) -> ApiError:
    """Returns the first problem with a body, with its place in the JSON, such as `messages[0].content`."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    place = ""
    for part in first["loc"][1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):  # Else it names one of several types.
            place += f".{part}" if place else part
    message = str(first["msg"])
    if not place and first["type"] in ("model_attributes_type", "dict_type", "model_type"):
        message = "The body must be a JSON object with Content-Type: application/json"
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place}: there is no such parameter.", param=place, code="unknown_parameter")
    if first["type"] == "missing":
        what = place or "A JSON body with Content-Type: application/json"
        return ApiError(400, f"{what} is missing.", param=place or None, code="missing_required_parameter")
    code = "unsupported_parameter" if first["type"] == "unsupported" else "invalid_value"
    place = first.get("ctx", {}).get("param", place)
    return ApiError(400, f"{place}: {message}." if place else f"{message}.", param=place or None, code=code)
