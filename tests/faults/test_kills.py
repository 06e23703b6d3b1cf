"""Killed at any moment and started again, a run ends as one that never was, bit for bit."""

import random
import signal

import pytest
from harness import Fault, differences, kill_again_and_again, outcome, random_fault, run

# One kill is among the default tests: tests/training/test_resume.py.
pytestmark = pytest.mark.slow
SEEDS = range(17)  # Each kills three times: 51 kills.


@pytest.mark.parametrize("seed", SEEDS)
def test_kills_change_nothing(wanted, tmp_path, seed):
    done = kill_again_and_again(tmp_path / "w", seed)
    print(f"seed {seed}: {done}")
    assert differences(outcome(tmp_path / "w"), wanted) == []


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


def test_a_signal_in_an_evaluation_saves_and_evaluates_when_the_run_goes_on(wanted, tmp_path):
    """The first change to metrics.jsonl is its opening; the second is the evaluation's row, so the signal comes with it."""
    workdir = tmp_path / "w"
    for at_change in (14, 15, 16, 17):
        ended = run(workdir, Fault(signal.SIGTERM, at_change=at_change))
        assert ended.code in (0, 143), ended.err
    assert run(workdir).code == 0
    assert differences(outcome(workdir), wanted) == []


def test_a_jumping_clock_changes_nothing(wanted, tmp_path):
    assert run(tmp_path / "w", Fault(clock_jumps=True)).code == 0
    found = outcome(tmp_path / "w")
    assert differences(found, wanted) == []


def test_a_finished_run_can_be_run_again(whole, wanted):
    assert run(whole).code == 0
    assert differences(outcome(whole), wanted) == []


def test_other_settings_are_a_difference(wanted, tmp_path):
    """The comparison can fail."""
    assert run(tmp_path / "w", more=("--seed=1",)).code == 0
    assert {"adapter", "metrics"} <= set(differences(outcome(tmp_path / "w"), wanted))
