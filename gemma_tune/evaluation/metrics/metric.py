"""Defines what a metric of answers is: statistics of each row, and a figure made of their sums."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gemma_tune.evaluation.case import EvalCase


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Returns sums[..., 0] / sums[..., 1], the mean of scores that count; NaN where none counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of answers.

    A figure over rows is a function of the sum of their statistics. So the figure of any subset or resample of the rows
    costs one sum, for means and for corpus metrics such as BLEU alike.

    Attributes:
        name: Name in `--metrics`, and in reports.
        description: What it measures, in a few words.
        statistics: Function of the n cases and the n answers that returns the [n, k] float64 statistics of each row;
            all 0 for a row that the metric can't judge.
        figure: Function of summed statistics, [..., k], that returns the figure, [...] float64.
        problem: Function of the cases that says why the metric doesn't suit them; '' if it does. Raises DataError for a
            column that can't be used, such as a wrong regular expression, so that no answers are generated in vain.
        is_higher_better: Whether a higher figure is a better one; None where neither is, as with the length.
    """

    name: str
    description: str
    statistics: Callable[[Sequence[EvalCase], Sequence[str]], np.ndarray]
    figure: Callable[[np.ndarray], np.ndarray] = ratio_of_sums
    problem: Callable[[Sequence[EvalCase]], str] = lambda cases: ""
    is_higher_better: bool | None = True


def mean_statistics(scores: Sequence[float | None]) -> np.ndarray:
    """Returns the [n, 2] statistics of a metric that is a mean: score and 1; 0 and 0 for None."""
    return np.array([(0.0, 0.0) if score is None else (float(score), 1.0) for score in scores]).reshape(-1, 2)
