"""What a request says of the form of its answer: tools that may be called, and JSON."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gemma_tune.serving.http.schema.strict_body import StrictBody, Unicode


class FunctionBody(StrictBody):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Unicode | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(StrictBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionBody


class FunctionName(StrictBody):
    """The name of a function."""

    name: Unicode


class NamedChoice(StrictBody):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


def _kind_of_choice(value: Any) -> str:
    return "<object>" if isinstance(value, (dict, NamedChoice)) else "<word>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedChoice, Tag("<object>")],
    Discriminator(_kind_of_choice),
]


class JsonSchemaBody(StrictBody):
    """A JSON schema for answers. `strict` may be either: answers always follow the schema."""

    name: Unicode | None = None
    description: Unicode | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(StrictBody):
    """Answers are text."""

    type: Literal["text"]


class JsonObjectFormat(StrictBody):
    """Answers are JSON objects."""

    type: Literal["json_object"]


class JsonSchemaFormat(StrictBody):
    """Answers are JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaBody


def _kind_of_format(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("json_object", "json_schema") else "<text>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(_kind_of_format),
]
