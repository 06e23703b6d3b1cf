"""Reads declarations, calls and results of tools, in OpenAI's, ShareGPT's and Anthropic's shapes, into steps.

The steps hold JSON of one form each, which every chat template can write in its own way (data/tool_markup.py).
"""

import json
from collections.abc import Mapping
from typing import Any

from gemma_tune.data.example import Turn
from gemma_tune.data.rows.cell_text import json_text, without_nulls
from gemma_tune.errors import DataError


def tools_turn(tools: Any, origin: str) -> Turn | None:
    """Returns the turn that declares the tools of a row; None where there are none.

    Args:
        tools: A list of declarations `{"type": "function", "function": {…}}` or `{"name", "description",
            "parameters"}`, one such object, or JSON of them.
        origin: File and line, for the error.

    Raises:
        DataError: It is something else.
    """
    declared = _parsed(tools)
    declared = [declared] if isinstance(declared, Mapping) else declared
    if not declared:
        return None
    if not isinstance(declared, list):
        raise DataError(f"{origin}: 'tools' must be a list of functions, or JSON of one; found {tools!r:.60}.")
    return Turn("tools", json_text([_declaration(each, origin) for each in declared], "tools", origin))


def call_turns(calls: Any, origin: str, is_learnt: bool = True) -> list[Turn]:
    """Returns the steps of calls.

    Args:
        calls: One or several of `{"function": {"name", "arguments"}}`, `{"name", "arguments"}` and `{"name", "input"}`,
            or JSON of them. Arguments may be JSON.
        origin: File and line, for the error.
        is_learnt: Whether the model learns them.

    Raises:
        DataError: It is something else.
    """
    parsed = _parsed(calls)
    return [
        Turn("call", json_text(_call(each, origin), "tool_calls", origin), is_learnt)
        for each in (parsed if isinstance(parsed, list) else [parsed])
    ]


def result_turn(name: str, response: Any, origin: str) -> Turn:
    """Returns the step of a call's result.

    Args:
        name: Name of the tool; '' where it isn't known.
        response: A text, which stays one, or an object.
        origin: File and line, for the error.
    """
    result = {"name": name, "response": without_nulls(response)}
    return Turn("tool", json_text(result, "content", origin))


def call_names(calls: Any) -> dict[str, str]:
    """Returns the name of the tool that each call of a message is of, by the id of the call."""
    names = {}
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            function = call.get("function")
            name = function.get("name") if isinstance(function, Mapping) else call.get("name")
            names[call["id"]] = name if isinstance(name, str) else ""
    return names


def is_native_result(value: Any) -> bool:
    """Returns whether a value is a result as Google has it: an object with `name` and `response`."""
    return isinstance(value, Mapping) and isinstance(value.get("name"), str) and value.get("response") is not None


def native_result_turns(result: Any, origin: str) -> list[Turn]:
    """Returns the step of a result as Google has it.

    Raises:
        DataError: It is something else.
    """
    if not is_native_result(result):
        raise DataError(f"{origin}: a tool's response needs 'name' and 'response', found {result!r:.60}.")
    return [result_turn(result["name"], result["response"], origin)]


def _declaration(tool: Any, origin: str) -> dict[str, Any]:
    tool = _parsed(tool)
    function = tool.get("function") if isinstance(tool, Mapping) else None
    declared = _parsed(function) if function is not None else tool
    if not isinstance(declared, Mapping) or not isinstance(declared.get("name"), str):
        raise DataError(f"{origin}: a tool needs a 'name', found {tool!r:.60}.")
    declared = without_nulls(declared)
    schema = _parsed(declared.get("parameters", declared.get("input_schema")))
    kept = {"name": declared["name"], "description": str(declared.get("description", ""))}
    return {**kept, "parameters": _checked_schema(schema, origin)} if schema else kept


def _checked_schema(schema: Any, origin: str) -> Any:
    """Returns a JSON schema whose parts have the types that the chat templates expect."""
    if not isinstance(schema, Mapping):
        raise DataError(f"{origin}: the 'parameters' of a tool must be a JSON schema, an object; found {schema!r:.60}.")
    kind, required = schema.get("type", ""), schema.get("required", [])
    if not (isinstance(kind, str) or (isinstance(kind, list) and kind and all(isinstance(k, str) for k in kind))):
        raise DataError(f"{origin}: the 'type' in the parameters of a tool must be a name, found {kind!r:.60}.")
    if not isinstance(required, list):
        raise DataError(f"{origin}: 'required' in the parameters of a tool must be a list, found {required!r:.60}.")
    for key in ("properties", "items"):
        inner = schema.get(key)
        for each in inner.values() if key == "properties" and isinstance(inner, Mapping) else [inner]:
            if isinstance(each, Mapping):
                _checked_schema(each, origin)
    return schema


def _call(call: Any, origin: str) -> dict[str, Any]:
    call = _parsed(call)
    function = call.get("function") if isinstance(call, Mapping) else None
    inner = _parsed(function) if isinstance(function, (Mapping, str)) and function else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"{origin}: a tool call needs a 'name' and 'arguments', found {call!r:.60}.")
    given: Any = next((inner[key] for key in ("arguments", "parameters", "input", "args") if inner.get(key)), {})
    return {"name": inner["name"], "arguments": without_nulls(_parsed(given))}


def _parsed(value: Any) -> Any:
    """Returns the object or list that a text holds as JSON; another value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
