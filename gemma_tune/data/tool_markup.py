"""Writes tool declarations, calls and results as each family's chat template does.

The steps of a conversation hold them as JSON (data/rows/tool_steps.py). FunctionGemma and Gemma 4 have control tokens
for them, and a notation of their own in which strings stand between quote tokens; the text equals what the templates in
huggingface.co/google/functiongemma-270m-it and …/gemma-4-E2B-it render. Gemma 1 to 3 have no such tokens: there a call
is a JSON object between the tags `<tool_call>` and `</tool_call>`, as in Hermes' function calling
(github.com/NousResearch/Hermes-Function-Calling), which vLLM and others read.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

_TEXT_INTRODUCTION = """\
You may call functions. To call one, write its name and its arguments as JSON between two tags:
<tool_call>
{"name": "…", "arguments": {…}}
</tool_call>
Results stand between <tool_response> and </tool_response>. The functions are:
"""
# Keys of a schema that aren't names of properties where a schema stands in for its properties.
_SCHEMA_KEYS = ("description", "type", "properties", "required", "nullable")


@dataclasses.dataclass(frozen=True)
class TextToolMarkup:
    """The markup of families without tokens for tools.

    Attributes:
        introduction: Text before the declarations.
        control_tokens: Control tokens of the markup: none.
        response_start: Token with which the model asks for a result: none.
        results_in_model_turn: Whether the results of calls stand in the model's turn. Here they are the user's.
    """

    introduction: str = _TEXT_INTRODUCTION
    control_tokens: tuple[str, ...] = ()
    response_start: str = ""
    results_in_model_turn: bool = False

    def declarations(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Returns the text of a system turn that declares tools."""
        return self.introduction + "\n".join(_json(tool) for tool in tools)

    def call(self, name: str, arguments: Any) -> str:
        """Returns a call of a tool; arguments are an object, or a text where they are none."""
        return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"

    def result(self, name: str, response: Any) -> str:
        """Returns the result of a call."""
        return f"<tool_response>\n{_json({'name': name, 'content': response})}\n</tool_response>"


