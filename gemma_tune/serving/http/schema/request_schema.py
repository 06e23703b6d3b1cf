"""The requests that clients may send: those of OpenAI's API, with top_k, min_p and repetition_penalty in addition.

Parameters that this server doesn't support are refused by name, unless their value asks for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gemma_tune.config_checks import MAX_TOP_K
from gemma_tune.serving.http.schema.message_schema import Message, kind_of
from gemma_tune.serving.http.schema.strict_body import StrictBody, Unicode
from gemma_tune.serving.http.schema.tool_schema import ResponseFormat, ToolBody, ToolChoice
from gemma_tune.serving.logit_changes import MAX_BIASED_TOKENS
from gemma_tune.serving.sampling import MAX_LOGPROBS

_MAX_STOP_CHARACTERS = 256
Text = Annotated[Unicode, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Field(max_length=16), Tag("<list>")],
    Discriminator(kind_of),
]


AS_MUCH_AS_FITS = -1  # As max_tokens, which several clients send.


def _no_length_of_zero(value: int) -> int:
    if value < 1 and value != AS_MUCH_AS_FITS:
        raise PydanticCustomError("value", "must be at least 1, or -1 for as much as there is room")
    return value


MaxTokens = Annotated[int, Field(ge=-1), AfterValidator(_no_length_of_zero)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class StreamOptions(StrictBody):
    """Options of a streamed reply."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(StrictBody):
    """The parameters that chats and completions share. None means the server's default."""

    model: Unicode = Field(examples=["gemma"])
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: MaxTokens | None = Field(None, description="-1, or more than there is room: as much as there is.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOP_K, description="0 and -1 mean all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[Unicode, Bias] | None = Field(None, max_length=MAX_BIASED_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted, but without influence on the answer.
    user: Unicode | None = None
    metadata: dict[str, Unicode] | None = None
    safety_identifier: Unicode | None = None
    prompt_cache_key: Unicode | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts before the first of which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value", "requires stream=true", {"param": "stream_options"})
        return self


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    tools: list[ToolBody] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def offered_tools(self) -> list[ToolBody]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value", "requires logprobs=true", {"param": "top_logprobs"})
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    return "<ids>" if isinstance(first, int) else "<lists>" if isinstance(first, list) else "<texts>"


CompletionPrompt = Annotated[
    Annotated[Unicode, Tag("<text>")]
    | Annotated[list[Unicode], Field(min_length=1), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1), Tag("<lists>")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: CompletionPrompt
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class RatedAnswerBody(StrictBody):
    """An answer with the user's feedback on it."""

    model: Unicode = Field(max_length=1000)
    version: Unicode = Field(max_length=1000)
    text: Unicode
    verdict: Literal["up", "down"] | None = None
    correction: Unicode | None = None


class TurnBody(StrictBody):
    """A message of the conversation that the feedback is about."""

    role: Literal["system", "user", "assistant"]
    content: Unicode


class FeedbackBody(StrictBody):
    """Body of POST /feedback. It replaces earlier feedback with the same id; if it contains none, it deletes that."""

    id: Unicode = Field(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9-]+$")
    messages: list[TurnBody] = Field(min_length=1)
    answers: list[RatedAnswerBody] = Field(min_length=1, max_length=8)
    choice: int | None = Field(None, ge=0, lt=8)
    sampling: dict[str, float | int | Unicode | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_choice(self) -> "FeedbackBody":
        if self.choice is not None and self.choice >= len(self.answers):
            raise PydanticCustomError("value", "there is no answer with this index", {"param": "choice"})
        return self
