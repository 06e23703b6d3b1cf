"""The loop around a step that is simple enough to foresee."""

import dataclasses
import math
import os
import signal
import threading
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_loops import fresh_state, make_loop

from gemma_tune.errors import TrainingError
from gemma_tune.runtime.interrupts import Interrupted
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.run.metrics import MetricsWriter, read_metrics


def test_it_steps_evaluates_and_saves_when_due(tmp_path):
    loop, checkpoints = make_loop(tmp_path, heldout=lambda w: 10.0 - w)
    state, progress = loop.run(fresh_state(), Progress())
    assert int(state.step) == 10 and float(state.trainable["w"][0]) == 10
    assert loop.reporter.steps == list(range(1, 11))
    assert [step for step, _ in loop.reporter.evaluations] == [0, 2, 4, 6, 8, 10]
    assert progress == Progress(best_value=0.0, best_step=10, num_bad_evals=0)
    assert checkpoints.steps == [9, 10]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 2, 4, 6, 8, 10]


def test_the_best_checkpoint_stays(tmp_path):
    loop, checkpoints = make_loop(tmp_path, heldout=lambda w: abs(w - 4))
    _, progress = loop.run(fresh_state(), Progress())
    assert progress.best_step == 4
    assert set(checkpoints.steps) == {4, 9, 10}
    state, _ = checkpoints.restore(fresh_state(), 4)
    assert float(state.trainable["w"][0]) == 4


def test_early_stopping(tmp_path):
    loop, _ = make_loop(tmp_path, num_steps=100, heldout=lambda w: abs(w - 4), settings=(2, 0, 3, 1))
    state, progress = loop.run(fresh_state(), Progress())
    assert int(state.step) == 10 and progress == Progress(0.0, 4, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    loop, checkpoints = make_loop(tmp_path, on_step=lambda step: bad if step == 7 else 0.5)
    with pytest.raises(
        TrainingError, match=r"Step 8: the loss is (nan|inf).*The last good checkpoint is that of step 6.*learning_rate"
    ):
        loop.run(fresh_state(), Progress())
    assert checkpoints.steps[-1] == 6
    assert [row["step"] for row in read_metrics(tmp_path)][-1] == 7


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_far_it_got(tmp_path, number, code):
    def send(step):
        if step == 4:
            os.kill(os.getpid(), number)
        return 0.5

    before = signal.getsignal(number)
    loop, checkpoints = make_loop(tmp_path, on_step=send)
    with pytest.raises(Interrupted, match="Stopped at step 5 of 10, and saved") as caught:
        loop.run(fresh_state(), Progress())
    assert caught.value.exit_code == code and checkpoints.steps[-1] == 5
    assert signal.getsignal(number) is before


def test_resuming_goes_on_where_it_stopped(tmp_path):
    loop, checkpoints = make_loop(tmp_path, num_steps=5, heldout=lambda w: 10 - w)
    loop.run(fresh_state(), Progress())
    state, progress = checkpoints.restore(fresh_state())
    assert (int(state.step), progress) == (5, Progress(5.0, 5, 0))
    again, _ = make_loop(tmp_path, num_steps=8, heldout=lambda w: 10 - w)
    state, progress = again.run(state, progress)
    assert again.reporter.steps == [6, 7, 8] and progress.best_step == 8


def test_metrics_of_a_killed_run_are_not_doubled(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 8):
        writer.write(step, loss=float(step))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # Cut off by the kill.
    writer = MetricsWriter(tmp_path, 5)
    writer.write(6, loss=60.0)
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5),
        (6, 60),
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path):
    loop, _ = make_loop(tmp_path)
    loop.run(fresh_state(), Progress())
    file = next(path for path in (tmp_path / "checkpoints" / "10" / "state" / "d").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    problems = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, on_problem=problems.append)
    assert checkpoints.steps == [9]
    assert int(checkpoints.restore(fresh_state())[0].step) == 9
    assert len(problems) == 1 and f"The checkpoint of step 10 is damaged: {file} holds other bytes" in problems[0]
    assert (tmp_path / "checkpoints" / "10.damaged").is_dir()


def test_a_checkpoint_of_another_structure_is_refused(tmp_path):
    loop, checkpoints = make_loop(tmp_path)
    loop.run(fresh_state(), Progress())
    other = fresh_state()._replace(trainable={"v": jnp.zeros(3)})
    with pytest.raises(TrainingError, match="can't be read"):
        checkpoints.restore(other)
    np.testing.assert_array_equal(checkpoints.restore(fresh_state())[0].trainable["w"], [10, 10, 10])


