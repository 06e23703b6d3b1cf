"""The requests that clients may send: those of OpenAI's API, with top_k, min_p and repetition_penalty in addition.

Parameters that this server doesn't support are refused by name, unless their value asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gemma_tune.config_checks import MAX_TOP_K
from gemma_tune.serving.sampling import MAX_LOGPROBS

_MAX_STOP_CHARACTERS = 256
# Known parameter that isn't supported -> values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "annotations": (None, []),
    "refusal": (None,),
    "modalities": (None, ["text"]),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    "store": (None, False),
    "suffix": (None, ""),
    "echo": (None, False),
}


def _without_lone_surrogates(text: str) -> str:
    """Returns the text if it is valid Unicode. JSON can spell lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("value", "must be valid Unicode, but contains a lone surrogate") from None
    return text


Unicode = Annotated[str, AfterValidator(_without_lone_surrogates)]


class StrictBody(BaseModel):
    """A body without guesses: "1" is not a number, and a parameter that doesn't exist is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields or name not in _UNSUPPORTED:
                kept[name] = value
            elif value not in _UNSUPPORTED[name]:
                raise PydanticCustomError("unsupported", "is not supported by this server", {"param": name})
        return kept


class TextPart(StrictBody):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: Unicode

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("unsupported", "only text is supported, not {kind}", {"kind": kind})
        return values


def _kind_of(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Unicode, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind_of),
]
Text = Annotated[Unicode, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Field(max_length=16), Tag("<list>")],
    Discriminator(_kind_of),
]


class Message(StrictBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        """The whole text of the message."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(StrictBody):
    """Options of a streamed reply."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(StrictBody):
    """The parameters that chats and completions share. None means the server's default."""

    model: Unicode = Field(examples=["gemma"])
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOP_K, description="0 and -1 mean all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
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
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
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
    best_of: int | None = Field(None, ge=1, le=1)


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
    sampling: dict[str, float | int | Unicode | None] = {}

    @model_validator(mode="after")
    def _check_choice(self) -> "FeedbackBody":
        if self.choice is not None and self.choice >= len(self.answers):
            raise PydanticCustomError("value", "there is no answer with this index", {"param": "choice"})
        return self
