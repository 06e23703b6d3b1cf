"""One run from its Config to a tuned model: the pipeline's steps in order."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.data import (
    DataReport,
    Example,
)
from gemma_tune.evaluation import AnswerScore, choose_questions, score_answers
from gemma_tune.evaluation.run_report import write_report
from gemma_tune.models.functional import assign, gather_to_host
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.preset import save_preset
from gemma_tune.pipeline.setup import Setup, read_splits, set_up
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.runtime.backend import jax, keras
from gemma_tune.runtime.processes import all_reduce_max, is_primary, raise_in_all_processes, raise_on_lost_process
from gemma_tune.serving.generation import generate
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.run.loop import Loop, LoopSettings
from gemma_tune.training.run.metrics import MetricsWriter, read_metrics
from gemma_tune.training.run.workdir import ADAPTER, MODEL, OpenWorkdir, check_workdir, open_together
from gemma_tune.training.state import TrainState

SAMPLES_FILE, RESULT_FILE = "samples.json", "result.json"


@dataclasses.dataclass
class SampleAnswer:
    """One held-out question: the wanted answer, and what the model wrote before and after."""

    question: str
    reference: str
    base_answer: str
    tuned_answer: str = ""


@dataclasses.dataclass
class RunResult:
    """What a run came to.

    Attributes:
        model: The tuned CausalLM.
        saved_to: The adapter file, or the preset directory of a fully tuned model.
        num_skipped_steps: Steps whose gradients float16 couldn't hold.
        before, after: Held-out values; empty when nothing is held out. `after` is of the best step.
    """

    model: keras.Model
    workdir: Path
    saved_to: Path
    data: DataReport
    num_trainable: int
    num_steps: int
    best_step: int
    num_skipped_steps: int
    before: dict[str, float]
    after: dict[str, float]
    samples: list[SampleAnswer]
    scores: list[AnswerScore]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `result.json` and `--json`."""
        return {
            "workdir": str(self.workdir),
            "saved_to": str(self.saved_to),
            "num_steps": self.num_steps,
            "best_step": self.best_step,
            "num_skipped_steps": self.num_skipped_steps,
            "num_trainable_parameters": self.num_trainable,
            "heldout_before": self.before,
            "heldout_after": self.after,
            "num_answers_scored": len(self.scores),
            "num_answers_right": sum(score.is_right for score in self.scores),
            "mean_answer_f1": sum(score.f1 for score in self.scores) / len(self.scores) if self.scores else None,
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "data": self.data.to_dict(),
        }


def train(config: Config) -> keras.Model:
    """Fine-tunes a model, and saves what was learnt in the workdir.

    Running it again with the same config goes on where it was stopped.

    Args:
        config: The run.

    Returns:
        The tuned KerasHub CausalLM. Metrics, samples, the adapter or model and a report are in `config.workdir`.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: Says what is wrong and what to do.
    """
    return run(config).model


def run(config: Config) -> RunResult:
    """Like `train`, and returns the figures too."""
    with raise_in_all_processes():
        if is_primary():
            check_workdir(config)  # What can be wrong is looked for before what takes long.
    setup = set_up(config, read_splits(config))
    if setup.sharding:
        progress.console.print(f"Mesh: {setup.sharding}", markup=False)
    elif jax.device_count() > 1:
        text = f"{jax.device_count()} devices; this run takes one. --mesh=auto takes all."
        progress.console.print(text, style="yellow", markup=False)
    progress.console.print(f"Attention: {setup.attention}", markup=False)
    if setup.precision_advice:
        progress.console.print(setup.precision_advice, style="yellow", markup=False)
    with raise_on_lost_process(), open_together(config, setup.data_key) as workdir:
        if workdir.changed:
            text = f"Other than when the run was last saved: {'; '.join(workdir.changed)}."
            progress.console.print(text, style="yellow", markup=False)
        samples = _base_answers(setup, workdir.path)
        state, best = _train(setup, workdir)
        return _finish(setup, workdir.path, state, best, samples)


