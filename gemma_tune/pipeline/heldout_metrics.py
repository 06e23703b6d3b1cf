"""Metrics of the answers that a model gives to the same held-out questions at each evaluation of its training."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.config import Config, GenerationConfig
from gemma_tune.config_checks import HELDOUT_FIGURES
from gemma_tune.data import Splits
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation import choose_questions
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.choice import METRICS, choose_metrics
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.read_cases import cases_of
from gemma_tune.evaluation.resampling import figure_of, row_figures
from gemma_tune.evaluation.result import EvaluatedModel, Evaluation
from gemma_tune.evaluation.run_report import AnswerHistory
from gemma_tune.models.functional import Params
from gemma_tune.pipeline.setup import heldout_rows
from gemma_tune.runtime.atomic_files import write_lines
from gemma_tune.runtime.backend import jax, keras
from gemma_tune.serving.generation import generate
from gemma_tune.training.run.workdir import ANSWERS

_MAX_STEPS_SHOWN = 10
_MAX_SLICES, _FEWEST_IN_SLICE = 12, 3  # Of a column by which a report divides the questions.


@dataclasses.dataclass(frozen=True)
class HeldoutQuestions:
    """Held-out questions, and the metrics of the answers to them.

    Attributes:
        cases: The questions.
        metrics: The metrics.
    """

    cases: Sequence[EvalCase]
    metrics: Sequence[Metric]

    def figures(self, answers: Sequence[str]) -> dict[str, float]:
        """Returns the figure of each metric; those that can't judge any of the answers are left out."""
        figures = {metric.name: figure_of(metric, metric.statistics(self.cases, answers)) for metric in self.metrics}
        return {name: figure for name, figure in figures.items() if math.isfinite(figure)}

    def rows(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the question, the wanted answer, the answer and its scores, for each answer."""
        scores = {
            metric.name: row_figures(metric, metric.statistics(self.cases, answers)).tolist() for metric in self.metrics
        }
        return [
            {
                "origin": case.origin,
                "question": case.question,
                "reference": case.reference,
                "answer": answer,
                **{name: values[row] for name, values in scores.items() if math.isfinite(values[row])},
            }
            for row, (case, answer) in enumerate(zip(self.cases, answers, strict=True))
        ]


def answer_metric_names(config: Config) -> list[str]:
    """Returns the names of the metrics of answers that a run computes, each once."""
    names = (config.training.best_by, *config.training.eval_metrics)  # The first one orders the answers of the report.
    return [name for name in dict.fromkeys(names) if name not in HELDOUT_FIGURES]


def best_is_highest(best_by: str) -> bool:
    """Returns whether the highest value of a held-out metric is the best.

    Raises:
        ConfigError: There is no such metric, or neither direction of it is better.
    """
    if best_by in HELDOUT_FIGURES:
        return HELDOUT_FIGURES[best_by]
    if best_by not in METRICS:
        known = [*HELDOUT_FIGURES, *METRICS]
        raise ConfigError(
            f"training.best_by must be one of {', '.join(known)}; got {best_by!r}.{did_you_mean(best_by, known)}"
        )
    is_higher_better = METRICS[best_by].is_higher_better
    if is_higher_better is None:
        raise ConfigError(
            f"training.best_by={best_by} can't say which step is the best: neither more nor less of it is better."
        )
    return is_higher_better


def heldout_questions(config: Config, splits: Splits) -> HeldoutQuestions | None:
    """Returns the questions that are answered at each evaluation; None if no metric of answers is chosen.

    Args:
        config: Settings of the run.
        splits: Its data.

    Raises:
        ConfigError: A metric is unknown or doesn't suit the data, or no question is held out.
    """
    training = config.training
    best_is_highest(training.best_by)
    names = answer_metric_names(config)
    if not names:
        return None
    chosen = choose_questions(splits.heldout, training.num_eval_answers, config.seed)
    if not chosen:
        raise ConfigError(f"The metric {names[0]} needs answers to held-out questions, but no question is held out.")
    cases = cases_of(chosen, heldout_rows(config))
    metrics, _ = choose_metrics(names, (), cases)
    return HeldoutQuestions(cases, metrics)


def answer_greedily(
    model: keras.Model,
    cases: Sequence[EvalCase],
    generation: GenerationConfig,
    params: Params,
    before_each: Callable[[], None],
) -> list[str]:
    """Returns the answers of a model in training, of which each token is the most likely one.

    Args:
        model: CausalLM. The programs that generate are compiled at the first call and kept.
        cases: The questions.
        generation: Settings, of which those of sampling are not used.
        params: Arrays to use in place of the model's own.
        before_each: Called before each batch of questions; may raise to stop.
    """
    # Committed to their devices, as the results of steps are: else the first evaluation would be compiled apart.
    params = {path: jax.device_put(value, value.sharding) for path, value in params.items()}
    return generate(  # type: ignore[return-value]  # A list of prompts gives a list.
        model,
        [case.prompt for case in cases],
        max_new_tokens=generation.max_new_tokens,
        repetition_penalty=generation.repetition_penalty,
        params=params,
        before_batch=lambda num_answered: before_each(),
    )


def write_step_answers(workdir: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the answers of one evaluation to `answers/step_000050.jsonl`.

    Raises:
        OSError: It can't be written.
    """
    path = _answers_file(workdir, step)
    path.parent.mkdir(exist_ok=True)
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def read_step_answers(workdir: Path, step: int) -> list[str]:
    """Returns the answers of one evaluation; none if they can't be read."""
    return [row["answer"] for row in _read_rows(workdir, step)]


def answer_histories(workdir: Path, num_questions: int) -> list[AnswerHistory]:
    """Returns how the answers to the first questions changed from evaluation to evaluation, ten of them at most."""
    found = sorted((workdir / ANSWERS).glob("step_*.jsonl"))
    places = {round(place) for place in np.linspace(0, len(found) - 1, _MAX_STEPS_SHOWN)} if found else set()
    steps = [int(found[place].stem.removeprefix("step_")) for place in sorted(places)]
    rows = {step: _read_rows(workdir, step)[:num_questions] for step in steps}
    questions = max(rows.values(), key=len, default=[])
    return [
        AnswerHistory(
            row["question"],
            row["reference"],
            [(step, rows[step][number]["answer"]) for step in steps if number < len(rows[step])],
        )
        for number, row in enumerate(questions)
    ]


def _read_rows(workdir: Path, step: int) -> list[dict[str, Any]]:
    try:
        text = _answers_file(workdir, step).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]  # splitlines() would split at U+2028 too.
        return rows if all({"question", "reference", "answer"} <= row.keys() for row in rows) else []
    except (OSError, ValueError, AttributeError):
        return []


