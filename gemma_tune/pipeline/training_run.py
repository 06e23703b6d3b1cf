"""One training run, from its Config to a tuned model: the pipeline's steps in order."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.evaluation import score_answers
from gemma_tune.evaluation.run_report import REPORT_FILE, RunReport, write_report
from gemma_tune.models.functional import Params, assign, gather_to_host
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.preset import save_preset
from gemma_tune.pipeline.heldout_answers import answer_questions, base_answers, questions_to_answer, write_samples
from gemma_tune.pipeline.heldout_metrics import (
    HeldoutQuestions,
    answer_greedily,
    answer_histories,
    best_is_highest,
    evaluation_of_run,
    heldout_questions,
    intervals_of,
    read_step_answers,
    write_step_answers,
)
from gemma_tune.pipeline.setup import Setup, read_splits, set_up
from gemma_tune.pipeline.training_result import RunResult, SampleAnswer
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.runtime.backend import jax, keras
from gemma_tune.runtime.processes import is_primary, raise_in_all_processes, raise_on_lost_process
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.run.loop import Loop, LoopSettings
from gemma_tune.training.run.metrics import MetricsWriter
from gemma_tune.training.run.same_settings import RESULT_FILE, further_training
from gemma_tune.training.run.trackers.follower import Followers
from gemma_tune.training.run.trackers.tracker import TrackedRun, find_trackers
from gemma_tune.training.run.workdir import ADAPTER, MODEL, OpenWorkdir, check_workdir, open_workdir
from gemma_tune.training.state import TrainState


class _Trained(NamedTuple):
    """What training leaves.

    Attributes:
        state: State of the best step if something is held out, else of the last step.
        metrics: Rows of metrics of the whole run.
    """

    state: TrainState
    metrics: list[dict[str, Any]]


def train(config: Config) -> keras.Model:
    """Fine-tunes a model, and saves the trained weights in the workdir.

    A run that was stopped goes on when it is started again with the same config.

    Args:
        config: Settings of the run.

    Returns:
        The tuned KerasHub CausalLM. Metrics, samples, the adapter or model and a report are in `config.workdir`.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: The message says what is wrong and what to do.
    """
    return run_training(config).model


def run_training(config: Config) -> RunResult:
    """Fine-tunes a model as `train` does, and returns the metrics too."""
    with raise_in_all_processes():
        openers = find_trackers(config.training.report_to) if is_primary() else {}
        if is_primary():
            check_workdir(config)  # Before anything that takes long.
    splits = read_splits(config)
    questions = heldout_questions(config, splits)  # Checks the metrics before a model is loaded.
    setup = set_up(config, splits)
    _describe(setup)
    with raise_on_lost_process(), open_workdir(config, setup.data_key) as workdir:
        if workdir.changed:
            _warn(f"Changed since the run was last saved: {'; '.join(workdir.changed)}.")
        samples = base_answers(setup, workdir.path)
        run = TrackedRun(Path(config.workdir).resolve().name, workdir.path, config.to_dict())
        with Followers(openers, run, _warn) as trackers:
            trained = _train(setup, workdir, questions, trackers)
            result = _finish(setup, workdir.path, trained, samples, questions)
            trackers.add_files(_artifacts(config, result))
        return result


def _describe(setup: Setup) -> None:
    report = setup.data.report
    if changes := report.row_change_reasons():
        listed = ", ".join(f"{count:,} {words}" for words, count in changes.items())
        progress.console.print(f"Rows that were changed: {listed}.", markup=False)
    for note in report.notes:
        _warn(note)
    if setup.sharding:
        progress.console.print(f"Mesh: {setup.sharding}", markup=False)
    elif jax.device_count() > 1:
        _warn(f"This run uses one of {jax.device_count()} devices. --mesh=auto uses all.")
    report = setup.data.report
    progress.console.print(f"Data: {report.summary()}", style="yellow" if report.loses_much else "", markup=False)
    progress.console.print(f"Attention: {setup.attention}", markup=False)
    if setup.precision_advice:
        _warn(setup.precision_advice)


def _warn(text: str) -> None:
    progress.console.print(text, style="yellow", markup=False)


def loop_settings(config: Config) -> LoopSettings:
    """Returns a run's settings of the training loop."""
    training = config.training
    return LoopSettings(
        training.eval_every_steps,
        training.checkpoint_every_steps,
        training.early_stopping_patience,
        training.log_every_steps,
        training.on_bad_step == "skip",
        training.best_by,
        best_is_highest(training.best_by),
    )


