"""A search on a scripted objective: nothing is trained."""

import math
from typing import NamedTuple

import pytest

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, TrainingError
from gemma_tune.tuning.search import make_search
from gemma_tune.tuning.study import best_trials, run_search
from gemma_tune.tuning.trials import attempts_by_slot

pytest.importorskip("optuna")


class Result(NamedTuple):
    metrics: dict
    num_steps: int


class Curve:
    """A held-out loss in closed form, least at learning rate 1e-3 and rank 8; counts its steps."""

    def __init__(self, dies_in=None):
        self.num_steps, self.dies_in, self.num_runs = 0, dies_in, 0

    def run(self, config, on_evaluation):
        self.num_runs += 1
        least = 1 + (math.log10(config.learning_rate) + 3) ** 2 + abs(math.log2(config.lora.rank / 8)) / 10
        for step in range(50, 451, 50):
            self.num_steps += 50
            on_evaluation(step, {"loss": least + 2 * math.exp(-step / 100)})
            if self.num_runs == self.dies_in:
                raise KeyboardInterrupt
        return Result({"loss": least}, 450)


def search(tmp_path, budget="12_trials", **options):
    return make_search(Config(workdir=str(tmp_path)), budget=budget, **{"metric": "heldout_loss"} | options)


def outcomes(study):
    return {slot: (trial.params, trial.values) for slot, trial in attempts_by_slot(study).items()}


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


def test_another_space_is_refused(tmp_path):
    run_search(search(tmp_path, "1_trial"), Curve())
    with pytest.raises(TrainingError, match="space was"):
        run_search(search(tmp_path, "2_trials", space={"lora.rank": [4, 8]}), Curve())


@pytest.mark.parametrize(
    "space, message",
    [
        ({"lora.rnk": [4]}, "Did you mean lora.rank"),
        ({"lora.rank": {"low": 8, "high": 4}}, "low must be less than high"),
        ({"lora.rank": [0, 4]}, "lora.rank=0"),
    ],
)
def test_a_wrong_space_is_refused(tmp_path, space, message):
    with pytest.raises(ConfigError, match=message):
        search(tmp_path, space=space)
