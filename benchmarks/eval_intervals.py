"""How often the intervals of figures cover the truth, in simulated evaluations.

    python -m benchmarks.eval_intervals [--simulations=1000] [--rows=100] [--json]

Scores are drawn from distributions whose mean is known: F1-like (many 1, the rest anywhere), skewed, shares of right
answers, and a corpus figure (a ratio of sums of unequal rows, as of all n-gram matches). A 95 % interval must cover the
truth in 93 to 97 % of the simulations.
"""

from collections.abc import Callable

import numpy as np
from absl import app, flags

from benchmarks.verdicts import exit_with
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics
from gemma_tune.evaluation.resampling import compare_paired, confidence_interval

_SIMULATIONS = flags.DEFINE_integer("simulations", 1000, "Simulated evaluations of each kind.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 100, "Rows of an evaluation.", lower_bound=5)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")

_METRIC = Metric("mean", "", lambda cases, answers: np.empty((0, 2)))


def f1_like(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Returns statistics of scores of which 60 % are 1, and the rest uniform from 0 to 0.8."""
    return mean_statistics(np.where(rng.random(rows) < 0.6, 1.0, 0.8 * rng.random(rows)).tolist())


def skewed(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Returns statistics of scores from Beta(2, 0.7)."""
    return mean_statistics(rng.beta(2, 0.7, rows).tolist())


def share(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Returns statistics of right and wrong answers, 85 % of them right."""
    return mean_statistics((rng.random(rows) < 0.85).tolist())


def corpus(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Returns statistics of word matches in answers of 5 to 40 words, each answer with its own chance."""
    words = rng.integers(5, 41, rows)
    return np.stack([rng.binomial(words, rng.beta(4, 2, rows)), words], axis=1).astype(float)


_TRUTHS: dict[str, tuple[Callable, float]] = {
    "F1-like scores": (f1_like, 0.6 + 0.4 * 0.4),
    "skewed scores": (skewed, 2 / 2.7),
    "shares": (share, 0.85),
    "corpus figure": (corpus, 4 / 6),
}


def coverage(draw: Callable, truth: float) -> float:
    """Returns the share of simulated evaluations whose interval covers the truth."""
    covered = 0
    for seed in range(_SIMULATIONS.value):
        low, high = confidence_interval(_METRIC, draw(np.random.default_rng(seed), _ROWS.value), seed=seed)
        covered += low <= truth <= high
    return covered / _SIMULATIONS.value


def false_alarms() -> float:
    """Returns the share of paired comparisons of two equal models with p < 0.05."""
    count = 0
    for seed in range(_SIMULATIONS.value):
        rng = np.random.default_rng(seed)
        chance = rng.random(_ROWS.value)  # Of a right answer, by question.
        first, second = (mean_statistics((rng.random(_ROWS.value) < chance).tolist()) for _ in range(2))
        count += compare_paired(_METRIC, first, second, seed=seed).p_value < 0.05
    return count / _SIMULATIONS.value


def main(argv: list[str]) -> None:
    """Prints the coverage of each kind."""
    del argv
    verdicts = []
    for name, (draw, truth) in _TRUTHS.items():
        measured = coverage(draw, truth)
        verdicts.append((f"coverage, {name}", measured, "0.93 to 0.97", 0.93 <= measured <= 0.97))
    alarms = false_alarms()
    verdicts.append(("equal models, p < 0.05", alarms, "at most 0.07", alarms <= 0.07))
    exit_with(verdicts, _JSON.value)


if __name__ == "__main__":
    app.run(main)
