"""Names what a search can improve, and in which direction."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean


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
    Goal("seconds", "seconds", "minimize", False),
    Goal("num_steps", "num_steps", "minimize", False),
    Goal("memory", "memory_bytes", "minimize", False),
)


def parse_goals(text: str, answer_metrics: Mapping[str, str] | None = None) -> tuple[Goal, ...]:
    """Returns what `--metric` names: one metric, or two or three with commas between, for a Pareto front.

    Args:
        text: Names of metrics with commas between.
        answer_metrics: Direction (`minimize` or `maximize`) by name of the metrics of generated answers that the
            trials give.

    Raises:
        ConfigError: There is no such metric (suggests the nearest), or one is named twice.
    """
    known = {goal.name: goal for goal in _GOALS} | {
        name: Goal(name, name, direction, False) for name, direction in (answer_metrics or {}).items()
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


def goal_values(goals: Sequence[Goal], metrics: Mapping[str, Any]) -> list[float]:
    """Returns the values of a trial in the order of the goals.

    Raises:
        ConfigError: The trial didn't give one of them; says which it gave.
    """
    for goal in goals:
        if goal.key not in metrics:
            raise ConfigError(f"The trial gave no {goal.name}. It gave: {', '.join(sorted(metrics))}.")
    return [float(metrics[goal.key]) for goal in goals]