@dataclasses.dataclass(frozen=True)
class TokenToolMarkup:
    """The markup of a family with tokens for tools.

    Attributes:
        declaration: Tokens around a declaration.
        calling: Tokens around a call.
        response: Tokens around a result. After a call the model writes the first of them, and waits.
        quote: Token before and after a string.
        null: Spelling of null.
        has_sparse_schemas: Whether a schema leaves out what it doesn't say, as Gemma 4's do.
        results_in_model_turn: Whether the results of calls stand in the model's turn.
    """

    declaration: tuple[str, str]
    calling: tuple[str, str]
    response: tuple[str, str]
    quote: str
    null: str
    has_sparse_schemas: bool
    results_in_model_turn: bool = True

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Returns the tokens that open and close something; between quote tokens, none is taken for one."""
        return (*self.declaration, *self.calling, *self.response)

    @property
    def response_start(self) -> str:
        """Returns the token with which the model asks for a result."""
        return self.response[0]

    def declarations(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Returns what a system turn has at its end to declare tools."""
        start, end = self.declaration
        return "".join(f"{start}{self._declared(tool).strip()}{end}" for tool in tools)

    def call(self, name: str, arguments: Any) -> str:
        """Returns a call of a tool; arguments are an object, or a text where they are none."""
        inner = self._pairs(arguments) if isinstance(arguments, Mapping) else self._guarded(str(arguments))
        return f"{self.calling[0]}call:{name}{{{inner}}}{self.calling[1]}"

    def result(self, name: str, response: Any) -> str:
        """Returns the result of a call."""
        inner = self._pairs(response) if isinstance(response, Mapping) else "value:" + self._value(response)
        return f"{self.response[0]}response:{name or 'unknown'}{{{inner}}}{self.response[1]}"

    def _declared(self, tool: Mapping[str, Any]) -> str:
        text = f"declaration:{tool['name']}{{description:{self._string(tool.get('description', ''))}"
        schema = tool.get("parameters")
        if isinstance(schema, Mapping) and schema:
            inner = []
            if isinstance(schema.get("properties"), Mapping) and schema["properties"]:
                inner.append(f"properties:{{{self._properties(schema['properties'])}}}")
            if schema.get("required"):
                inner.append(f"required:{self._value(list(schema['required']))}")
            inner.append(f"type:{self._kind(_kind_of(schema) or 'object')}")
            text += f",parameters:{{{','.join(inner)}}}"
        return text + "}"

    def _properties(self, properties: Mapping[str, Any], are_schema_keys: bool = False) -> str:
        """Returns the schemas of properties, in the order of their names."""
        skipped = () if self.has_sparse_schemas and not are_schema_keys else _SCHEMA_KEYS
        named = [(name, schema) for name, schema in _sorted(properties) if name not in skipped]
        return ",".join(
            f"{name}:{{{self._schema(schema if isinstance(schema, Mapping) else {})}}}" for name, schema in named
        )

    def _schema(self, schema: Mapping[str, Any]) -> str:
        kind = _kind_of(schema)
        description, inner = schema.get("description"), []
        if description or not self.has_sparse_schemas:
            inner.append(f"description:{self._string(description or '')}")
        if kind.upper() == "STRING" and schema.get("enum"):
            inner.append(f"enum:{self._value(schema['enum'])}")
        if kind.upper() == "ARRAY" and isinstance(schema.get("items"), Mapping) and schema["items"]:
            inner.append(f"items:{{{self._items(schema['items'])}}}")
        if schema.get("nullable") and self.has_sparse_schemas:
            inner.append("nullable:true")
        if kind.upper() == "OBJECT":
            properties = schema.get("properties")
            inner_properties = (
                self._properties(properties)
                if isinstance(properties, Mapping)
                else self._properties(schema, are_schema_keys=True)
            )
            inner.append(f"properties:{{{inner_properties}}}")
            if schema.get("required"):
                inner.append(f"required:{self._value(list(schema['required']))}")
        return ",".join([*inner, f"type:{self._kind(kind)}"])

    def _items(self, items: Mapping[str, Any]) -> str:
        """Returns the schema of an array's items."""
        inner = []
        for name, value in _sorted(items):
            if name == "properties":
                value_text = f"{{{self._properties(value) if isinstance(value, Mapping) else ''}}}"
            elif name == "type" and isinstance(value, (str, list)):
                kinds = [str(kind).upper() for kind in (value if isinstance(value, list) else [value])]
                value_text = self._value(kinds if isinstance(value, list) else kinds[0])
            else:
                value_text = self._value(value, quotes_keys=True)
            inner.append(f"{name}:{value_text}")
        return ",".join(inner)

    def _kind(self, kind: str) -> str:
        return self._string(kind.upper())

    def _pairs(self, values: Mapping[str, Any], quotes_keys: bool = False) -> str:
        return ",".join(
            f"{self._string(str(key)) if quotes_keys else self._guarded(str(key))}:{self._value(value, quotes_keys)}"
            for key, value in _sorted(values)
        )

    def _value(self, value: Any, quotes_keys: bool = False) -> str:
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, Mapping):
            return f"{{{self._pairs(value, quotes_keys)}}}"
        if isinstance(value, (list, tuple)):
            return f"[{','.join(self._value(each, quotes_keys) for each in value)}]"
        return self.null if value is None else str(value)

    def _string(self, text: Any) -> str:
        return f"{self.quote}{self._guarded(str(text))}{self.quote}"

    def _guarded(self, text: str) -> str:
        """Returns a text in which no quote token can end the string early."""
        return text.replace(self.quote, '"')


def _kind_of(schema: Mapping[str, Any]) -> str:
    """Returns the type of a schema, the first where it may be of several; an empty text where it names none."""
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    return kind if isinstance(kind, str) else ""


def _sorted(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the items in the order of Jinja's `dictsort`, which folds case."""
    return sorted(values.items(), key=lambda item: str(item[0]).lower())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


TEXT_TOOLS = TextToolMarkup()
GEMMA4_TOOLS = TokenToolMarkup(
    declaration=("<|tool>", "<tool|>"),
    calling=("<|tool_call>", "<tool_call|>"),
    response=("<|tool_response>", "<tool_response|>"),
    quote='<|"|>',
    null="null",
    has_sparse_schemas=True,
)
FUNCTION_GEMMA_TOOLS = TokenToolMarkup(
    declaration=("<start_function_declaration>", "<end_function_declaration>"),
    calling=("<start_function_call>", "<end_function_call>"),
    response=("<start_function_response>", "<end_function_response>"),
    quote="<escape>",
    null="None",
    has_sparse_schemas=False,
)
