"""Metrics of what must or must not be in an answer, of refusals, and of length."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from gemma_tune.errors import DataError
from gemma_tune.evaluation.answers import words
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

REGEX_COLUMNS, WANTED_COLUMN, FORBIDDEN_COLUMN = ("regex", "pattern"), "must_contain", "must_not_contain"
# Beginnings of refusals in six languages: a heuristic, which counts what models usually say. Someone who is sorry for
# what has happened to the other (to hear, for the delay, that you …) doesn't refuse.
_REFUSALS = re.compile(
    r"""\b(?:
      i(?:\ am|['’]m)?\ (?:really\ |so\ |very\ )?(?:sorry|afraid)\b
        (?!\ (?:to\ (?:hear|learn|read|see)|for|about|of|(?:that\ )?(?:you|your|the|this|it)\b))
    | i\ apologi[sz]e\b(?!\ (?:for|that\ you)\b)
    | as\ an\ ai\b
    | (?:i|we)\ (?:can\s?not|can['’]?t|am\ (?:not\ able|unable)|['’]m\ (?:not\ able|unable)|won['’]?t|will\ not)
        \ (?:to\ )?(?:help|assist|answer|provide|do|comply|discuss|fulfil+|share|support|give|say)
    | tut\ (?:mir|uns)\ (?:sehr\ )?leid\b
        (?!,?\ (?:(?:das|dies|von\ \w+)\ )?zu\ (?:hören|lesen|erfahren)|,?\ dass\ (?!ich|wir)|\ (?:um|für|wegen)\b)
    | leider\ kann\ ich\b
    | ich\ kann\ (?:dir|ihnen|das|dabei|diese)\b.{0,40}\bnicht\b
    | d[ée]sol[ée]e?s?\b(?!\ (?:pour\b|d['’]|de\ (?!ne\b)|que\ (?!je\b|nous\b)))
    | je\ ne\ peux\ pas\b
    | lo\ siento\b(?!\ (?:mucho\ )?(?:por\b|que\ (?!no\ pued)))
    | no\ puedo\ (?:ayudar|responder|proporcionar|hacer)
    | (?:sinto\ muito|desculpe)\b(?!\ (?:(?:por|pel[oa]s?|saber|ouvir)\b|que\ (?!n[ãa]o\ poss)))
    | n[ãa]o\ posso\ (?:ajudar|responder|fornecer|fazer)
    | mi\ dispiace\b(?!\ (?:(?:per|sapere|sentire)\b|che\ (?!non\ poss)))
    | non\ posso\ (?:aiutar|rispondere|fornire|fare)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def _matching(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    scores: list[float | None] = []
    for case, answer in zip(cases, answers, strict=True):
        pattern = _pattern_of(case)
        scores.append(None if pattern is None else float(bool(pattern.search(answer))))
    return mean_statistics(scores)


def _pattern_of(case: EvalCase) -> re.Pattern[str] | None:
    name = next((name for name in REGEX_COLUMNS if case.columns.get(name)), None)
    if name is None:
        return None
    try:
        return re.compile(case.columns[name])
    except (re.error, TypeError, OverflowError) as error:
        raise DataError(
            f"{case.origin}: {name!r} should be a regular expression, found {case.columns[name]!r:.80}: {error}. "
            "(--metrics=… names metrics that don't read this column.)"
        ) from error


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


def _without_columns(*names: str, check: Callable[[EvalCase], object]) -> Callable[[Sequence[EvalCase]], str]:
    """Returns the `problem` of a metric that needs one of these columns; `check` raises DataError for a wrong value."""

    def problem(cases: Sequence[EvalCase]) -> str:
        if not any(case.columns.get(name) for case in cases for name in names):
            return f"no row has a column {' or '.join(names)}."
        for case in cases:
            check(case)
        return ""

    return problem


PATTERN_METRICS: tuple[Metric, ...] = (
    Metric("regex", "share of answers in which their row's regular expression is found", _matching,
           problem=_without_columns(*REGEX_COLUMNS, check=_pattern_of)),
    Metric("contains", f"share of answers with all texts of the column {WANTED_COLUMN}", _containing,
           problem=_without_columns(WANTED_COLUMN, check=lambda case: texts_of(case, WANTED_COLUMN))),
    Metric("forbidden", f"share of answers without any text of the column {FORBIDDEN_COLUMN}", _avoiding,
           problem=_without_columns(FORBIDDEN_COLUMN, check=lambda case: texts_of(case, FORBIDDEN_COLUMN))),
    Metric("refusal", "share of answers that refuse, by their usual words", _refusing, is_higher_better=None),
    Metric("length_words", "mean number of words", _lengths, is_higher_better=None),
)  # fmt: skip
