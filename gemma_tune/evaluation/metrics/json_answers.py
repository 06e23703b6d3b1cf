"""Metrics of JSON in answers: whether it can be read, is the wanted value, and follows a schema."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError, DataError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

SCHEMA_COLUMNS = ("json_schema", "schema")
_FENCE = re.compile(r"```([\w+#.-]*)(.*?)```[ \t]*$", re.DOTALL | re.MULTILINE)  # Its language, and what is in it.
_TAG = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_NOTHING = object()


def json_values(text: str) -> Iterator[Any]:
    """Yields the JSON values that a text consists of: the whole text, or its fenced blocks, or its tool-call tags."""
    whole = _parsed(text)
    if whole is not _NOTHING:
        yield whole
        return
    blocks = [block for language, block in _FENCE.findall(text) if language.lower() in ("", "json")]
    for block in blocks or _TAG.findall(text):
        value = _parsed(block)
        if value is not _NOTHING:
            yield value


def _parsed(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are Python's, not JSON's.

    try:
        return json.loads(text.strip(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _answer_value(text: str) -> Any:
    return next(json_values(text), _NOTHING)


def _valid(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    return mean_statistics([float(_answer_value(answer) is not _NOTHING) for answer in answers])


def _matching(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    scores: list[float | None] = []
    for case, answer in zip(cases, answers, strict=True):
        wanted = _answer_value(case.reference)
        scores.append(None if wanted is _NOTHING else float(_same(_answer_value(answer), wanted)))
    return mean_statistics(scores)


def _same(first: Any, second: Any) -> bool:
    """Returns whether two JSON values are equal: true is not 1, and the order of keys doesn't count."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


def _following_schema(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    scores: list[float | None] = []
    for is_valid, answer in zip(_checkers(cases), answers, strict=True):
        value = _answer_value(answer)
        scores.append(None if is_valid is None else float(value is not _NOTHING and is_valid(value)))
    return mean_statistics(scores)


def _checkers(cases: Sequence[EvalCase]) -> list[Callable[[Any], bool] | None]:
    """Returns the function that checks a value by each case's schema; None for a case without one."""
    found: dict[str, Callable[[Any], bool]] = {}
    checkers: list[Callable[[Any], bool] | None] = []
    for case in cases:
        schema = schema_of(case)
        key = json.dumps(schema, sort_keys=True)
        if schema is not None and key not in found:
            found[key] = _checker(schema, case.origin)
        checkers.append(found.get(key))
    return checkers


def schema_of(case: EvalCase) -> Any:
    """Returns the JSON schema in a case's row; None if it has none.

    Raises:
        DataError: The column holds a text that is no JSON.
    """
    name = next((name for name in SCHEMA_COLUMNS if case.columns.get(name) not in (None, "")), None)
    if name is None:
        return None
    schema = case.columns[name]
    if isinstance(schema, str):
        schema = _parsed(schema)
    if not isinstance(schema, (dict, bool)):
        raise DataError(
            f"{case.origin}: {name!r} should be a JSON schema, an object, found {case.columns[name]!r:.60}."
        )
    return schema


def _checker(schema: Any, origin: str) -> Callable[[Any], bool]:
    try:
        import jsonschema
    except ImportError as error:
        raise ConfigError(
            "The metric json_schema needs the package jsonschema. Run: pip install 'gemma-tune[eval]'"
        ) from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise DataError(f"{origin}: the JSON schema is wrong: {error.message}") from error
    return kind(schema).is_valid


def _no_json(cases: Sequence[EvalCase]) -> str:
    has_json = any(_answer_value(case.reference) is not _NOTHING for case in cases)
    return "" if has_json else "no wanted answer is JSON."


def _no_schema(cases: Sequence[EvalCase]) -> str:
    if not any(case.columns.get(name) not in (None, "") for case in cases for name in SCHEMA_COLUMNS):
        return f"no row has a JSON schema in a column {' or '.join(SCHEMA_COLUMNS)}."
    if importlib.util.find_spec("jsonschema") is None:
        return "it needs the package jsonschema: pip install 'gemma-tune[eval]'"
    _checkers(cases)  # Raises for a wrong schema now, not after all answers.
    return ""


JSON_METRICS = (
    Metric("json_valid", "share of answers that are JSON, alone or in a fenced block", _valid),
    Metric("json_match", "share of answers that are the wanted JSON value", _matching, problem=_no_json),
    Metric("json_schema", "share of answers that follow the JSON schema of their row", _following_schema,
           problem=_no_schema),
)  # fmt: skip