def _train(setup: Setup, workdir: OpenWorkdir) -> tuple[TrainState, Progress]:
    """Runs the loop from where the workdir's checkpoints end.

    Returns the best state if something is held out, else the last.
    """
    training, path = setup.config.training, workdir.path
    reporter, folder = progress.ProgressReporter(), workdir.checkpoints
    with Checkpoints(folder, training.keep_last, workdir.about, reporter.on_problem) as checkpoints, reporter:
        state, best = setup.state, Progress()
        if checkpoints.steps:
            state, best = checkpoints.restore(state)
            progress.console.print(f"Going on from the checkpoint of step {int(state.step)} in {path}.")
        metrics = MetricsWriter(path, int(state.step), reporter.on_problem)
        loop = Loop(
            train_step=setup.train_step,
            frozen=setup.frozen,
            batches=setup.on_devices(setup.batches),
            evaluate=setup.evaluate if setup.heldout else None,
            schedule=setup.schedule,
            settings=LoopSettings(
                training.eval_every_steps,
                training.checkpoint_every_steps,
                training.early_stopping_patience,
                training.log_every_steps,
                training.on_bad_step == "skip",
            ),
            checkpoints=checkpoints,
            metrics=metrics,
            reporter=reporter,
            origins=setup.origins,
        )
        try:
            state, best = loop.run(state, best)
        finally:
            metrics.close()
        if best.best_step not in (-1, 0, int(state.step)) and best.best_step in checkpoints.steps:
            state, _ = checkpoints.restore(state, best.best_step)
    return state, best


def _finish(setup: Setup, workdir: Path, state: TrainState, best: Progress, samples: list[SampleAnswer]) -> RunResult:
    """Puts the learnt weights into the model, saves them, answers held-out questions, and writes the report."""
    model, config = setup.model, setup.config
    assign(model, state.trainable)
    if config.training.method != "full":
        saved_to = save_adapter(model, workdir / ADAPTER, base_model=config.model.source)
    else:
        saved_to = workdir / MODEL
        gather_to_host(model)
        if is_primary():
            save_preset(model, saved_to, overwrite=True)  # One of the same run, killed while it finished.
    scored = _scored_examples(setup)
    with progress.console.status(f"Answering {max(len(scored), len(samples))} held-out questions…"):
        answers = _answer(setup, scored)
    for sample, answer in zip(samples, answers, strict=False):
        sample.tuned_answer = answer
    rows = read_metrics(workdir)
    heldout = {row["step"]: row for row in rows if "heldout_loss" in row}
    result = RunResult(
        model=model,
        workdir=workdir,
        saved_to=saved_to,
        data=setup.data.report,
        num_trainable=sum(math.prod(value.shape) for value in state.trainable.values()),
        num_steps=len(setup.batches),
        best_step=int(state.step),
        num_skipped_steps=max([row.get("num_skipped_steps", 0) for row in rows], default=0),
        before=_heldout_values(heldout.get(0)),
        after=_heldout_values(heldout.get(int(state.step))),
        samples=samples,
        scores=score_answers(answers[: len(scored)], [example.answer for example in scored]),
    )
    write_json(workdir / SAMPLES_FILE, [dataclasses.asdict(sample) for sample in samples])
    write_json(workdir / RESULT_FILE, result.to_dict())
    write_report(workdir, config.to_dict(), result.to_dict(), rows)
    return result


def _base_answers(setup: Setup, workdir: Path) -> list[SampleAnswer]:
    """Answers the sample questions with the model as it is, or reads what an interrupted run has written."""
    file, samples = workdir / SAMPLES_FILE, None
    with contextlib.suppress(OSError, ValueError, TypeError):  # Not there, or damaged: they are written anew.
        samples = [SampleAnswer(**values) for values in json.loads(file.read_text(encoding="utf-8"))]
    if all_reduce_max(int(is_primary() and samples is not None)):
        return samples or []
    chosen = _scored_examples(setup)[: setup.config.training.num_sample_answers]
    with progress.console.status(f"Answering {len(chosen)} held-out questions with the base model…"):
        answers = _answer(setup, chosen)
    samples = [
        SampleAnswer(example.question, example.answer, answer) for example, answer in zip(chosen, answers, strict=True)
    ]
    write_json(file, [dataclasses.asdict(sample) for sample in samples])
    return samples


def _scored_examples(setup: Setup) -> list[Example]:
    """Returns the held-out conversations that are to be answered."""
    training = setup.config.training
    count = max(training.num_sample_answers, training.num_scored_answers)
    return choose_questions(setup.data.heldout_examples, count, setup.config.seed)


def _answer(setup: Setup, examples: Sequence[Example]) -> list[str]:
    if not examples:
        return []
    return generate(  # type: ignore[return-value]  # A list of prompts gives a list.
        setup.model,
        [example.turns[:-1] for example in examples],
        **dataclasses.asdict(setup.config.generation),
        seed=setup.config.seed,
    )


def _heldout_values(row: dict[str, Any] | None) -> dict[str, float]:
    return {name.removeprefix("heldout_"): value for name, value in (row or {}).items() if name.startswith("heldout_")}