def evaluation_of_run(
    source: str,
    questions: HeldoutQuestions | None,
    figures: tuple[Mapping[str, float], Mapping[str, float]],
    answers: tuple[Sequence[str], Sequence[str]],
) -> Evaluation:
    """Returns the held-out figures of a run before and after training, and its answers if there are all of them.

    Args:
        source: Name of the held-out data.
        questions: Questions that were answered; None: none.
        figures: Held-out figures before and after training.
        answers: Answers before and after training.
    """
    is_complete = questions is not None and all(len(each) == len(questions.cases) for each in answers)
    asked = questions if questions and is_complete else HeldoutQuestions((), ())
    models = [
        EvaluatedModel(
            name,
            texts if is_complete else (),
            heldout,
            {metric.name: metric.statistics(asked.cases, texts) for metric in asked.metrics},
        )
        for name, heldout, texts in zip(("before", "after"), figures, answers, strict=True)
    ]
    return Evaluation(source, asked.cases, asked.metrics, models, slice_columns_of(asked.cases))


def slice_columns_of(cases: Sequence[EvalCase]) -> list[str]:
    """Returns the columns that divide the cases into a few kinds: 2 to 12 values, each of several cases on average."""
    names = dict.fromkeys(name for case in cases for name in case.columns)
    found = []
    for name in names:
        values = [case.columns.get(name) for case in cases]
        is_plain = all(value is None or isinstance(value, (str, int)) for value in values)
        if is_plain and 2 <= len(set(values)) <= min(_MAX_SLICES, len(values) // _FEWEST_IN_SLICE):
            found.append(name)
    return found


def intervals_of(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """Returns value, low and high of each metric of answers, by the name of the model and that of the metric."""
    return {
        model.name: {
            name: {"value": figures[number].value, **figures[number].interval._asdict()}
            for name, figures in evaluation.figures.items()
            if math.isfinite(figures[number].value)
        }
        for number, model in enumerate(evaluation.models)
    }


def _answers_file(workdir: Path, step: int) -> Path:
    return workdir / ANSWERS / f"step_{step:06d}.jsonl"
