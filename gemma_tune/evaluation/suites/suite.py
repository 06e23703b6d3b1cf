"""Defines a suite: its parts, and what must hold for the answers to each of them."""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.case import EvalCase

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE]-?\d+)?"
_EXPRESSION = re.compile(
    rf"\s*(?P<metric>\w+)(?:\.(?P<end>low|high))?\s*(?P<sign>>=|<=|==|>|<)\s*(?P<number>{_NUMBER})\s*"
    rf"(?:/\s*(?P<divisor>{_NUMBER})\s*)?"
)
_ROUNDING = 1e-9  # 36 right answers of 40 reach 36/40, whatever the last bit of the quotient is.


class Requirement(NamedTuple):
    """A bound that a metric must keep, such as `f1 >= 0.8` or `right_answer.low >= 36/40`.

    Attributes:
        text: The expression as it was written.
        metric: Name of the metric.
        end: `low` or `high` for that end of the figure's confidence interval; '' for the figure itself.
        sign: One of >=, >, <=, < and ==.
        bound: Number that the figure is compared with.
    """

    text: str
    metric: str
    end: str
    sign: str
    bound: float

    def holds(self, figure: float) -> bool:
        """Returns whether a figure keeps the bound, but for rounding. NaN never does."""
        if abs(figure - self.bound) <= _ROUNDING:
            return "=" in self.sign
        return _COMPARISONS[self.sign](figure, self.bound)


@dataclasses.dataclass(frozen=True)
class SuitePart:
    """A part of a suite: questions, and what must hold for the answers to them.

    Attributes:
        name: Name of the part.
        cases: Questions.
        metrics: Names of all metrics that the part needs, those in its requirements too.
        must: Requirements of metrics.
        must_not_regress: Names of metrics that must not be worse than the other model's.
        must_not_contain: Number of answers that may contain a text, by text; usually 0. Case doesn't count.
        max_latency_seconds: Bound of the 95th percentile of the time until an answer is complete; None for no bound.
    """

    name: str
    cases: tuple[EvalCase, ...]
    metrics: tuple[str, ...] = ()
    must: tuple[Requirement, ...] = ()
    must_not_regress: tuple[str, ...] = ()
    must_not_contain: Mapping[str, int] = dataclasses.field(default_factory=dict)
    max_latency_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Questions in parts, and what must hold for a model's answers to them.

    Attributes:
        name: Name of the suite.
        description: What it is for, in a sentence or two.
        parts: Parts, in order.
        generation: Settings of the group `generation` that all answers are generated with.
    """

    name: str
    description: str
    parts: tuple[SuitePart, ...]
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cases(self) -> tuple[EvalCase, ...]:
        """Returns the questions of all parts, in order."""
        return tuple(case for part in self.parts for case in part.cases)

    @property
    def needs_other_model(self) -> bool:
        """Returns whether a part must not be worse than another model."""
        return any(part.must_not_regress for part in self.parts)


def parse_requirement(text: str, origin: str) -> Requirement:
    """Returns the requirement that an expression states.

    Args:
        text: Expression, `METRIC >= NUMBER`. Signs are >=, >, <=, < and ==, `METRIC.low` and `METRIC.high` are the ends
            of the confidence interval, and the number may be a quotient such as 36/40.
        origin: Place that it was read from, for the message.

    Raises:
        ConfigError: The expression can't be understood.
    """
    match = _EXPRESSION.fullmatch(text)
    if match is None or (match["divisor"] is not None and float(match["divisor"]) == 0):
        raise ConfigError(
            f"{origin}: {text!r} can't be understood. Expected METRIC SIGN NUMBER, such as 'f1 >= 0.8', "
            "'right_answer >= 36/40' or 'f1.low >= 0.7' (lower end of the confidence interval). Signs: "
            f"{', '.join(_COMPARISONS)}."
        )
    bound = float(match["number"]) / float(match["divisor"] or 1)
    return Requirement(text.strip(), match["metric"], match["end"] or "", match["sign"], bound)
