"""Reads what a judge replied: a JSON object if there is one, else what small models write in its place."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder()
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_VERDICTS = {"a": "A", "b": "B", "tie": "tie", "c": "tie", "draw": "tie", "equal": "tie", "both": "tie"}
_BRACKETED = re.compile(r"\[\[\s*(\w+)\s*\]\]")
_NAMED_VERDICT = re.compile(
    r"""verdict["'*]*\s*(?:is|[:=])["'*\s]*(?:answer[ _]|a\ (?=tie\b))?(a|b|tie)"""
    r"""(?=\s*(?:["'*.,;:)}\]]|\n|\Z|is\b|because\b))""",  # Not the article of "a better answer".
    re.IGNORECASE,
)
_NAMED_GRADE = re.compile(r"""grade["'*]*\s*(?:is|[:=])["'*\s]*(\d+(?:\.\d+)?)""", re.IGNORECASE)
_MAX_LETTERS = 10_000  # Of a reply, from its end, where the verdict is.
_LOWEST, _HIGHEST = 1.0, 5.0


class Verdict(NamedTuple):
    """What a judge decided.

    Attributes:
        value: `A`, `B` or `tie`; or a grade from 1.0 to 5.0.
        reason: The judge's reason; '' if it gave none.
    """

    value: str | float
    reason: str


def read_verdict(text: str) -> Verdict | None:
    """Returns the verdict `A`, `B` or `tie` in a judge's reply; None if there is none."""
    return _read(text, "verdict", _as_verdict, (_NAMED_VERDICT, _BRACKETED))


def read_grade(text: str) -> Verdict | None:
    """Returns the grade from 1.0 to 5.0 in a judge's reply; None if there is none."""
    return _read(text, "grade", _as_grade, (_NAMED_GRADE, _BRACKETED))


def _read(
    text: str, key: str, convert: Callable[[Any], str | float | None], patterns: tuple[re.Pattern[str], ...]
) -> Verdict | None:
    """Looks for the last JSON object with the key, then for what the patterns match, then at the text as a whole."""
    said = _THOUGHTS.sub("", text).strip()[-_MAX_LETTERS:]
    for found in reversed(list(_json_objects(said))):
        lowered = {str(name).lower(): value for name, value in found.items()}
        value = convert(lowered.get(key))
        if value is not None:
            reason = lowered.get("reason", "")
            return Verdict(value, reason if isinstance(reason, str) else "")
    for pattern in patterns:
        matches = pattern.findall(said)
        value = convert(matches[-1]) if matches else None
        if value is not None:
            return Verdict(value, "")
    value = convert(said)
    return None if value is None else Verdict(value, "")


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects in a text, wherever they begin."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _as_verdict(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    word = value.strip(" \n\"'.*[]()`").lower().replace("_", " ").removeprefix("answer ")
    return _VERDICTS.get(word)


def _as_grade(value: Any) -> float | None:
    if isinstance(value, str):
        value = value.strip(" \n\"'.*[]()`")
        try:
            value = float(re.sub(r"\s*/\s*5$", "", value))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if _LOWEST <= value <= _HIGHEST else None
