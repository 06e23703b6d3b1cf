"""A search on a scripted objective: nothing is trained."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, TrainingError
from gemma_tune.runtime.interrupts import Interrupted
from gemma_tune.tuning.results.result_files import state_of
from gemma_tune.tuning.study import best_trials, run_search
from gemma_tune.tuning.trial_run import METRICS, PROBLEM
from gemma_tune.tuning.trials import attempts_by_slot
from tests.helpers.scripted_search import Curve, outcomes, search

pytest.importorskip("optuna")
REPOSITORY = Path(__file__).parents[2]


def states(study):
    return [state_of(trial) for trial in attempts_by_slot(study).values()]


def test_the_first_trial_has_the_defaults(tmp_path):
    study = run_search(search(tmp_path, "1_trial"), Curve())
    (trial,) = best_trials(study)
    assert trial.params["lora.rank"] == Config().lora.rank
    assert trial.params["optimizer.learning_rate"] == Config().learning_rate


def test_a_stopped_search_ends_as_one_left_alone(tmp_path):
    whole = run_search(search(tmp_path / "whole", pruner="none"), Curve())
    stopped = search(tmp_path / "stopped", pruner="none")
    with pytest.raises(KeyboardInterrupt):
        run_search(stopped, Curve(dies_in=4))
    study = run_search(stopped, Curve())
    assert outcomes(study) == outcomes(whole)
    assert len(study.trials) == 13 and sum(trial.state.name == "FAIL" for trial in study.trials) == 1


def test_the_search_is_better_than_random_ones_and_finds_the_optimum(tmp_path):
    study = run_search(search(tmp_path, "30_trials", pruner="none"), Curve())
    (best,) = best_trials(study)
    assert best.value < 1.02 < attempts_by_slot(study)[0].value  # The least is 1; the defaults give 1.19.


@pytest.mark.slow
def test_pruning_saves_steps_and_keeps_the_best(tmp_path):
    runners = {pruner: Curve() for pruner in ("none", "asha", "hyperband")}
    best = {}
    for pruner, runner in runners.items():
        study = run_search(search(tmp_path / pruner, "24_trials", pruner=pruner), runner)
        best[pruner] = best_trials(study)[0].value
    assert runners["none"].num_steps == 24 * 450
    assert runners["asha"].num_steps < 0.6 * runners["none"].num_steps
    assert runners["hyperband"].num_steps < runners["none"].num_steps
    assert best["asha"] < 1.02 * best["none"]


def test_a_trial_that_fails_or_is_too_large_is_named_and_avoided(tmp_path):
    failing = search(tmp_path / "failing", space={"lora.rank": [4, 16]}, budget="8_trials")
    study = run_search(failing, Curve(error=TrainingError("Step 3: the loss is nan.")))
    failed = [trial for trial in attempts_by_slot(study).values() if state_of(trial) == "failed"]
    assert failed and all(trial.params["lora.rank"] == 16 for trial in failed)
    assert failed[0].user_attrs[PROBLEM] == "Step 3: the loss is nan."
    small = search(tmp_path / "small", space={"lora.rank": [4, 16]}, budget="8_trials", memory_limit=2e9)
    small = dataclasses.replace(small, planned_bytes=lambda config: config.lora.rank * 0.25e9)
    runner = Curve()
    study = run_search(small, runner)
    assert set(states(study)) == {"done", "too large"} and runner.num_runs == states(study).count("done")
    assert best_trials(study)[0].params["lora.rank"] == 4
    with pytest.raises(TrainingError, match=r"No trial was finished. It would take 1.00 GB by plan, and 0.50 GB"):
        too_small = dataclasses.replace(small, settings=dataclasses.replace(small.settings, memory_limit=0.5e9))
        best_trials(run_search(dataclasses.replace(too_small, base=Config(workdir=str(tmp_path / "none"))), Curve()))


@pytest.mark.parametrize("error", [Interrupted("Stopped.", signal.SIGTERM), MemoryError(), OSError("disk")])
def test_what_is_not_about_the_trial_ends_the_search_and_loses_nothing(tmp_path, error):
    stopped = search(tmp_path, space={"lora.rank": [16]}, budget="2_trials")
    with pytest.raises(type(error)):
        run_search(stopped, Curve(error=error))
    assert states(run_search(stopped, Curve())) == ["done"] * 2


def test_two_metrics_give_a_pareto_front(tmp_path):
    study = run_search(search(tmp_path, "20_trials", metric="heldout_loss,model_size"), Curve())
    assert set(states(study)) == {"done"}  # With two metrics nothing is pruned.
    front = best_trials(study)
    values = [trial.values for trial in front]
    assert values == sorted(values) and len(values) > 1
    for trial in attempts_by_slot(study).values():  # No trial is better by both than one of the front.
        assert not any(trial.values[0] < loss and trial.values[1] < size for loss, size in values)
    assert {trial.user_attrs[METRICS]["model_bytes"] for trial in front} <= {4000.0, 8000.0, 16000.0}


def test_trials_side_by_side_are_told_apart(tmp_path):
    runner = Curve(error=TrainingError("no"))
    study = run_search(search(tmp_path, "9_trials", side_by_side=4), runner)
    trials = attempts_by_slot(study)
    assert list(trials) == list(range(9)) and len(study.trials) == 9
    assert all((state_of(trial) == "failed") == (trial.params["lora.rank"] == 16) for trial in trials.values())


def test_a_time_budget_ends(tmp_path):
    study = run_search(search(tmp_path, "0.01s"), Curve())
    assert 1 <= len(study.trials) < 50


def test_another_space_or_other_data_is_refused(tmp_path):
    run_search(search(tmp_path, "1_trial"), Curve())
    with pytest.raises(TrainingError, match="space was"):
        run_search(search(tmp_path, "2_trials", space={"lora.rank": [4, 8]}), Curve())
    with pytest.raises(TrainingError, match="data content was '' and is now 'other'"):
        run_search(dataclasses.replace(search(tmp_path, "2_trials"), data_key="other"), Curve())


def test_a_line_that_was_cut_off_hides_nothing(tmp_path):
    """A killed process leaves half a line; what is written behind it, by others that go on, must stay readable."""
    journal = tmp_path / "study.jsonl"

    class CutsOff(Curve):
        def run(self, config, on_evaluation, **options):
            if self.num_runs == 2:
                with open(journal, "ab") as file:
                    file.write(b'{"op_code": 8, "worker')
            return super().run(config, on_evaluation, **options)

    study = run_search(search(tmp_path, "5_trials", pruner="none"), CutsOff())
    assert outcomes(study) == outcomes(run_search(search(tmp_path, "5_trials", pruner="none"), Curve()))
    assert len(outcomes(study)) == 5
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.slow
def test_the_trials_of_a_dead_worker_are_done_once(tmp_path):
    whole = run_search(search(tmp_path / "whole", "6_trials", pruner="none"), Curve())

    program = """
