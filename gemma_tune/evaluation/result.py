"""Holds the answers of one or two models to the same questions, and makes figures, slices and comparisons of them."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.pairwise import PairwiseResult
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.resampling import (
    Interval,
    PairedComparison,
    compare_paired,
    confidence_interval,
    figure_of,
    row_figures,
)

_NO_VALUE = "(none)"


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model, and how it did.

    Attributes:
        name: Name for readers, such as `base model`.
        answers: Its answer to each question.
        heldout: Loss, perplexity and token accuracy on the wanted answers; empty if there are none.
        statistics: [n, k] statistics of its answers, by metric.
        seconds: Time that all answers took, eight at once.
    """

    name: str
    answers: Sequence[str]
    heldout: Mapping[str, float]
    statistics: Mapping[str, np.ndarray]
    seconds: float = 0.0


class Figure(NamedTuple):
    """Figure of one model.

    Attributes:
        value: The figure; NaN if no row counts.
        interval: Its confidence interval.
        num_rows: Number of rows that count.
    """

    value: float
    interval: Interval
    num_rows: int


class Slice(NamedTuple):
    """The rows that have the same value in a column.

    Attributes:
        column: Name of the column.
        value: Value that they have there.
        rows: Numbers of the rows.
        figures: Figure of each model, in the order of the evaluation's models.
        comparison: Comparison of the two models on these rows; None for one model.
    """

    column: str
    value: str
    rows: Sequence[int]
    figures: Sequence[Figure]
    comparison: PairedComparison | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers of one or two models to the same questions.

    Attributes:
        data_source: Name of the data.
        cases: The questions.
        metrics: Metrics, the most important first: it orders slices and answers.
        models: The model that is compared with, if there is one, then the evaluated model.
        slice_columns: Columns by which the rows are divided.
        left_out: Metrics that would suit the data, and what they need.
        judge_name: Name of the judge that compared the answers; '' without one.
        judge_verdicts: Its verdicts on the evaluated model's answers beside the other one's; None without a judge.
    """

    data_source: str
    cases: Sequence[EvalCase]
    metrics: Sequence[Metric]
    models: Sequence[EvaluatedModel]
    slice_columns: Sequence[str] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    judge_name: str = ""
    judge_verdicts: PairwiseResult | None = None

    def __post_init__(self):
        known = sorted({name for case in self.cases for name in case.columns})
        for column in self.slice_columns:
            if column not in known:
                raise ConfigError(
                    f"--by={column}: the rows of {self.data_source} have no column {column!r}. "
                    f"Columns: {', '.join(known) or 'none'}.{did_you_mean(column, known)}"
                )

    @property
    def model(self) -> EvaluatedModel:
        """The evaluated model."""
        return self.models[-1]

    @functools.cached_property
    def figures(self) -> Mapping[str, Sequence[Figure]]:
        """Figures on all rows by metric, one of each model."""
        return {metric.name: [_figure(metric, model) for model in self.models] for metric in self.metrics}

    @functools.cached_property
    def comparisons(self) -> Mapping[str, PairedComparison]:
        """Comparisons of the evaluated model with the other one, by metric; empty if there is no other."""
        if len(self.models) < 2:
            return {}
        return {metric.name: self._compared(metric, range(len(self.cases))) for metric in self.metrics}

    @functools.cached_property
    def slices(self) -> Mapping[str, Sequence[Slice]]:
        """Slices by column, with figures of the first metric, the worst first."""
        return {column: self._slices_of(column) for column in self.slice_columns}

    def worst_rows(self) -> list[int]:
        """Returns the numbers of all rows, the worst by the first metric that has a direction first."""
        metric = self.ordering_metric
        if metric is None:
            return list(range(len(self.cases)))
        goodness = _goodness(metric, row_figures(metric, self.model.statistics[metric.name]))
        return [int(row) for row in np.argsort(goodness, kind="stable")]

    @property
    def ordering_metric(self) -> Metric | None:
        """The first metric that says which of two answers is the better one; None if none does."""
        return next((metric for metric in self.metrics if metric.is_higher_better is not None), None)

    def row_changes(self) -> list[str]:
        """Returns `better`, `worse` or `same` for each row: the evaluated model's answer beside the other one's."""
        metric = self.ordering_metric
        if metric is None or len(self.models) < 2:
            return ["same"] * len(self.cases)
        first, second = (_goodness(metric, row_figures(metric, model.statistics[metric.name])) for model in self.models)
        return [
            "same" if before == after or math.isclose(before, after) else "better" if after > before else "worse"
            for before, after in zip(first, second, strict=True)
        ]

    def _compared(self, metric: Metric, rows: Sequence[int]) -> PairedComparison:
        first, second = (model.statistics[metric.name][list(rows)] for model in self.models)
        return compare_paired(metric, first, second)

    def _slices_of(self, column: str) -> list[Slice]:
        metric = self.metrics[0]
        rows: dict[str, list[int]] = {}
        for number, case in enumerate(self.cases):
            rows.setdefault(_text_of(case.columns.get(column)), []).append(number)
        found = [
            Slice(
                column,
                value,
                numbers,
                [_figure(metric, model, numbers) for model in self.models],
                self._compared(metric, numbers) if len(self.models) > 1 else None,
            )
            for value, numbers in rows.items()
        ]
        return sorted(found, key=lambda each: float(_goodness(metric, np.array(each.figures[-1].value))))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `evaluation.json` and `--json`; what is not a number is None."""
        return {
            "data": self.data_source,
            "num_examples": len(self.cases),
            "models": [
                {
                    "name": model.name,
                    "seconds": model.seconds,
                    **{name: _plain(value) for name, value in model.heldout.items()},
                    "metrics": {name: _plain_figure(figures[number]) for name, figures in self.figures.items()},
                }
                for number, model in enumerate(self.models)
            ],
            "comparison": {name: _plain_comparison(found) for name, found in self.comparisons.items()},
            "slices": [
                {
                    "column": each.column,
                    "value": each.value,
                    "metric": self.metrics[0].name,
                    "figures": [_plain_figure(figure) for figure in each.figures],
                    **({"comparison": _plain_comparison(each.comparison)} if each.comparison else {}),
                }
                for slices in self.slices.values()
                for each in slices
            ],
            "metrics_left_out": dict(self.left_out),
            **({"judge": {"model": self.judge_name, **self.judge_verdicts.to_dict()}} if self.judge_verdicts else {}),
        }

    def answer_rows(self) -> list[dict[str, Any]]:
        """Returns the lines of `answers.jsonl`: question, wanted answer, and each model's answer with its scores."""
        scores = [
            {metric.name: row_figures(metric, model.statistics[metric.name]) for metric in self.metrics}
            for model in self.models
        ]
        return [
            {
                "origin": case.origin,
                "question": case.question,
                "reference": case.reference,
                "answers": {
                    model.name: {
                        "answer": model.answers[row],
                        **{name: _plain(float(values[row])) for name, values in of_model.items()},
                    }
                    for model, of_model in zip(self.models, scores, strict=True)
                },
                "columns": dict(case.columns),
            }
            for row, case in enumerate(self.cases)
        ]


