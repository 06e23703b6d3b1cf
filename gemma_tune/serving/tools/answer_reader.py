"""Reads an answer piece by piece, and tells text for the user from calls of tools."""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from gemma_tune.serving.tools.tool_text import CalledTool

_FENCE = re.compile(r"^`{1,3}(\w*)$|^```\w*\n")
_BEGINNINGS = ('{"name":', '[{"name":')


class ReadAnswer(NamedTuple):
    """The end of an answer.

    Attributes:
        text: Text that had been held back; "" if there are calls.
        calls: Calls of tools.
    """

    text: str
    calls: tuple[CalledTool, ...]


class AnswerReader:
    """Reads one answer. Text is held back as long as it may become a call.

    Args:
        names: Names of the tools.
    """

    def __init__(self, names: Collection[str]):
        self._names = frozenset(names)
        self._held_back, self._is_text = "", False

    def push(self, text: str) -> str:
        """Takes the next piece, and returns the text that is certainly no call."""
        if self._is_text:
            return text
        self._held_back += text
        if _may_be_call(self._held_back):
            return ""
        self._is_text = True
        ready, self._held_back = self._held_back, ""
        return ready

    def finish(self) -> ReadAnswer:
        """Returns the calls, or the text that was held back."""
        calls = () if self._is_text else read_calls(self._held_back, self._names)
        return ReadAnswer("" if calls else self._held_back, calls)


def read_calls(text: str, names: Collection[str]) -> tuple[CalledTool, ...]:
    """Returns the calls that a text is; none if it is anything else, or calls a function that isn't among the names."""
    text = text.strip()
    if text.startswith("```"):
        text = _FENCE.sub("", text, count=1).removesuffix("```")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    values = value if isinstance(value, list) else [value]
    calls = [_call_of(each) for each in values]
    return tuple(call for call in calls if call) if all(call and call.name in names for call in calls) else ()


def _call_of(value: Any) -> CalledTool | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments"))
    return CalledTool(value["name"], arguments) if isinstance(arguments, dict) else None


def _may_be_call(text: str) -> bool:
    text = text.lstrip()
    if text.startswith("`"):
        fence = _FENCE.match(text)
        if fence is None:
            return False
        text = text[fence.end() :]
    compact = re.sub(r"\s", "", text[:200])
    return any(compact.startswith(beginning) or beginning.startswith(compact) for beginning in _BEGINNINGS)
