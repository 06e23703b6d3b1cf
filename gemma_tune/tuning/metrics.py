"""Names what a search can improve, and in which direction."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.config_checks import HELDOUT_FIGURES
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.metrics.choice import METRICS


class Goal(NamedTuple):
    """What a search improves.

    Attributes:
        name: Name of the metric.
        key: Key of its value in the metrics of a trial.
        direction: `minimize` or `maximize`.
        is_known_early: Whether every evaluation during training gives it, so that trials can be pruned by it.
    """

    name: str
    key: str
    direction: str
    is_known_early: bool


_GOALS = (
    Goal("heldout_loss", "loss", "minimize", True),
    Goal("perplexity", "perplexity", "minimize", True),
    Goal("token_accuracy", "token_accuracy", "maximize", True),
    Goal("seconds", "seconds", "minimize", False),  # Duration of the training.
    Goal("memory", "memory_bytes", "minimize", False),  # Bytes of a training step by plan.
    Goal("model_size", "model_bytes", "minimize", False),  # Bytes of all weights.
)


def parse_goals(text: str) -> tuple[Goal, ...]:
    """Returns what `--metric` names: one metric, or two or three with commas between, for a Pareto front.

    Args:
        text: Names of metrics with commas between.

    Raises:
        ConfigError: There is no such metric (suggests the nearest), or one is named twice.
    """
    known = {goal.name: goal for goal in _GOALS} | {
        name: Goal(name, name, "maximize" if metric.is_higher_better else "minimize", True)
        for name, metric in METRICS.items()
        if metric.is_higher_better is not None
    }
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--metric: there is no metric {name!r} for a search.{did_you_mean(name, known)} "
                f"Metrics: {', '.join(known)}."
            )
    if len(set(names)) < len(names) or len(names) > 3:
        raise ConfigError(f"--metric={text}: give one metric, or two or three different ones with commas between.")
    return tuple(known[name] for name in names)


def with_goals(config: Config, goals: Sequence[Goal]) -> Config:
    """Returns the settings of trials that compute these metrics, and whose best step is the best by the first one."""
    known = [goal.key for goal in goals if goal.is_known_early]
    if not known:
        return config
    of_answers = [key for key in known if key not in HELDOUT_FIGURES]
    metrics = list(dict.fromkeys([*config.training.eval_metrics, *of_answers]))
    return config.replace({"training.best_by": known[0], "training.eval_metrics": metrics})


def goal_values(goals: Sequence[Goal], metrics: Mapping[str, Any]) -> list[float]:
    """Returns the values of a trial in the order of the goals.

    Raises:
        ConfigError: The trial didn't give one of them; says which it gave.
    """
    for goal in goals:
        if goal.key not in metrics:
            raise ConfigError(f"The trial gave no {goal.name}. It gave: {', '.join(sorted(metrics))}.")
    return [float(metrics[goal.key]) for goal in goals]
