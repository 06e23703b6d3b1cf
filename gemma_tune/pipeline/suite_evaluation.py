"""Lets a model, and the one that it must not be worse than, answer the questions of a suite, and checks the answers."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gemma_tune.config import Config
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.evaluation.suites.check_suite import Check, PartAnswers, check_suite
from gemma_tune.evaluation.suites.load_suite import load_suite
from gemma_tune.evaluation.suites.suite import Suite, SuitePart
from gemma_tune.pipeline.evaluation import NO_OTHER, answer_cases, check_other, load_models
from gemma_tune.runtime import progress
from gemma_tune.runtime.backend import keras


class SuiteResult(NamedTuple):
    """What came of a suite.

    Attributes:
        suite: The suite.
        model_names: Name of the checked model, and that of the other one if there is one.
        checks: A check for each requirement.
    """

    suite: Suite
    model_names: Sequence[str]
    checks: Sequence[Check]

    @property
    def has_passed(self) -> bool:
        """Whether no check has failed."""
        return not any(check.passed is False for check in self.checks)


class _Answers(NamedTuple):
    texts: list[str]
    seconds: list[float] | None


def run_suite(config: Config, adapter: str, source: str, against: str = "") -> SuiteResult:
    """Lets a model answer the questions of a suite, and checks the answers.

    Args:
        config: Settings: model, generation and seed. The suite's own settings of generation come before these.
        adapter: Path of a LoRA adapter, or ''.
        source: Folder of a suite, or the name of one that comes with gemma_tune.
        against: Model that must not be better, as in `EvaluationOptions`. It is loaded only if the suite compares.

    Raises:
        ConfigError, DataError, ModelError: The message says what is wrong and what to do. The suite is read before a
            model is loaded.
    """
    suite = load_suite(source, METRICS)
    needed = against if suite.needs_other_model else against or NO_OTHER
    check_other(needed, config.model.source)  # Before anything that takes long.
    config = config.replace({f"generation.{name}": value for name, value in suite.generation.items()})
    other = against if suite.needs_other_model else NO_OTHER
    names: list[str] = []
    answers: list[dict[str, _Answers]] = []
    for name, model in load_models(config, adapter, other):
        parts = [part for part in suite.parts if part.must_not_regress] if names else suite.parts
        names.append(name)
        is_timed = not answers
        with progress.track_progress(f"{name}: answered questions", sum(len(part.cases) for part in parts)) as advance:
            answers.append({part.name: _answer(model, part, config, is_timed, advance) for part in parts})
        del model  # Before the next one is loaded.
    other_answers = answers[1] if len(answers) > 1 else {}
    results = {
        part.name: PartAnswers(
            answers[0][part.name].texts,
            other_answers[part.name].texts if part.name in other_answers else None,
            answers[0][part.name].seconds,
        )
        for part in suite.parts
    }
    return SuiteResult(suite, names, check_suite(suite, results, METRICS))


def _answer(
    model: keras.Model, part: SuitePart, config: Config, is_timed: bool, advance: Callable[[int], object]
) -> _Answers:
    """Answers the questions of a part: one at a time if their latency counts, else several together."""
    if part.max_latency_seconds is None or not is_timed:
        return _Answers(answer_cases(model, part.cases, config, advance), None)
    answer_cases(model, part.cases[:1], config)  # Compiles.
    texts, seconds = [], []
    for case in part.cases:
        start = time.perf_counter()
        texts += answer_cases(model, [case], config)
        seconds.append(time.perf_counter() - start)
        advance(1)
    return _Answers(texts, seconds)
