"""Describes the server's responses for the OpenAPI document. The replies themselves are plain dicts."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong: a message, the type, the parameter, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response whose status is not 200."""

    error: ErrorDetail


class TokenUsage(BaseModel):
    """Numbers of tokens of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ToolCallFunction(BaseModel):
    """A function that the model calls. The arguments are the text of a JSON object."""

    name: str
    arguments: str


class ReplyToolCall(BaseModel):
    """A call of a tool by the model."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatMessage(BaseModel):
    """The message of the model. Its content is null beside tool calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ReplyToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None


class ChatReply(BaseModel):
    """Reply of POST /v1/chat/completions. With stream=true it comes as events, each with a chunk of it."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage


class CompletionChoice(BaseModel):
    """One continuation of a text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class CompletionReply(BaseModel):
    """Reply of POST /v1/completions. With stream=true it comes as events, each with a chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class ModelReply(BaseModel):
    """A model that requests can name, with its base model if it is an adapter, and the version of its weights."""

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
    """Reply of GET /health, with the numbers of answers that are being generated and that wait."""

    status: Literal["ok"]
    models: list[str]
    running: int
    queued: int


class FeedbackStored(BaseModel):
    """Reply of POST /feedback."""

    stored: bool


_ERRORS = {
    400: "The request is invalid",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The request body was not complete in time",
    413: "The request body is too long",
    415: "The request body is not JSON",
    429: "The request queue is full",
    500: "Internal server error",
    503: "The server is shutting down",
    504: "The answer took too long",
}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON of a chunk or an error; [DONE] at the end."}},
    "required": ["data"],
}


def documented_responses(*statuses: int, events: bool = False) -> dict[int | str, dict[str, Any]]:
    """Returns the `responses` of a route for the OpenAPI document.

    Args:
        statuses: HTTP status codes of the errors it may answer with.
        events: Whether its reply can be streamed as events.
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses
    }
    if events:
        found[200] = {"content": {"text/event-stream": {"schema": _EVENT}}}
    return found
