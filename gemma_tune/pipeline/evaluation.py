"""Evaluates a model by its answers: metrics with intervals, beside its base or another model."""

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import Example, Turn, load_examples
from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.grading import judge_metric
from gemma_tune.evaluation.judge.judge import Judge
from gemma_tune.evaluation.judge.pairwise import judge_pairs
from gemma_tune.evaluation.likelihood.multiple_choice import CHOICE_METRICS, choice_statistics, has_choices
from gemma_tune.evaluation.metrics.choice import choose_metrics
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.read_cases import cases_of, read_cases
from gemma_tune.evaluation.result import EvaluatedModel, Evaluation
from gemma_tune.models.functional import assign
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_configured, load_model
from gemma_tune.models.lora.enable import neutral_lora_values
from gemma_tune.models.sharding.placement import mesh_sharding_of
from gemma_tune.models.sources.source import config_with_base, parse_schemed
from gemma_tune.pipeline.scoring import evaluate, heldout_of_run, run_config
from gemma_tune.pipeline.setup import heldout_rows, row_options
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime import progress
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.process_memory import release_freed_memory
from gemma_tune.serving.generation import generate

BASE, TUNED, NO_OTHER = "base model", "tuned model", "none"


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and compared with what.

    Attributes:
        metrics: Names of metrics; none: those that suit the data.
        metric_functions: Metrics of the user's own, such as `my_file.py:score`.
        slice_columns: Columns of the data by which the figures are divided.
        against: Model to compare with, as in `config.ModelConfig.source`; '': the base of a tuned model; `none`.
        num_questions: Most questions that are answered, chosen at random; 0: all. The loss is that of all.
        judge: Model that compares the answers of both models, or grades those of one; None: no judge.
    """

    metrics: Sequence[str] = ()
    metric_functions: Sequence[str] = ()
    slice_columns: Sequence[str] = ()
    against: str = ""
    num_questions: int = 200
    judge: Judge | None = None


class _Questions(NamedTuple):
    """The questions of an evaluation.

    Attributes:
        cases: Questions that are answered.
        examples: Examples whose loss is computed: those with wanted answers, and documents.
        metrics: Metrics of the answers.
    """

    cases: Sequence[EvalCase]
    examples: Sequence[Example]
    metrics: Sequence[Metric]


def evaluate_answers(
    config: Config, adapter: str = "", *, data_is_given: bool, options: EvaluationOptions = EvaluationOptions()
) -> Evaluation:
    """Lets a model answer questions, scores the answers, and compares it with another model.

    Args:
        config: Settings: model, data, length, batch size, generation and seed.
        adapter: Path of a LoRA adapter, or ''.
        data_is_given: Whether `config.data` is used. False: for the workdir of a run, what that run held out.
        options: Metrics, slices, and the model to compare with.

    Raises:
        ConfigError, DataError, ModelError: The message says what is wrong and what to do. Data, metrics and columns are
            checked before a model is loaded.
    """
    check_other(options.against, config.model.source)  # Before anything that takes long.
    run = None if data_is_given else run_config(config.model.source)
    cases, examples, source = _data_of_run(run) if run else _given_data(config)
    chosen = choose_cases(cases, options.num_questions, config.seed)
    metrics, left_out = _metrics_of(options, chosen)
    questions = _Questions(chosen, examples, metrics)
    evaluation = Evaluation(source, chosen, metrics, [], options.slice_columns, left_out)
    models: list[EvaluatedModel] = []
    for name, model in load_models(config, adapter, options.against):
        models.insert(0, _evaluated(name, model, questions, config))
        del model  # Before the next one is loaded.
    evaluation = dataclasses.replace(evaluation, models=models)
    return _judged(evaluation, options.judge) if options.judge else evaluation


def _metrics_of(options: EvaluationOptions, cases: Sequence[EvalCase]) -> tuple[list[Metric], dict[str, str]]:
    """Returns the metrics of answers and of choices, and what was left out. Questions with choices need no answers."""
    if not cases:
        return [], {}
    num_choices = sum(map(has_choices, cases))
    of_choices = list(CHOICE_METRICS) if num_choices else []
    if num_choices == len(cases) and not (options.metrics or options.metric_functions):
        return of_choices, {}
    of_answers, left_out = choose_metrics(options.metrics, options.metric_functions, cases)
    return [*of_choices, *of_answers], left_out


def _judged(evaluation: Evaluation, judge: Judge) -> Evaluation:
    """Adds the judge's verdicts on two models' answers, or its grades of one model's."""
    if len(evaluation.models) > 1:
        other, model = evaluation.models
        verdicts = judge_pairs(judge, evaluation.cases, model.answers, other.answers)
        return dataclasses.replace(evaluation, judge_name=judge.model, judge_verdicts=verdicts)
    metric, model = judge_metric(judge), evaluation.model
    statistics = {**model.statistics, metric.name: metric.statistics(evaluation.cases, model.answers)}
    graded = dataclasses.replace(model, statistics=statistics)
    return dataclasses.replace(evaluation, metrics=[*evaluation.metrics, metric], models=[graded])


