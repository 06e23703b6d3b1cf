"""Runs the trials of a search in one process: the data, the base model and compiled programs serve all of them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.models.functional import Params, assign
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.pipeline.heldout_metrics import answer_greedily, heldout_questions
from gemma_tune.pipeline.setup import Setup, read_splits
from gemma_tune.pipeline.training_run import loop_settings
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.loop import Loop
from gemma_tune.tuning.runner.shared_programs import NUMBERS, SharedPrograms
from gemma_tune.tuning.runner.side_by_side import OnEvaluation, SideBySideTrial, run_side_by_side
from gemma_tune.tuning.runner.trial_state import HostArrays, KeptStates, TrialState, state_on_device, to_host


class TrialResult(NamedTuple):
    """The result of a trial.

    Attributes:
        metrics: Held-out metrics of the best step.
        num_steps: Number of steps that the trial has, those before its `start` included.
        best_step: Step of the best held-out value; the last step if none is better than the value before training.
        seconds: Duration.
        num_compilations: Number of training steps that were compiled for it; 0 if an earlier trial's served.
        model_bytes: Bytes of all weights, trained and frozen.
    """

    metrics: dict[str, float]
    num_steps: int
    best_step: int
    seconds: float
    num_compilations: int
    model_bytes: int


class TrialRunner:
    """Trains trials of one search on the same data, with the same held-out set.

    A trial is computed as `train` computes a run with its Config, except that the search's seed splits the data, makes
    a tiny model's weights, and chooses the questions that are answered. The trial's own seed draws LoRA's factors and
    orders the data.

    Args:
        config: Settings of the search.
        has_dropout: Whether some trials may have LoRA's dropout: one program then serves those without it, too.
    """

    def __init__(self, config: Config, has_dropout: bool = False):
        self._config, self._splits = config, read_splits(config)
        if not self._splits.heldout:
            raise ConfigError("A search compares trials by held-out data. Set data.eval_source or data.eval_fraction.")
        heldout_questions(config, self._splits)  # Checks the metrics before a model is loaded.
        self._programs = SharedPrograms(config, self._splits, has_dropout)
        self._last: tuple[Setup, HostArrays] | None = None

    def run(
        self,
        config: Config,
        on_evaluation: OnEvaluation = lambda step, metrics: None,
        *,
        start: TrialState | None = None,
        on_checkpoint: Callable[[TrialState], None] | None = None,
    ) -> TrialResult:
        """Runs a trial.

        Args:
            config: Settings of the trial, of the same data.
            on_evaluation: Called with the step and the held-out metrics of each evaluation. What it raises ends the
                trial, and is raised here.
            start: State to go on from; None: the beginning.
            on_checkpoint: Called with the state where `train` would write a checkpoint.

        Raises:
            ConfigError: The data is not that of the search.
            ModelError, TrainingError: As in `train`.
        """
        self._check_data(config)
        begin = time.perf_counter()
        setup = self._programs.set_up(config)
        num_before = setup.train_step.num_programs
        state = setup.state if start is None else state_on_device(start.arrays, setup.state)
        evaluations = _Evaluations(on_evaluation, start)
        kept = KeptStates(start, evaluations.by_step, on_checkpoint)
        loop = Loop(
            train_step=setup.train_step,
            frozen=setup.frozen,
            batches=setup.on_devices(setup.batches),
            evaluate=setup.evaluate,
            schedule=setup.schedule,
            settings=loop_settings(config),
            checkpoints=kept,
            metrics=evaluations,
            reporter=evaluations,
            origins=setup.origins,
            evaluate_answers=self._answer_evaluation(setup),
        )
        state, progress = loop.run(state, start.progress if start else Progress())
        num_steps, is_improved = int(state.step), progress.best_step > 0
        self._last = setup, kept.best if is_improved else to_host(state.trainable)
        best_step = progress.best_step if is_improved else num_steps  # As in `train`.
        return TrialResult(
            metrics=evaluations.by_step[best_step],
            num_steps=num_steps,
            best_step=best_step,
            seconds=time.perf_counter() - begin,
            num_compilations=setup.train_step.num_programs - num_before,
            model_bytes=_model_bytes(setup),
        )

    def run_together(
        self, configs: Sequence[Config], on_evaluations: Sequence[OnEvaluation]
    ) -> list[TrialResult | Exception]:
        """Runs trials side by side: each step reads the frozen base once for all of them.

        The results equal those of `run` but for the order in which numbers are added up. The held-out loss alone is
        evaluated, and says which step is the best.

        Args:
            configs: Settings of the trials, which differ in numbers alone.
            on_evaluations: As in `run`, one for each trial.

        Returns:
            For each trial its result, or the exception that ended it alone, from `on_evaluation` or training.

        Raises:
            ConfigError: The trials can't share a program, or are on a mesh.
        """
        for config in configs:
            self._check_data(config)
        setups = [self._programs.set_up(config) for config in configs]
        if any(setup.train_step is not setups[-1].train_step for setup in setups):
            # A later trial may have more targets in a batch, and so another program.
            setups = [self._programs.set_up(config) for config in configs]
        if any(setup.train_step is not setups[-1].train_step for setup in setups):
            raise ConfigError(
                "Trials that are trained side by side must differ only in settings that are inputs of one program: "
                f"{', '.join(NUMBERS)}."
            )
        steps = self._programs.side_by_side_steps(configs[0])
        num_before, trials = steps.train_step.num_programs, list(map(SideBySideTrial, setups, on_evaluations))
        seconds = run_side_by_side(steps, trials)
        num_compilations = steps.train_step.num_programs - num_before
        return [
            trial.error
            or TrialResult(
                metrics=trial.metrics[trial.best_step],
                num_steps=trial.num_steps,
                best_step=trial.best_step,
                seconds=seconds,
                num_compilations=num_compilations,
                model_bytes=_model_bytes(trial.setup),
            )
            for trial in trials
        ]

    def run_many(
        self, configs: Sequence[Config], on_evaluations: Sequence[OnEvaluation]
    ) -> list[TrialResult | Exception]:
        """Runs trials: those that share a program side by side, and these groups one after the other.

        Args:
            configs: Settings of the trials.
            on_evaluations: As in `run`, one for each trial.

        Returns:
            For each trial its result, or the exception that ended it.
        """
        results: dict[int, TrialResult | Exception] = {}
        for group in self._groups(configs):
            if len(group) > 1:
                chosen = [configs[index] for index in group]
                results |= zip(group, self.run_together(chosen, [on_evaluations[i] for i in group]), strict=True)
                continue
            (index,) = group
            try:
                results[index] = self.run(configs[index], on_evaluations[index])
            except Exception as error:
                results[index] = error
        return [results[index] for index in range(len(configs))]

    def num_steps(self, config: Config) -> int:
        """Returns the number of steps of a trial. The base model is loaded and the data tokenized, if not yet done."""
        return len(self._programs.make_batches(config)[0])

    def num_heldout_batches(self, config: Config) -> int:
        """Returns the number of batches of an evaluation, as `num_steps` does."""
        return len(self._programs.make_batches(config)[1])

    def _groups(self, configs: Sequence[Config]) -> list[list[int]]:
        """Returns the indices of trials that share a program, for each program."""
        groups: dict[Config, list[int]] = {}
        for index, config in enumerate(configs):
            groups.setdefault(self._programs.key_of(config), []).append(index)
        return list(groups.values())

    def save_last_adapter(self, folder: Path) -> Path:
        """Saves the best step of the trial that ran to its end last, as `train` saves an adapter, and returns the file.

        Args:
            folder: Folder for the adapter.
        """
        assert self._last is not None, "no trial has run to its end"
        setup, best = self._last
        assign(setup.model, best)
        return save_adapter(setup.model, folder, base_model=setup.config.model.source)

    def _answer_evaluation(self, setup: Setup) -> Callable[[int, Params, Callable[[], None]], dict[str, float]] | None:
        """Returns the evaluation of answers that the trial's `training.eval_metrics` and `best_by` ask for, or None."""
        config = setup.config
        questions = heldout_questions(config.replace({"seed": self._config.seed}), self._splits)
        if questions is None:
            return None

        def evaluate_answers(step: int, trainable: Params, before_each: Callable[[], None]) -> dict[str, float]:
            params = {**trainable, **setup.frozen}
            return questions.figures(
                answer_greedily(setup.model, questions.cases, config.generation, params, before_each)
            )

        return evaluate_answers

    def _check_data(self, config: Config) -> None:
        names = (
            "source", "eval_source", "split", "eval_split", "eval_fraction", "system_prompt", "on_error", "dedup",
            "near_dedup_threshold", "columns", "prompt_template", "on_role_order", "thoughts",
        )  # fmt: skip
        for name in names:
            of_trial, of_search = getattr(config.data, name), getattr(self._config.data, name)
            if of_trial != of_search:
                raise ConfigError(
                    f"All trials of a search have the same data, so that they can be compared: data.{name} is "
                    f"{of_search!r}, got {of_trial!r} for a trial."
                )


class _Evaluations:
    """Takes what a loop reports of a trial, and passes evaluations on."""

    def __init__(self, on_evaluation: OnEvaluation, start: TrialState | None):
        self._on_evaluation = on_evaluation
        self.by_step: dict[int, dict[str, float]] = {start.progress.best_step: start.metrics} if start else {}

    def on_step(self, step: int, num_steps: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def on_problem(self, message: str) -> None:
        """Does nothing: what ends a trial is raised."""

    def write(self, step: int, **values: float) -> None:
        """Does nothing: `on_evaluation` has the metrics."""

    def write_bad_step(self, step: int, what: str, origins: Any) -> None:
        """Does nothing."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Keeps the metrics of a step, and passes them on."""
        self.by_step[step] = values
        self._on_evaluation(step, values)


def _model_bytes(setup: Setup) -> int:
    return sum(array.nbytes for array in (*setup.frozen.values(), *setup.state.trainable.values()))
