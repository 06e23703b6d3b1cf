"""What is answered, described for the OpenAPI document. The replies themselves are plain dicts."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, where, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every reply that isn't 200."""

    error: ErrorDetail


class TokenUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class ChatReply(BaseModel):
    """Reply of POST /v1/chat/completions. With stream=true, events whose data are pieces of it."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class CompletionReply(BaseModel):
    """Reply of POST /v1/completions. With stream=true, events whose data are pieces of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class ModelReply(BaseModel):
    """A model that can be named in requests. parent: the one under an adapter. version: of its weights."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    version: str
    max_model_len: int


class ModelList(BaseModel):
    """Reply of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelReply]


class HealthReply(BaseModel):
    """Reply of GET /health. Answers that are written, and that wait."""

    status: Literal["ok"]
    models: list[str]
    running: int
    queued: int


class FeedbackStored(BaseModel):
    """Reply of POST /feedback."""

    stored: bool


_ERRORS = {
    400: "Something in the request is wrong",
    401: "No key, or a wrong one",
    404: "There is no such model",
    408: "The body didn't come in time",
    413: "The body is too long",
    415: "The body is no JSON",
    429: "The server is busy",
    500: "The server failed",
    503: "The server is shutting down",
    504: "The answer took too long",
}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON of a piece or an error; [DONE] at the end."}},
    "required": ["data"],
}


def documented_responses(*statuses: int, events: bool = False) -> dict[int | str, dict[str, Any]]:
    """Returns a route's `responses`: these errors, and events beside the JSON of a reply if it can be streamed."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses
    }
    if events:
        found[200] = {"content": {"text/event-stream": {"schema": _EVENT}}}
    return found
