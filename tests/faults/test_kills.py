"""Killed at any moment and started again, a run ends as one that never was, bit for bit."""

import random
import signal

import pytest
from helpers.fault_runs import Fault, differences, kill_again_and_again, outcome, random_fault, run

SEEDS = range(17)  # Each kills three times: 51 kills.
# Factors of every kind: PEFT's layout, DoRA's magnitudes, and a learning rate of their own.
METHOD = ("--lora_layout=peft", "--use_dora", "--use_rslora", "--loraplus_lr_ratio=4", "--lora_targets=attention")


@pytest.mark.parametrize(
    ("number", "at_step"),
    [
        (signal.SIGKILL, 5),
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 7, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_at_a_step_changes_nothing(wanted, tmp_path, number, at_step):
    """The run that is started again ends as one that was never stopped, bit for bit."""
    workdir = tmp_path / "w"
    ended = run(workdir, Fault(number, at_step=at_step))
    assert "Traceback" not in ended.err, ended.err
    if number == signal.SIGKILL:
        assert ended.code == -number
    else:
        assert ended.code == 128 + number
        assert f"Stopped at step {at_step} of 12, and saved. Run the same command again to go on." in " ".join(
            ended.err.split()
        )
    ended = run(workdir)
    assert ended.code == 0 and "Resuming from the checkpoint of step" in " ".join(ended.err.split()), ended.err
    assert differences(outcome(workdir), wanted) == []


@pytest.mark.nightly
def test_every_kind_of_factors_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, more=METHOD).code == 0
    assert run(killed, Fault(signal.SIGKILL, at_step=5), METHOD).code == -signal.SIGKILL
    assert run(killed, more=METHOD).code == 0
    wanted = outcome(whole)
    assert any(name.endswith("_magnitude") for name in wanted["adapter"])
    assert differences(outcome(killed), wanted) == []


@pytest.mark.nightly
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_change_nothing(wanted, tmp_path, seed):
    done = kill_again_and_again(tmp_path / "w", seed)
    print(f"seed {seed}: {done}")
    assert differences(outcome(tmp_path / "w"), wanted) == []


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_any_phase_leaves_with_its_code_and_says_how_to_go_on(wanted, tmp_path, number, seed):
    workdir, fault = tmp_path / "w", random_fault(random.Random(100 + seed), number)
    ended = run(workdir, fault)
    print(f"seed {seed}: {fault} -> {ended.code}")
    if ended.code:
        # Before the command line is up, or when it is leaving, Python's own answer to the signal counts.
        assert ended.code in (128 + number, -number), ended.err
        assert "Traceback" not in ended.err, ended.err
        if ended.code == 128 + number:
            assert "un the same command again to go on." in ended.err.splitlines()[-1]
        assert run(workdir).code == 0
    assert differences(outcome(workdir), wanted) == []


@pytest.mark.nightly
def test_a_signal_in_an_evaluation_saves_and_evaluates_when_the_run_goes_on(wanted, tmp_path):
    """The first change to metrics.jsonl is its opening; the second is the evaluation's row, so the signal comes with it."""
    workdir = tmp_path / "w"
    for at_change in (14, 15, 16, 17):
        ended = run(workdir, Fault(signal.SIGTERM, at_change=at_change))
        assert ended.code in (0, 143), ended.err
    assert run(workdir).code == 0
    assert differences(outcome(workdir), wanted) == []


@pytest.mark.nightly
def test_a_jumping_clock_changes_nothing(wanted, tmp_path):
    assert run(tmp_path / "w", Fault(clock_jumps=True)).code == 0
    found = outcome(tmp_path / "w")
    assert differences(found, wanted) == []


@pytest.mark.nightly
def test_a_finished_run_can_be_run_again(whole, wanted):
    assert run(whole).code == 0
    assert differences(outcome(whole), wanted) == []


@pytest.mark.nightly
def test_other_settings_are_a_difference(wanted, tmp_path):
    """The comparison can fail."""
    assert run(tmp_path / "w", more=("--seed=1",)).code == 0
    assert {"adapter", "metrics"} <= set(differences(outcome(tmp_path / "w"), wanted))