def choose_cases(cases: Sequence[EvalCase], count: int, seed: int) -> list[EvalCase]:
    """Returns at most `count` cases, chosen at random and in their order; with 0, all."""
    if not count or count >= len(cases):
        return list(cases)
    chosen = sorted(random.Random(seed).sample(range(len(cases)), count))
    return [cases[index] for index in chosen]


def _data_of_run(run: Config) -> tuple[list[EvalCase], Sequence[Example], str]:
    """Returns what a run held out, as questions and as examples, and a name for it."""
    examples, name = heldout_of_run(run)
    return cases_of(examples, heldout_rows(run)), examples, name


def _given_data(config: Config) -> tuple[list[EvalCase], Sequence[Example], str]:
    """Returns the questions of `config.data`, its examples, and its name."""
    data = config.data
    cases = read_cases(data.source, data.split, data.on_error, row_options(config))
    answered = [Example((*case.prompt, Turn("model", case.reference)), case.origin) for case in cases if case.reference]
    examples = answered if cases else load_examples(data.source, data.split, data.on_error, row_options(config))
    return cases, examples, data.source


def check_other(against: str, source: str) -> None:
    """Raises ModelError if the model to compare with doesn't exist.

    Args:
        against: Model to compare with, as in `EvaluationOptions`.
        source: Evaluated model. If it is a run, its base is what it is compared with by default.
    """
    if against not in ("", NO_OTHER):
        parse_schemed(against)
    elif not against and run_config(source) is not None:
        config_with_base(Path(source).expanduser())


def load_models(config: Config, adapter: str, against: str) -> Iterator[tuple[str, keras.Model]]:
    """Yields the evaluated model, then the one that it is compared with, each with its name.

    Only one is in memory at a time, if the caller lets go of the first before it asks for the second.

    Args:
        config: Settings: model, precision, mesh and seed.
        adapter: Path of a LoRA adapter, or ''.
        against: Model to compare with, as in `EvaluationOptions`.
    """
    with progress.console.status(f"Loading {config.model.source}…"):
        model = load_configured(config, adapter)
    is_tuned = bool(lora_layers(model.backbone)) or run_config(config.model.source) is not None
    yield (TUNED if is_tuned else config.model.source), model
    if against == NO_OTHER or not (against or is_tuned):
        return
    if not against and lora_layers(model.backbone):
        assign(model, neutral_lora_values(model.backbone))
        yield BASE, model
        return
    sharding = mesh_sharding_of(model.backbone)
    del model
    gc.collect()
    release_freed_memory()
    run = run_config(config.model.source)
    if not against and run is None:
        raise ConfigError("The base of this model isn't known: name it with --against=MODEL, or say --against=none.")
    named = parse_schemed(against or (run.model.source if run else ""))
    spec = QuantSpec(named.scheme, config.model.block_size) if named.scheme else None
    with progress.console.status(f"Loading {named}…"):
        other = load_model(
            named.source, precision=config.model.precision, quant_spec=spec, seed=config.seed, sharding=sharding
        )
    yield (against or BASE), other


def _evaluated(name: str, model: keras.Model, questions: _Questions, config: Config) -> EvaluatedModel:
    """Computes a model's loss, lets it answer, and scores the answers."""
    heldout: Mapping[str, float] = {}
    if questions.examples:
        with progress.console.status(f"{name}: computing the loss of {len(questions.examples)} wanted answers…"):
            heldout = evaluate(
                model,
                questions.examples,
                max_length=config.data.max_length,
                batch_size=config.training.batch_size,
            )
    statistics: dict[str, np.ndarray] = {}
    of_answers = [metric for metric in questions.metrics if metric not in CHOICE_METRICS]
    if len(of_answers) < len(questions.metrics):
        with progress.track_progress(f"{name}: scored choices") as advance:
            statistics = choice_statistics(model, questions.cases, advance=advance)
    answers, start = [""] * len(questions.cases), time.perf_counter()
    if of_answers:
        with progress.track_progress(f"{name}: answered questions", len(questions.cases)) as advance:
            answers = answer_cases(model, questions.cases, config, advance)
    seconds = time.perf_counter() - start
    statistics |= {metric.name: metric.statistics(questions.cases, answers) for metric in of_answers}
    return EvaluatedModel(name, answers, heldout, statistics, seconds)


def answer_cases(
    model: keras.Model,
    cases: Sequence[EvalCase],
    config: Config,
    advance: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Returns a model's answers to questions.

    Args:
        model: CausalLM.
        cases: The questions.
        config: Settings of generation, and the seed.
        advance: Called with the number of questions that were answered since the last call.
    """
    num_shown = 0

    def show(num_answered: int) -> None:
        nonlocal num_shown
        advance(num_answered - num_shown)
        num_shown = num_answered

    prompts, settings = [case.prompt for case in cases], dataclasses.asdict(config.generation)
    answers = generate(model, prompts, **settings, seed=config.seed, before_batch=show)
    show(len(cases))
    return answers  # type: ignore[return-value]  # A list of prompts gives a list.
