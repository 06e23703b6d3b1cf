"""Tools as text of a prompt, for models whose vocabulary has no tokens for tools.

Gemma 3 was not trained on one form of tool calls. Google's guide to function calling with Gemma
(ai.google.dev/gemma/docs/capabilities/function-calling) describes two, of which this is the one with JSON: functions
are declared in the instructions, and a call is an answer that is nothing but `{"name": …, "parameters": {…}}`, or a
list of such objects.

    instructions   You can call these functions:
                   [{"name": "find", "description": "…", "parameters": {…}}]
                   To call one, answer with nothing but … (`_HOW_TO_CALL`)
    model turn     {"name": "find", "parameters": {"title": "Emma"}}
    user turn      {"name": "find", "response": {"shelf": 4}}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_DECLARATION = "You can call these functions:\n"
_HOW_TO_CALL = (
    '\nTo call one, answer with nothing but a JSON object: {"name": FUNCTION, "parameters": {ARGUMENT: VALUE}}. '
    "To call several, answer with nothing but a list of such objects. Otherwise answer as usual."
)


class Tool(NamedTuple):
    """A function that the model may call.

    Attributes:
        name: Name of the function.
        description: What it does; "" if that isn't said.
        parameters: JSON schema of its arguments, an object; None if that isn't said.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] | None


class CalledTool(NamedTuple):
    """A call of a tool.

    Attributes:
        name: Name of the function.
        arguments: Arguments by name.
    """

    name: str
    arguments: Mapping[str, Any]


def declaration_text(tools: Sequence[Tool]) -> str:
    """Returns the instructions that declare tools."""
    declared = []
    for tool in tools:
        described = {"description": tool.description} if tool.description else {}
        declared.append(_json({"name": tool.name, **described, "parameters": tool.parameters or {"type": "object"}}))
    return f"{_DECLARATION}[" + ",\n".join(declared) + f"]{_HOW_TO_CALL}" if declared else ""


def calls_text(calls: Sequence[CalledTool]) -> str:
    """Returns the calls of one turn as the model writes them."""
    written = [_json({"name": call.name, "parameters": call.arguments}) for call in calls]
    return written[0] if len(written) == 1 else f"[{', '.join(written)}]"


def result_text(name: str, content: str) -> str:
    """Returns what a tool has returned. A content that is JSON stays JSON."""
    try:
        value = json.loads(content)
    except ValueError:
        value = content
    return _json({"name": name, "response": value})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
