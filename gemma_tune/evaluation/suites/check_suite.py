"""Checks whether a model's answers reach what a suite demands."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.resampling import (
    SIGNIFICANT_P,
    compare_paired,
    confidence_interval,
    figure_of,
    row_figures,
)
from gemma_tune.evaluation.suites.suite import Requirement, Suite, SuitePart

_LATENCY_PERCENTILE = 95


class PartAnswers(NamedTuple):
    """Answers to the questions of a part, in their order.

    Attributes:
        answers: Answers of the model that is checked.
        other_answers: Answers of the model that it must not be worse than; None if there is none.
        latencies_seconds: Time until each answer was complete; None if it wasn't measured.
    """

    answers: Sequence[str]
    other_answers: Sequence[str] | None = None
    latencies_seconds: Sequence[float] | None = None


class FailedRow(NamedTuple):
    """A question whose answer speaks against a requirement.

    Attributes:
        case: The question.
        answer: The answer.
        reason: What is wrong with it, such as `f1 0.12`.
    """

    case: EvalCase
    answer: str
    reason: str


class Check(NamedTuple):
    """Result of one requirement of a suite.

    Attributes:
        part: Name of the part.
        wanted: What must hold, such as `f1 >= 0.8`.
        passed: Whether it does; None if it can't be told.
        observed: Figure that was compared; NaN without one.
        message: What was found, in a sentence.
        failed_rows: Questions whose answers speak against it, the worst first.
    """

    part: str
    wanted: str
    passed: bool | None
    observed: float
    message: str
    failed_rows: tuple[FailedRow, ...] = ()


# Statistics of the rows of each part, by part and metric.
PartStatistics = Mapping[str, Mapping[str, np.ndarray]]


def part_statistics(
    suite: Suite, answers: Mapping[str, Sequence[str]], metrics: Mapping[str, Metric]
) -> PartStatistics:
    """Returns the [n, k] statistics of each part's metrics, as `statistics[part][metric]`.

    Each metric sees the questions of all parts that need it at once. So an answer that belongs to a question of another
    part isn't `right_answer` either.

    Args:
        suite: The suite.
        answers: Answers to the questions of each part, by part.
        metrics: Known metrics by name.
    """
    found: dict[str, dict[str, np.ndarray]] = {part.name: {} for part in suite.parts}
    for name in dict.fromkeys(name for part in suite.parts for name in part.metrics):
        parts = [part for part in suite.parts if name in part.metrics]
        statistics = metrics[name].statistics(
            [case for part in parts for case in part.cases],
            [answer for part in parts for answer in answers[part.name]],
        )
        ends = np.cumsum([len(part.cases) for part in parts])
        for part, rows in zip(parts, np.split(statistics, ends[:-1]), strict=True):
            found[part.name][name] = rows
    return found


def check_suite(suite: Suite, results: Mapping[str, PartAnswers], metrics: Mapping[str, Metric]) -> list[Check]:
    """Returns a check for each requirement of a suite, part by part.

    Args:
        suite: The suite.
        results: Answers to the questions of each part, by part.
        metrics: Known metrics by name.
    """
    ours = part_statistics(suite, {name: result.answers for name, result in results.items()}, metrics)
    others = _statistics_of_others(suite, results, metrics)
    checks = []
    for part in suite.parts:
        result = results[part.name]
        checks += [_check_bound(part, wanted, metrics, ours[part.name], result) for wanted in part.must]
        for name in part.must_not_regress:
            other = others.get(part.name, {}).get(name)
            checks.append(_check_regression(part, metrics[name], ours[part.name][name], other, result))
        checks += [_check_forbidden(part, text, most, result) for text, most in part.must_not_contain.items()]
        if part.max_latency_seconds is not None:
            checks.append(_check_latency(part, part.max_latency_seconds, result))
    return checks


def _statistics_of_others(
    suite: Suite, results: Mapping[str, PartAnswers], metrics: Mapping[str, Metric]
) -> PartStatistics:
    """Returns the statistics of the other model's answers, in whose place this model's stand where it gave none."""
    compared = {name: result.other_answers for name, result in results.items() if result.other_answers is not None}
    if not compared:
        return {}
    answers = {name: compared.get(name, result.answers) for name, result in results.items()}
    statistics = part_statistics(suite, answers, metrics)
    return {name: statistics[name] for name in compared}


def _check_bound(
    part: SuitePart,
    wanted: Requirement,
    metrics: Mapping[str, Metric],
    statistics: Mapping[str, np.ndarray],
    result: PartAnswers,
) -> Check:
    metric, rows = metrics[wanted.metric], statistics[wanted.metric]
    interval = confidence_interval(metric, rows)
    figure = figure_of(metric, rows)
    observed = getattr(interval, wanted.end) if wanted.end else figure
    if np.isnan(observed):
        message = f"{wanted.metric} has no figure: none of the {len(rows)} answers can be judged by it."
        return Check(part.name, wanted.text, False, observed, message)
    scores = row_figures(metric, rows)
    failing = [row for row in range(len(scores)) if not np.isnan(scores[row]) and not wanted.holds(scores[row])]
    failing.sort(key=lambda row: abs(scores[row] - wanted.bound), reverse=True)
    message = (
        f"{wanted.metric} is {figure:.4g} (95% interval {interval.low:.4g} to {interval.high:.4g}, "
        f"{_count(len(scores), 'answer')}); {wanted.text} is wanted."
    )
    failed = _failed_rows(part, result, failing, lambda row: f"{wanted.metric} {scores[row]:.4g}")
    return Check(part.name, wanted.text, wanted.holds(observed), observed, message, failed)


def _check_regression(
    part: SuitePart, metric: Metric, ours: np.ndarray, other: np.ndarray | None, result: PartAnswers
) -> Check:
    wanted = f"{metric.name} not worse than the other model's"
    if other is None:
        return Check(part.name, wanted, None, np.nan, "There are no answers of another model to compare with.")
    compared = compare_paired(metric, other, ours)
    gain = -compared.difference if metric.is_higher_better is False else compared.difference
    gains = row_figures(metric, ours) - row_figures(metric, other)
    gains = -gains if metric.is_higher_better is False else gains
    worse = sorted(np.flatnonzero(gains < 0).tolist(), key=lambda row: gains[row])
    message = (
        f"{metric.name} is {figure_of(metric, ours):.4g}, and {figure_of(metric, other):.4g} for the other model: "
        f"better on {compared.num_wins}, as good on {compared.num_ties}, worse on {compared.num_losses} "
        f"(p = {compared.p_value:.3g}; a loss with p < {SIGNIFICANT_P} fails)."
    )
    failed = _failed_rows(part, result, worse, lambda row: f"{metric.name} {gains[row]:+.4g} against the other model")
    passed = bool(gain >= 0 or compared.p_value >= SIGNIFICANT_P) if not np.isnan(gain) else None
    return Check(part.name, wanted, passed, compared.difference, message, failed)


def _check_forbidden(part: SuitePart, text: str, most: int, result: PartAnswers) -> Check:
    found = [row for row, answer in enumerate(result.answers) if text.casefold() in answer.casefold()]
    wanted = f"{text!r} in no answer" if not most else f"{text!r} in at most {_count(most, 'answer')}"
    message = f"{_count(len(found), 'answer')} of {len(result.answers)} contain {text!r}; at most {most} may."
    failed = _failed_rows(part, result, found, lambda row: f"contains {text!r}")
    return Check(part.name, wanted, len(found) <= most, float(len(found)), message, failed)


def _check_latency(part: SuitePart, most: float, result: PartAnswers) -> Check:
    wanted = f"{_LATENCY_PERCENTILE}th percentile of the latency <= {most:g} s"
    if result.latencies_seconds is None:
        return Check(part.name, wanted, None, np.nan, "The time of the answers was not measured.")
    seconds = np.asarray(result.latencies_seconds, np.float64)
    observed = float(np.percentile(seconds, _LATENCY_PERCENTILE))
    slow = sorted(np.flatnonzero(seconds > most).tolist(), key=lambda row: -seconds[row])
    message = f"{_LATENCY_PERCENTILE} % of the answers are complete within {observed:.3g} s; {most:g} s are allowed."
    failed = _failed_rows(part, result, slow, lambda row: f"{seconds[row]:.3g} s")
    return Check(part.name, wanted, observed <= most, observed, message, failed)


def _failed_rows(
    part: SuitePart, result: PartAnswers, rows: Iterable[int], reason: Callable[[int], str]
) -> tuple[FailedRow, ...]:
    return tuple(FailedRow(part.cases[row], result.answers[row], reason(row)) for row in rows)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