def _figure(metric: Metric, model: EvaluatedModel, rows: Sequence[int] | None = None) -> Figure:
    """Returns the figure of a model on all rows, or on some."""
    statistics = model.statistics[metric.name]
    chosen = statistics if rows is None else statistics[list(rows)]
    return Figure(figure_of(metric, chosen), confidence_interval(metric, chosen), int(chosen.any(axis=1).sum()))


def _goodness(metric: Metric, figures: np.ndarray) -> np.ndarray:
    """Returns figures so that higher ones are better; those that are not a number last."""
    signed = -figures if metric.is_higher_better is False else figures
    return np.where(np.isnan(signed), np.inf, signed)


def _text_of(value: Any) -> str:
    if value is None or value == "":
        return _NO_VALUE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain_figure(figure: Figure) -> dict[str, Any]:
    return {
        "value": _plain(figure.value),
        "low": _plain(figure.interval.low),
        "high": _plain(figure.interval.high),
        "num_rows": figure.num_rows,
    }


def _plain_comparison(found: PairedComparison) -> dict[str, Any]:
    return {
        "difference": _plain(found.difference),
        "low": _plain(found.interval.low),
        "high": _plain(found.interval.high),
        "num_wins": found.num_wins,
        "num_ties": found.num_ties,
        "num_losses": found.num_losses,
        "p_value": _plain(found.p_value),
    }
