"""Metrics of what must or must not be in an answer, of refusals, and of length."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_tune.errors import DataError
from gemma_tune.evaluation.answers import words
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

REGEX_COLUMNS, WANTED_COLUMN, FORBIDDEN_COLUMN = ("regex", "pattern"), "must_contain", "must_not_contain"
# Beginnings of refusals in six languages: a heuristic, which counts what models usually say.
_REFUSALS = re.compile(
    r"""\b(?:
      i(?:\ am|['’]m)?\ (?:really\ |so\ |very\ )?(?:sorry|afraid)\b
    | i\ apologi[sz]e\b
    | as\ an\ ai\b
    | (?:i|we)\ (?:can\s?not|can['’]?t|am\ (?:not\ able|unable)|['’]m\ (?:not\ able|unable)|won['’]?t|will\ not)
        \ (?:to\ )?(?:help|assist|answer|provide|do|comply|discuss|fulfil+|share|support|give|say)
    | (?:es\ )?tut\ mir\ leid\b
    | leider\ kann\ ich\b
    | ich\ kann\ (?:dir|ihnen|das|dabei|diese)\b.{0,40}\bnicht\b
    | d[ée]sol[ée]e?\b
    | je\ ne\ peux\ pas\b
    | lo\ siento\b
    | no\ puedo\ (?:ayudar|responder|proporcionar|hacer)
    | (?:sinto\ muito|desculpe)\b
    | n[ãa]o\ posso\ (?:ajudar|responder|fornecer|fazer)
    | mi\ dispiace\b
    | non\ posso\ (?:aiutar|rispondere|fornire|fare)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def _matching(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    scores: list[float | None] = []
    for case, answer in zip(cases, answers, strict=True):
        pattern = next((case.columns[name] for name in REGEX_COLUMNS if case.columns.get(name)), None)
        scores.append(None if pattern is None else float(bool(_compiled(pattern, case.origin).search(answer))))
    return mean_statistics(scores)


def _compiled(pattern: Any, origin: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise DataError(f"{origin}: {pattern!r:.80} is no regular expression: {error}.") from error


def _containing(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    return _of_texts(cases, answers, WANTED_COLUMN, wanted=True)


def _avoiding(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    return _of_texts(cases, answers, FORBIDDEN_COLUMN, wanted=False)


def _of_texts(cases: Sequence[EvalCase], answers: Sequence[str], column: str, wanted: bool) -> np.ndarray:
    """Returns the statistics of answers that have all texts of a column, or none. Case and white space don't count."""
    scores: list[float | None] = []
    for case, answer in zip(cases, answers, strict=True):
        texts = texts_of(case, column)
        folded = _folded(answer)
        scores.append(float(all((_folded(text) in folded) == wanted for text in texts)) if texts else None)
    return mean_statistics(scores)


def texts_of(case: EvalCase, column: str) -> list[str]:
    """Returns the texts of a column that holds one or a list of them.

    Raises:
        DataError: It holds something else.
    """
    value = case.columns.get(column)
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{case.origin}: {column!r} should be a text or a list of texts, found {value!r:.60}.")
    return texts


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _refusing(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    return mean_statistics([float(is_refusal(answer)) for answer in answers])


def is_refusal(answer: str) -> bool:
    """Returns whether an answer says, in its first 200 characters, that it won't or can't help."""
    return bool(_REFUSALS.search(answer[:200]))


def _lengths(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    return mean_statistics([float(len(words(answer))) for answer in answers])


def _without_columns(*names: str) -> Callable[[Sequence[EvalCase]], str]:
    def problem(cases: Sequence[EvalCase]) -> str:
        has_column = any(case.columns.get(name) for case in cases for name in names)
        return "" if has_column else f"no row has a column {' or '.join(names)}."

    return problem


PATTERN_METRICS: tuple[Metric, ...] = (
    Metric("regex", "share of answers in which their row's regular expression is found", _matching,
           problem=_without_columns(*REGEX_COLUMNS)),
    Metric("contains", f"share of answers with all texts of the column {WANTED_COLUMN}", _containing,
           problem=_without_columns(WANTED_COLUMN)),
    Metric("forbidden", f"share of answers without any text of the column {FORBIDDEN_COLUMN}", _avoiding,
           problem=_without_columns(FORBIDDEN_COLUMN)),
    Metric("refusal", "share of answers that refuse, by their usual words", _refusing, is_higher_better=None),
    Metric("length_words", "mean number of words", _lengths, is_higher_better=None),
)  # fmt: skip
