"""The messages of a conversation, as clients send them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gemma_tune.serving.http.schema.strict_body import StrictBody, Unicode


class TextPart(StrictBody):
    """A part of a message. Only text is supported. `cache_control` is a hint that this server doesn't need."""

    type: Literal["text"]
    text: Unicode
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("unsupported", "only text is supported, not {kind}", {"kind": kind})
        return values


def kind_of(value: Any) -> str:
    """Returns the tag of a value that is a text or a list. Tags in angle brackets aren't shown in errors."""
    return "<list>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Unicode, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<list>")],
    Discriminator(kind_of),
]


class CalledFunction(StrictBody):
    """A function that was called, and its arguments, which are the text of a JSON object."""

    name: Unicode = Field(min_length=1)
    arguments: Unicode


class MessageToolCall(StrictBody):
    """A call of a tool in a message of the assistant. `index` is left over where a client has put a stream together."""

    id: Unicode
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(StrictBody):
    """A message of a conversation. `name` is accepted, but without influence on the answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Unicode | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Unicode | None = None

    @property
    def text(self) -> str:
        """The whole text of the message; "" if it has none."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)
