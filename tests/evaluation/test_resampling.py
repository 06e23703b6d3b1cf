"""Intervals and paired tests: against SciPy, closed forms, and the truth of simulated rows."""

import numpy as np
import pytest
from scipy import stats

from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics
from gemma_tune.evaluation.resampling import compare_paired, confidence_interval, figure_of, row_figures

MEAN = Metric("mean", "", lambda cases, answers: None)
LOWER_IS_BETTER = Metric("errors", "", lambda cases, answers: None, is_higher_better=False)


def product_of_sums(sums):
    return sums[..., 0] * sums[..., 1] / np.maximum(sums[..., 2], 1) ** 2


def test_figures_leave_out_rows_that_do_not_count():
    rows = mean_statistics([1.0, None, 0.0, 0.5])
    assert figure_of(MEAN, rows) == 0.5
    np.testing.assert_equal(row_figures(MEAN, rows), [1.0, np.nan, 0.0, 0.5])
    assert np.isnan(figure_of(MEAN, mean_statistics([None])))
    for few in ([None, None], [0.5, None]):
        assert np.isnan(confidence_interval(MEAN, mean_statistics(few))).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_mean_is_scipys(seed):
    """Both are BCa with other random numbers: the noise of 2,000 resamples is a few hundredths of the width."""
    scores = np.random.default_rng(seed).beta(2, 0.7, 80)
    low, high = confidence_interval(MEAN, mean_statistics(scores), seed=seed)
    wanted = stats.bootstrap((scores,), np.mean, method="BCa", n_resamples=20_000, rng=seed).confidence_interval
    width = wanted.high - wanted.low
    assert abs(low - wanted.low) < 0.08 * width and abs(high - wanted.high) < 0.08 * width
    assert low < scores.mean() < high


def test_the_interval_of_another_function_of_sums_is_scipys():
    rng = np.random.default_rng(5)
    rows = np.stack([rng.gamma(2, 1, 60), rng.gamma(3, 1, 60), np.ones(60)], axis=1)
    metric = Metric("product", "", lambda cases, answers: None, product_of_sums)
    low, high = confidence_interval(metric, rows)

    def statistic(index, axis=-1):
        return product_of_sums(rows[index.astype(int)].sum(axis if axis >= 0 else index.ndim - 1))

    wanted = stats.bootstrap(
        (np.arange(60),), statistic, method="BCa", n_resamples=20_000, vectorized=True, rng=0
    ).confidence_interval
    width = wanted.high - wanted.low
    assert abs(low - wanted.low) < 0.08 * width and abs(high - wanted.high) < 0.08 * width


def test_a_share_has_wilsons_interval_also_where_all_are_right():
    z, n = stats.norm.ppf(0.975), 20
    assert confidence_interval(MEAN, mean_statistics([True] * n)) == pytest.approx((n / (n + z * z), 1.0), abs=1e-12)


@pytest.mark.parametrize("kind", [pytest.param("skewed", marks=pytest.mark.slow), "share"])
def test_intervals_cover_the_truth(kind):
    """Of 300 simulated evaluations 95 % should cover; 4 standard errors of that are 5 %."""
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scores, truth = (rng.beta(2, 0.7, 80), 2 / 2.7) if kind == "skewed" else (rng.random(80) < 0.8, 0.8)
        low, high = confidence_interval(MEAN, mean_statistics(list(scores)), seed=seed)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 1.0


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(1)
    first = rng.beta(2, 1, 50)
    second = np.clip(first + rng.normal(0.03, 0.1, 50), 0, 1)
    second[:5] = first[:5]
    found = compare_paired(MEAN, mean_statistics(first), mean_statistics(second))
    wanted = stats.permutation_test(
        (second, first),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=0,
    )
    assert found.difference == pytest.approx(wanted.statistic, abs=1e-12)
    assert found.p_value == pytest.approx(wanted.pvalue, abs=0.02)  # 4 standard errors of 10,000 swaps at p = 0.5.
    assert (found.num_wins, found.num_ties, found.num_losses) == (
        (second > first).sum(), 5, (second < first).sum()
    )  # fmt: skip
    assert found.interval.low < found.difference < found.interval.high


@pytest.mark.slow
def test_equal_models_are_told_apart_as_often_as_chance_says():
    """p is below 0.05 in 5 % of 200 comparisons of equal models; 4 standard errors are 6 %. A better one is found."""
    num_found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hard = rng.random(60)
        first, second = rng.random(60) < hard, rng.random(60) < hard
        num_found += compare_paired(MEAN, mean_statistics(list(first)), mean_statistics(list(second))).p_value < 0.05
    assert num_found / 200 < 0.11
    better = compare_paired(MEAN, mean_statistics([0.0] * 30), mean_statistics([1.0] * 20 + [0.0] * 10))
    assert better.p_value < 0.001


def test_where_lower_is_better_a_lower_row_wins():
    first, second = mean_statistics([0.5, 0.5, 0.5]), mean_statistics([0.1, 0.5, 0.9])
    found = compare_paired(LOWER_IS_BETTER, first, second)
    assert (found.num_wins, found.num_ties, found.num_losses) == (1, 1, 1)
    found = compare_paired(LOWER_IS_BETTER, first, mean_statistics([0.1, 0.2, None]))
    assert (found.num_wins, found.num_ties, found.num_losses) == (2, 0, 0)


def test_rows_in_batches_give_the_same_kind_of_interval(monkeypatch):
    """Memory stays small with many rows: the resamples are drawn in batches."""
    from gemma_tune.evaluation import resampling

    rows = mean_statistics(list(np.random.default_rng(0).random(200)))
    whole = confidence_interval(MEAN, rows)
    monkeypatch.setattr(resampling, "_MAX_ELEMENTS", 20_000)
    assert confidence_interval(MEAN, rows) == pytest.approx(whole, abs=0.005)
