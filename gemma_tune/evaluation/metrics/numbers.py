"""A metric of numbers: whether the last number of an answer is that of the wanted one."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

_DIGITS = r"\d{1,3}(?:[.,'\u00a0\u202f ]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?|[.,]\d+"
_MIXED = r"(?:(\d{1,3})[ \u00a0\u202f-](?=\d{1,2}\s?/\s?\d))?"  # The whole number before a fraction, as in 1 1/2.
_NUMBER = re.compile(rf"(?<![\w.,])([-−+]?)\s?[$€£¥₹]?\s?{_MIXED}({_DIGITS})(?:\s?/\s?(\d+))?")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_THOUSANDS = re.compile(r"\d{1,3}(?:([.,'\u00a0\u202f ])\d{3})(?:\1\d{3})*")
_TOLERANCE = 1e-6  # Relative, so that 0.333333 and 1/3 are the same.


def last_number(text: str) -> float | None:
    """Returns the last number in a text; None if there is none.

    Currencies, percent signs and white space around a number don't count. `1,234.5`, `1.234,5`, `1 234,5` and
    `1'234.5` are the same. A single comma with exactly three digits behind it separates thousands (`1,234`), unless the
    number begins with 0 (`0,125`); a single point is always a decimal one. `3/4` is a quotient, and
    `1 3/4` and `1¾` are 1.75.
    """
    found = _NUMBER.findall(_FRACTION.sub(_spelled_out, text))
    if not found:
        return None
    sign, whole, digits, divisor = found[-1]
    value = _value(digits)
    if divisor:
        if not float(divisor):
            return None
        value /= float(divisor)
    if whole and value < 1:  # Otherwise what follows isn't the fraction of a mixed number.
        value += float(whole)
    return (-1 if sign in "-−" and sign else 1) * value


def _spelled_out(fraction: re.Match[str]) -> str:
    """Returns a fraction that is a single character as ` 1/2`."""
    return " " + unicodedata.normalize("NFKC", fraction[0]).replace("\u2044", "/")


def _value(digits: str) -> float:
    is_grouped = _THOUSANDS.fullmatch(digits) and not digits.startswith("0")
    if is_grouped and not (digits.count(".") == 1 and "," not in digits):
        return float(re.sub(r"\D", "", digits))
    place = max(digits.rfind("."), digits.rfind(","))
    whole, fraction = (digits[:place], digits[place + 1 :]) if place >= 0 else (digits, "")
    whole = re.sub(r"\D", "", whole)  # \D keeps the digits of any alphabet, which float() reads.
    return float(f"{whole or 0}.{fraction or 0}")


def _statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    scores = []
    for case, answer in zip(cases, answers, strict=True):
        wanted, found = last_number(case.reference), last_number(answer)
        scores.append(None if wanted is None else float(found is not None and _is_same(found, wanted)))
    return mean_statistics(scores)


def _is_same(first: float, second: float) -> bool:
    return abs(first - second) <= _TOLERANCE * max(abs(first), abs(second))


def _problem(cases: Sequence[EvalCase]) -> str:
    has_number = any(last_number(case.reference) is not None for case in cases)
    return "" if has_number else "no wanted answer has a number in it."


NUMBER_METRICS = (
    Metric("number_match", "share of answers whose last number is the wanted answer's", _statistics, problem=_problem),
)
