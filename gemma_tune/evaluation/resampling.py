"""Intervals of figures, and the paired comparison of two models, by resampling the rows of an evaluation.

The interval is the bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence Intervals",
equations 2.3 and 6.6). Where each score is 0 or 1, it is Wilson's score interval, since the bootstrap would give no
width to 20 right answers of 20. Two models are compared by an approximate randomization test: under the null
hypothesis, the two answers to a question could be swapped (Noreen 1989; Riezler and Maxwell 2005).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics, ratio_of_sums

CONFIDENCE = 0.95
SIGNIFICANT_P = 0.05  # A difference with a smaller p-value counts as one.
_NUM_RESAMPLES, _NUM_SWAPS = 2_000, 10_000
_MAX_ELEMENTS = 4_000_000  # Of a matrix of resamples that is held at once: 32 MB.
_SAME = 1e-12  # Two figures that differ by less are equal but for rounding.

_FigureOfSums = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """Confidence interval of a figure.

    Attributes:
        low, high: Its ends; NaN with fewer than two rows that count, of which nothing can be said.
    """

    low: float
    high: float


class PairedComparison(NamedTuple):
    """Comparison of two models that answered the same questions.

    Attributes:
        difference: Figure of the second model minus that of the first.
        interval: Its confidence interval.
        num_wins, num_ties, num_losses: Numbers of rows on which the second model is better, as good, or worse.
        p_value: Probability of a difference that is at least as large, in either direction, if the models were equal.
    """

    difference: float
    interval: Interval
    num_wins: int
    num_ties: int
    num_losses: int
    p_value: float


def figure_of(metric: Metric, statistics: np.ndarray) -> float:
    """Returns the figure of rows, from their [n, k] statistics; NaN if none counts."""
    return float(metric.figure(statistics.sum(0)))


def row_figures(metric: Metric, statistics: np.ndarray) -> np.ndarray:
    """Returns the [n] figures of single rows, from their [n, k] statistics; NaN for a row that doesn't count."""
    return np.where(_counts(statistics), metric.figure(statistics), np.nan)