def _train(setup: Setup, workdir: OpenWorkdir, questions: HeldoutQuestions | None, trackers: Followers) -> _Trained:
    """Runs the loop from the workdir's newest checkpoint on."""
    training, path = setup.config.training, workdir.path
    reporter, folder = progress.ProgressReporter(), workdir.checkpoints
    with Checkpoints(folder, training.keep_last, workdir.about, reporter.on_problem) as checkpoints, reporter:
        state, best = setup.state, Progress()
        if checkpoints.steps:
            state, best = checkpoints.restore(state)
            progress.console.print(f"Resuming from the checkpoint of step {int(state.step)} in {path}.", markup=False)
            if int(state.step) >= len(setup.batches):
                further = further_training(setup.config, path)
                progress.console.print(f"All of its steps are done.{further}", markup=False, soft_wrap=True)
        metrics = MetricsWriter(
            path,
            int(state.step),
            reporter.on_problem,
            writes_events="tensorboard" in training.report_to,
            on_row=trackers.wake,
        )
        trackers.follow(metrics.rows)
        loop = Loop(
            train_step=setup.train_step,
            frozen=setup.frozen,
            batches=setup.on_devices(setup.batches),
            evaluate=setup.evaluate if setup.heldout else None,
            schedule=setup.schedule,
            settings=loop_settings(setup.config),
            checkpoints=checkpoints,
            metrics=metrics,
            reporter=reporter,
            origins=setup.origins,
            evaluate_answers=_answer_evaluation(setup, questions, path, reporter.on_problem) if questions else None,
        )
        try:
            state, best = loop.run(state, best)
        finally:
            metrics.close()
        if best.best_step not in (-1, 0, int(state.step)) and best.best_step in checkpoints.steps:
            state, _ = checkpoints.restore(state, best.best_step)
    return _Trained(state, metrics.rows)


def _answer_evaluation(
    setup: Setup, questions: HeldoutQuestions, workdir: Path, on_problem: Callable[[str], None]
) -> Callable[[int, Params, Callable[[], None]], dict[str, float]]:
    """Returns a function that answers the questions with a step's weights, keeps the answers, and returns figures."""

    def evaluate_step(step: int, trainable: Params, before_each: Callable[[], None]) -> dict[str, float]:
        params = {**trainable, **setup.frozen}
        answers = answer_greedily(setup.model, questions.cases, setup.config.generation, params, before_each)
        try:
            write_step_answers(workdir, step, questions.rows(answers))
        except OSError as error:
            on_problem(f"The answers of step {step} can't be written to {workdir}: {error.strerror or error}.")
        return questions.figures(answers)

    return evaluate_step


def _finish(
    setup: Setup, workdir: Path, trained: _Trained, samples: list[SampleAnswer], asked: HeldoutQuestions | None
) -> RunResult:
    """Saves the trained weights, answers held-out questions with them, and writes result and report."""
    step = int(trained.state.step)
    assign(setup.model, trained.state.trainable)
    saved_to = _save(setup, workdir)
    questions = questions_to_answer(setup)
    with progress.console.status(f"Answering {max(len(questions), len(samples))} held-out questions…"):
        answers = answer_questions(setup, questions)
    for sample, answer in zip(samples, answers, strict=False):
        sample.tuned_answer = answer
    before, after = _heldout_metrics(trained.metrics, 0), _heldout_metrics(trained.metrics, step)
    kept = (read_step_answers(workdir, 0), read_step_answers(workdir, step)) if asked else ([], [])
    evaluation = evaluation_of_run(setup.config.data.source, asked, (before, after), kept)
    result = RunResult(
        model=setup.model,
        workdir=workdir,
        saved_to=saved_to,
        data=setup.data.report,
        num_trainable=sum(math.prod(value.shape) for value in trained.state.trainable.values()),
        num_steps=len(setup.batches),
        best_step=step,
        num_skipped_steps=max([row.get("num_skipped_steps", 0) for row in trained.metrics], default=0),
        before=before,
        after=after,
        best_by=setup.config.training.best_by,
        intervals=intervals_of(evaluation),
        samples=samples,
        scores=score_answers(answers[: len(questions)], [example.answer for example in questions]),
    )
    write_samples(workdir, samples)
    write_json(workdir / RESULT_FILE, result.to_dict())
    shown = RunReport(
        config=setup.config.to_dict(),
        result=result.to_dict(),
        metrics=trained.metrics,
        lengths=setup.data.report.lengths,
        evaluation=evaluation,
        histories=answer_histories(workdir, len(samples)) if asked else [],
    )
    write_report(workdir, shown)
    return result


def _artifacts(config: Config, result: RunResult) -> list[Path]:
    """Returns the files that trackers get: only those that are asked for."""
    wanted = config.training.report_artifacts
    report = [result.workdir / REPORT_FILE] if "report" in wanted else []
    return report + ([result.workdir / ADAPTER] if "adapter" in wanted and config.training.method != "full" else [])


def _save(setup: Setup, workdir: Path) -> Path:
    """Saves the model's adapter, or all of its weights, and returns the path."""
    if setup.config.training.method != "full":
        return save_adapter(setup.model, workdir / ADAPTER, base_model=setup.config.model.source)
    gather_to_host(setup.model)
    if is_primary():
        save_preset(setup.model, workdir / MODEL, overwrite=True)  # The run may have been killed while it finished.
    return workdir / MODEL


def _heldout_metrics(rows: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Returns the held-out metrics of a step, without their prefix."""
    found = [row for row in rows if row["step"] == step and "heldout_loss" in row]
    last = found[-1] if found else {}
    return {name.removeprefix("heldout_"): value for name, value in last.items() if name.startswith("heldout_")}