def test_an_error_in_making_a_batch_ends_the_run(tmp_path):
    class Damaged:
        def __len__(self):
            return 10

        def __getitem__(self, step):
            if step == 5:
                raise OSError("the disk is gone")
            return step

    loop, _ = make_loop(tmp_path)
    loop.batches = Damaged()
    with pytest.raises(OSError, match="the disk is gone"):
        loop.run(fresh_state(), Progress())
    assert loop.reporter.steps == [1, 2, 3, 4, 5]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_the_share_of_waiting_for_input_is_a_metric(tmp_path):
    loop, _ = make_loop(tmp_path, on_step=lambda step: time.sleep(0.005) or 0.5)
    loop.run(fresh_state(), Progress())
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    for row in rows:
        assert 0 <= row["input_wait_share"] <= 1
        assert row["input_wait_share"] == pytest.approx(row["input_wait_seconds"] / row["step_seconds"])


def with_answers(loop, figure):
    """Makes a loop choose the best step by `figure(w)`, a metric of answers of which more is better."""
    loop.evaluate_answers = lambda step, trainable, before_each: {"f1": figure(float(trainable["w"][0]))}
    loop.settings = dataclasses.replace(loop.settings, best_by="f1", is_higher_better=True)
    return loop


def test_the_best_step_by_answers_is_another_one_than_by_loss(tmp_path):
    """The loss is lowest at step 4, and answers are best at step 8."""
    best = {}
    for name in ("loss", "f1"):
        loop, checkpoints = make_loop(tmp_path / name, heldout=lambda w: abs(w - 4))
        if name == "f1":
            with_answers(loop, lambda w: 1 - abs(w - 8) / 10)
        _, progress = loop.run(fresh_state(), Progress())
        best[name] = (progress.best_step, progress.best_value)
        assert progress.best_step in checkpoints.steps
    assert best == {"loss": (4, 0.0), "f1": (8, 1.0)}
    rows = [row for row in read_metrics(tmp_path / "f1") if "heldout_loss" in row]
    assert [row["heldout_f1"] for row in rows] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8])


def test_early_stopping_by_answers(tmp_path):
    """The loss falls to the end; answers are best at step 4, and the third worse evaluation ends the run."""
    loop, _ = make_loop(tmp_path, num_steps=100, heldout=lambda w: 100 - w, settings=(2, 0, 3, 1))
    state, progress = with_answers(loop, lambda w: -abs(w - 4)).run(fresh_state(), Progress())
    assert int(state.step) == 10 and progress == Progress(0.0, 4, 3)


def test_an_evaluation_without_a_figure_is_never_the_best(tmp_path):
    loop, _ = make_loop(tmp_path, heldout=lambda w: 10 - w)
    with_answers(loop, lambda w: 0.5)
    loop.evaluate_answers = lambda step, trainable, before_each: {} if step in (0, 10) else {"f1": -1.0 / step}
    _, progress = loop.run(fresh_state(), Progress())
    assert progress.best_step == 8


def test_resuming_by_answers_ends_as_if_it_had_never_stopped(tmp_path):
    def run(folder, stops_at):
        def send(step):
            if step == stops_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return 0.5

        loop, checkpoints = make_loop(folder, heldout=lambda w: 10 - w, on_step=send)
        return with_answers(loop, lambda w: -abs(w - 4)), checkpoints

    wanted = run(tmp_path / "whole", None)[0].run(fresh_state(), Progress())[1]
    loop, checkpoints = run(tmp_path / "stopped", 6)
    with pytest.raises(Interrupted):
        loop.run(fresh_state(), Progress())
    found = run(tmp_path / "stopped", None)[0].run(*checkpoints.restore(fresh_state()))[1]
    assert found == wanted == Progress(0.0, 4, 3)


def test_a_checkpoint_of_an_earlier_version_still_resumes(tmp_path):
    """It calls the best value `best_loss`, which was None before there was one."""

    class EarlierProgress(NamedTuple):
        best_loss: float | None
        best_step: int
        num_bad_evals: int
        pending_evaluation: bool

    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        for step, progress in ((1, EarlierProgress(None, -1, 0, False)), (2, EarlierProgress(0.25, 2, 1, True))):
            checkpoints.save(fresh_state()._replace(step=jnp.int32(step)), progress)
        assert checkpoints.restore(fresh_state(), 1)[1] == Progress()
        assert checkpoints.restore(fresh_state(), 2)[1] == Progress(0.25, 2, 1, True)