def confidence_interval(
    metric: Metric, statistics: np.ndarray, *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Returns the confidence interval of a figure.

    Args:
        metric: The metric.
        statistics: [n, k] statistics of the rows.
        confidence: Probability that the interval covers the figure of all possible rows.
        seed: Random seed of the resamples.
    """
    return _interval(metric.figure, statistics, confidence, seed)


def mean_interval(scores: Sequence[float | None], *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Returns the confidence interval of the mean of scores, of which None doesn't count."""
    return _interval(ratio_of_sums, mean_statistics(scores), confidence, seed)


def compare_paired(
    metric: Metric, first: np.ndarray, second: np.ndarray, *, confidence: float = CONFIDENCE, seed: int = 0
) -> PairedComparison:
    """Compares two models by their answers to the same questions.

    Args:
        metric: The metric.
        first, second: [n, k] statistics of the first and of the second model, row by row. Rows that don't count for one
            of them are left out.
        confidence: Confidence of the interval.
        seed: Random seed of resamples and swaps.
    """
    counts = _counts(first) & _counts(second)
    first, second = first[counts], second[counts]
    if not len(first):
        return PairedComparison(np.nan, Interval(np.nan, np.nan), 0, 0, 0, np.nan)
    width = first.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return metric.figure(sums[..., width:]) - metric.figure(sums[..., :width])

    both = np.concatenate([first, second], axis=1)
    gains = metric.figure(second) - metric.figure(first)
    gains = -gains if metric.is_higher_better is False else gains
    return PairedComparison(
        float(difference(both.sum(0))),
        _bootstrap(difference, both, confidence, seed) if len(both) > 1 else Interval(np.nan, np.nan),
        int((gains > _SAME).sum()),
        int((np.abs(gains) <= _SAME).sum()),
        int((gains < -_SAME).sum()),
        _randomization_p_value(difference, first, second, seed),
    )


def significant_change(metric: Metric, found: PairedComparison) -> str:
    """Returns `better` or `worse` for the second model; '' where the difference may be chance, or means neither."""
    if metric.is_higher_better is None or not found.p_value < SIGNIFICANT_P:
        return ""
    return "better" if (found.difference > 0) == metric.is_higher_better else "worse"


def _interval(figure: _FigureOfSums, statistics: np.ndarray, confidence: float, seed: int) -> Interval:
    counted = statistics[_counts(statistics)]
    if len(counted) < 2:
        return Interval(np.nan, np.nan)
    if figure is ratio_of_sums and _are_shares(counted):
        return _wilson(counted, confidence)
    return _bootstrap(figure, counted, confidence, seed)


def _counts(statistics: np.ndarray) -> np.ndarray:
    return np.asarray(statistics.any(axis=1))


def _are_shares(statistics: np.ndarray) -> bool:
    """Returns whether each row has a score of 0 or 1 and counts once."""
    return bool(np.isin(statistics[:, 0], (0, 1)).all() and (statistics[:, 1] == 1).all())


def _wilson(statistics: np.ndarray, confidence: float) -> Interval:
    from scipy import stats

    hits, trials = statistics.sum(0).astype(int)
    interval = stats.binomtest(int(hits), int(trials)).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def _bootstrap(figure: _FigureOfSums, statistics: np.ndarray, confidence: float, seed: int) -> Interval:
    """Returns the bias-corrected and accelerated bootstrap interval."""
    from scipy.special import ndtr, ndtri

    rng, num_rows, total = np.random.default_rng(seed), len(statistics), statistics.sum(0)
    observed = float(figure(total))
    resampled = np.concatenate(
        [
            figure(rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size) @ statistics)
            for size in _batches(_NUM_RESAMPLES, num_rows)
        ]
    )
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled) or np.ptp(resampled) <= _SAME:
        return Interval(observed, observed)
    below = (resampled < observed - _SAME).mean() + (np.abs(resampled - observed) <= _SAME).mean() / 2
    bias = ndtri(np.clip(below, 1 / len(resampled), 1 - 1 / len(resampled)))
    without_one = figure(total - statistics)
    deviations = without_one[np.isfinite(without_one)].mean() - without_one[np.isfinite(without_one)]
    spread = (deviations**2).sum() ** 1.5
    acceleration = (deviations**3).sum() / (6 * spread) if spread > 0 else 0.0
    z = bias + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    low, high = np.quantile(resampled, ndtr(bias + z / (1 - acceleration * z)))
    return Interval(float(low), float(high))


def _randomization_p_value(figure: _FigureOfSums, first: np.ndarray, second: np.ndarray, seed: int) -> float:
    """Returns the p-value of a difference: the share of random swaps whose difference is at least as large.

    Both the observed difference and the swapped ones count, so that p is never 0 (Phipson and Smyth 2010).
    """
    rng, num_rows = np.random.default_rng(seed), len(first)
    gains, both = second - first, np.concatenate([first.sum(0), second.sum(0)])
    observed, num_extreme = abs(float(figure(both))), 0
    for size in _batches(_NUM_SWAPS, num_rows):
        moved = rng.integers(0, 2, (size, num_rows), dtype=bool) @ gains  # From the second model to the first.
        swapped = np.abs(figure(both + np.concatenate([moved, -moved], axis=1)))
        num_extreme += int((swapped >= observed - _SAME).sum())
    return (num_extreme + 1) / (_NUM_SWAPS + 1)


def _batches(count: int, num_rows: int) -> Iterator[int]:
    """Yields sizes of batches that together are `count`, so that no matrix of resamples becomes too large."""
    size = max(1, min(count, _MAX_ELEMENTS // num_rows))
    for start in range(0, count, size):
        yield min(size, count - start)