import os, pathlib, sys
from gemma_tune.tuning.study import run_search
from tests.helpers.scripted_search import Curve, search

class Dies(Curve):
    def run(self, config, on_evaluation, **options):
        if self.num_runs == 3:
            os._exit(9)
        return super().run(config, on_evaluation, **options)

run_search(search(pathlib.Path(sys.argv[1]), "6_trials", pruner="none"), Dies())
"""
    child = subprocess.run([sys.executable, "-c", program, tmp_path / "killed"], cwd=REPOSITORY)
    assert child.returncode == 9
    killed, runner = search(tmp_path / "killed", "6_trials", pruner="none"), Curve()
    study = run_search(killed, runner)
    assert outcomes(study) == outcomes(whole) and runner.num_runs == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"space": {"lora.rnk": [4]}}, "There is no setting 'lora.rnk'. Did you mean lora.rank"),
        ({"space": {"lora.rank": {"low": 8, "high": 4}}}, "low must be less than high"),
        ({"space": {"lora.rank": [0, 4]}}, "The space contains settings that are not allowed: lora.rank=0"),
        ({"space": {"lora.rank": {"lw": 8}}}, "unknown key 'lw'. Did you mean low"),
        ({"space": {"seed": [1, 2]}}, "seed can't be searched"),
        ({"space": {"lora.rank": [4, 4]}}, "a choice is there twice"),
        ({"space": {"lora.use_dora": {"low": 0, "high": 1}}}, "is no number, so it can't have a range"),
        ({"space": {"optimizer.learning_rate": {"low": 0.0, "high": 1.0, "log": True}}}, "greater than 0"),
        ({"space": []}, "A space maps settings"),
        ({"metric": "rougel"}, "there is no metric 'rougel' for a search. Did you mean rougeL"),
        ({"metric": "f1,f1"}, "different ones"),
        ({"pruner": "ashes"}, "Did you mean asha"),
        ({"budget": "2 weeks"}, "can't be read"),
        ({"budget": "0_trials"}, "can't be read"),
        ({"storage": "nosql:///x"}, "--storage=nosql:///x can't be opened"),
    ],
)
def test_wrong_input_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        search(tmp_path, **options).open()


def test_the_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a training run"):
        search(tmp_path)


def test_nothing_is_pruned_during_the_warm_up(tmp_path):
    """Rungs are multiples of the evaluations, of which there are at least nine."""
    ranges = {"optimizer.warmup_steps": {"low": 0, "high": 30, "step": 10}}
    for num_steps, space, every, rung in (
        (450, {"lora.rank": [4]}, 50, 50),
        (166, {"lora.rank": [4]}, 18, 18),
        (166, ranges, 18, 36),
        (900, ranges, 50, 50),
    ):
        found = search(tmp_path, space=space).evaluated_for(num_steps)
        assert (found.config_of({}, 0).training.eval_every_steps, found.first_rung) == (every, rung)
