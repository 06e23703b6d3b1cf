"""Metrics of tool calls: the right tools, and the right arguments.

Calls are read as models and APIs write them: JSON objects with `name` and `arguments` or `parameters`, alone, in a
list, in OpenAI's `tool_calls`, or between `<tool_call>` tags; Python calls in a `tool_code` block, as Gemma 3 writes
them; and FunctionGemma's `<start_function_call>call:NAME{key:value}<end_function_call>`. As in the Berkeley
Function-Calling Leaderboard, a call counts only as a whole. Arguments of Python calls without names are named by their
place, "0", "1" and so on: a text doesn't say what the tool calls them.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.json_answers import json_values
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

_FUNCTION_GEMMA = re.compile(r"<start_function_call>\s*call:([\w.-]+)(\{.*?\})\s*<end_function_call>", re.DOTALL)
_TOOL_CODE = re.compile(r"```tool_code\s*\n(.*?)```", re.DOTALL)
_PRINT = "print"  # Gemma is asked to write print(tool(…)) where it wants to see a result.
_KEY = re.compile(r"\s*([\w.-]+)\s*:")
_BARE = re.compile(r"[^,\]}]*")
_ESCAPE = "<escape>"


class ToolCall(NamedTuple):
    """A call of a tool.

    Attributes:
        name: Name of the tool.
        arguments: Arguments by name.
    """

    name: str
    arguments: Mapping[str, Any]


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Returns the tool calls in a text, in order; none if it has none that can be read."""
    found = [
        ToolCall(name, arguments)
        for name, body in _FUNCTION_GEMMA.findall(text)
        if (arguments := _parse_function_gemma(body)) is not None
    ]
    found = found or [call for code in _TOOL_CODE.findall(text) for call in _python_calls(code)]
    return found or [call for value in json_values(text) for call in _calls_in(value)]


def _calls_in(value: Any) -> Iterator[ToolCall]:
    """Yields the calls in a JSON value."""
    if isinstance(value, list):
        for each in value:
            yield from _calls_in(each)
    elif isinstance(value, dict):
        if isinstance(value.get("tool_calls"), list):
            yield from _calls_in(value["tool_calls"])
        elif isinstance(value.get("function"), dict):
            yield from _calls_in(value["function"])
        elif isinstance(value.get("name"), str) and ("arguments" in value or "parameters" in value):
            arguments = value["arguments"] if "arguments" in value else value["parameters"]
            if isinstance(arguments, str):  # As OpenAI's API has them.
                arguments = next(iter(json_values(arguments)), None)
            if isinstance(arguments, dict):
                yield ToolCall(value["name"], arguments)


def _python_calls(code: str) -> Iterator[ToolCall]:
    """Yields the calls in lines of Python whose arguments are literals."""
    try:
        tree = ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            named = [(str(place), value) for place, value in enumerate(node.args)]
            named += [(str(keyword.arg), keyword.value) for keyword in node.keywords]
            try:
                call = ToolCall(ast.unparse(node.func), {name: ast.literal_eval(value) for name, value in named})
            except (ValueError, TypeError):
                continue
            if call.name != _PRINT:
                yield call


def _parse_function_gemma(text: str) -> dict[str, Any] | None:
    try:
        value, end = _parse_value(text, 0)
    except (ValueError, IndexError, RecursionError):
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def _parse_value(text: str, start: int) -> tuple[Any, int]:
    """Returns the value of FunctionGemma's notation that begins at `start`, and where it ends."""
    while text[start].isspace():
        start += 1
    if text.startswith(_ESCAPE, start):
        end = text.index(_ESCAPE, start + len(_ESCAPE))
        return text[start + len(_ESCAPE) : end], end + len(_ESCAPE)
    if text[start] == "{":
        return _parse_items(text, start + 1, "}", _parse_pair, dict)
    if text[start] == "[":
        return _parse_items(text, start + 1, "]", _parse_value, list)
    bare = _BARE.match(text, start)
    assert bare is not None  # It matches the empty text too.
    word = bare[0].strip()
    try:
        return json.loads(word), bare.end()
    except ValueError:
        return word, bare.end()


def _parse_pair(text: str, start: int) -> tuple[tuple[str, Any], int]:
    key = _KEY.match(text, start)
    if key is None:
        raise ValueError
    value, end = _parse_value(text, key.end())
    return (key[1], value), end


def _parse_items(text: str, start: int, closing: str, parse: Callable, collect: Callable) -> tuple[Any, int]:
    items: list[Any] = []
    while True:
        while text[start].isspace() or text[start] == ",":
            start += 1
        if text[start] == closing:
            return collect(items), start + 1
        item, end = parse(text, start)
        if end == start:  # A bracket that closes something else, as in `[a}`: nothing can be read any more.
            raise ValueError
        items.append(item)
        start = end


def _names(calls: Sequence[ToolCall]) -> list[str]:
    return sorted(call.name for call in calls)


def _whole_calls(calls: Sequence[ToolCall]) -> list[str]:
    """Returns calls so that equal ones are equal texts: keys are in order, and 2 and 2.0 are the same."""
    return sorted(
        json.dumps([call.name, _plain(call.arguments)], sort_keys=True, ensure_ascii=False, default=str)
        for call in calls
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _compared(key: Callable[[Sequence[ToolCall]], list[str]]) -> Callable:
    def statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
        scores: list[float | None] = []
        for case, answer in zip(cases, answers, strict=True):
            wanted = parse_tool_calls(case.reference)
            scores.append(float(key(parse_tool_calls(answer)) == key(wanted)) if wanted else None)
        return mean_statistics(scores)

    return statistics


def _problem(cases: Sequence[EvalCase]) -> str:
    return "" if any(parse_tool_calls(case.reference) for case in cases) else "no wanted answer is a tool call."


TOOL_METRICS = (
    Metric("tool_name", "share of answers that call the wanted tools", _compared(_names), problem=_problem),
    Metric("tool_arguments", "share of answers that call the wanted tools with the wanted arguments",
           _compared(_whole_calls), problem=_problem),
)  # fmt: skip
