"""Turns the values of columns and messages into text: numbers as people write them, lists of parts joined."""

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_tune.errors import DataError

_LONGEST_WHOLE = 1e16  # From here on, a float no longer tells neighbouring whole numbers apart.
_NOT_TEXT = ("image", "audio", "video", "file", "input_image", "input_audio", "input_file", "image_url", "video_url")


def cell_text(value: Any, name: str, origin: str, changes: list[str]) -> str:
    """Returns a value as text.

    Args:
        value: A text; None and NaN, which are an empty text; a number, boolean or date, as a person writes it.
        name: Name of the column or key, for the error.
        origin: File and line, for the error.
        changes: List that gets `values_as_text` where the value was no text.

    Raises:
        DataError: The value is of another kind, or holds half of a surrogate pair.
    """
    if isinstance(value, str):
        return value if value.isascii() else whole_text(value, name, origin)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = _scalar_text(value)
    if text is None:
        raise DataError(f"{origin}: {name!r} must be a text or a number, found {type(value).__name__}: {value!r:.60}")
    changes.append("values_as_text")
    return text


def whole_text(text: str, name: str, origin: str) -> str:
    """Returns a text that a tokenizer can read. JSON can spell a lone surrogate, which none can.

    Raises:
        DataError: The text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(f"{origin}: {name!r} holds {half!r}, half of a surrogate pair.") from error
    return text


def answer_text(value: Any, name: str, origin: str, changes: list[str]) -> str:
    """Returns an answer as text.

    Arguments and errors are those of `cell_text`. Of a list of texts the first is taken, also where it is SQuAD's
    `{"text": […], "answer_start": […]}`; an object becomes JSON.
    """
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        if len(set(value)) > 1:
            changes.append("first_of_answers")
        value = value[0] if value else ""
    if isinstance(value, Mapping):
        changes.append("values_as_text")
        return json_text(value, name, origin)
    return cell_text(value, name, origin, changes)


def json_text(value: Any, name: str, origin: str) -> str:
    """Returns a value as JSON.

    Raises:
        DataError: The value can't be written as JSON.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {name!r} can't be written as JSON: {error}. Found {value!r:.60}.") from error
    return whole_text(text, name, origin)


def joined_parts(parts: list, name: str, origin: str, changes: list[str]) -> str:
    """Returns the texts of the parts of a message, such as `[{"type": "text", "text": "…"}]`.

    Between two parts stands a line end where no white space is, so that words aren't glued together.

    Raises:
        DataError: A part is an image, a sound or something else that is no text.
    """
    joined = ""
    for part in parts:
        text = _part_text(part, name, origin, changes)
        if joined and text and not joined[-1].isspace() and not text[0].isspace():
            joined += "\n"
        joined += text
    return joined


def without_nulls(value: Any) -> Any:
    """Returns a value without the keys that are null: Parquet's structs have every key of their neighbours."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _scalar_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _whole_number(value)
    if isinstance(value, float):
        if value.is_integer() and abs(value) < _LONGEST_WHOLE:
            return str(int(value))
        with np.errstate(over="ignore"):
            short = np.float32(value)  # 0.1 of a float32 column is 0.10000000149011612 as a float64.
        return str(short if float(short) == value and math.isfinite(value) else value)
    if isinstance(value, decimal.Decimal):
        return format(value.normalize(), "f") if value.is_finite() else str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return None


def _whole_number(value: int) -> str | None:
    try:
        return str(value)
    except ValueError:  # Thousands of digits.
        return None


def _part_text(part: Any, name: str, origin: str, changes: list[str]) -> str:
    if isinstance(part, Mapping):
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type")
        if kind not in (None, "text", "input_text", "output_text") or any(key in part for key in _NOT_TEXT):
            named = (
                kind if isinstance(kind, str) and kind != "text" else next((k for k in _NOT_TEXT if k in part), kind)
            )
            raise DataError(
                f"{origin}: {name!r} holds a part of type {named!r:.40}, which can't be learnt here: only text can. "
                "Leave the row out, or describe the part in words."
            )
        part = part.get("text", part.get("content", ""))
    return cell_text(part, name, origin, changes)
