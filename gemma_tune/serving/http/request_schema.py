"""What may be asked, as OpenAI's API reference has it, with top_k, min_p and repetition_penalty besides.

What this server can't do is refused by name; what would change nothing is let through.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gemma_tune.config_checks import MOST_CANDIDATES
from gemma_tune.serving.sampling import MAX_LOGPROBS

_MAX_CHARACTERS_OF_STOP = 256
# What is known but can't be done -> the values that ask for nothing.
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


def _whole(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no text."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("value", "holds half a surrogate pair, which no text has") from None
    return text


Unicode = Annotated[str, AfterValidator(_whole)]


class StrictBody(BaseModel):
    """Nothing is guessed: "1" is no number, and an argument that doesn't exist is an error."""

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
                raise PydanticCustomError("unsupported", "can't be used with this server", {"param": name})
        return kept


class TextPart(StrictBody):
    """A part of a message. There are only texts."""

    type: Literal["text"]
    text: Unicode

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("unsupported", "a part of type {kind} can't be read, only text", {"kind": kind})
        return values


def _kind_of(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Unicode, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind_of),
]
Text = Annotated[Unicode, Field(min_length=1, max_length=_MAX_CHARACTERS_OF_STOP)]
StopStrings = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Field(max_length=16), Tag("<list>")],
    Discriminator(_kind_of),
]


class Message(StrictBody):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        """All of what it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(StrictBody):
    """Of an answer in pieces."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(StrictBody):
    """What both kinds of completions may ask. None: as the server was started."""

    model: Unicode = Field(examples=["gemma"])
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MOST_CANDIDATES, description="0 and -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What doesn't bear on the answer.
    user: Unicode | None = None
    metadata: dict[str, Unicode] | None = None
    safety_identifier: Unicode | None = None
    prompt_cache_key: Unicode | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value", "only with stream=true", {"param": "stream_options"})
        return self


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _logprobs_first(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value", "only with logprobs=true", {"param": "top_logprobs"})
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
    """An answer, and what is said of it."""

    model: Unicode = Field(max_length=1000)
    version: Unicode = Field(max_length=1000)
    text: Unicode
    verdict: Literal["up", "down"] | None = None
    correction: Unicode | None = None


class TurnBody(StrictBody):
    """A turn of the conversation that is judged."""

    role: Literal["system", "user", "assistant"]
    content: Unicode


class FeedbackBody(StrictBody):
    """Body of POST /feedback. The same id again replaces what was said; one that says nothing takes it back."""

    id: Unicode = Field(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9-]+$")
    messages: list[TurnBody] = Field(min_length=1)
    answers: list[RatedAnswerBody] = Field(min_length=1, max_length=8)
    choice: int | None = Field(None, ge=0, lt=8)
    sampling: dict[str, float | int | Unicode | None] = {}

    @model_validator(mode="after")
    def _chooses_one(self) -> "FeedbackBody":
        if self.choice is not None and self.choice >= len(self.answers):
            raise PydanticCustomError("value", "there is no such answer", {"param": "choice"})
        return self
