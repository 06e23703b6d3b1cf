"""Checkpoints are written whatever the clock says, and leave nothing changed in the process."""

import json
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.training_loops import fresh_state

from gemma_tune.runtime.atomic_files import find_damage
from gemma_tune.training.run.checkpoint_content import Progress, progress_from_json
from gemma_tune.training.run.checkpoints import Checkpoints


def test_a_clock_that_jumps_fails_no_save(tmp_path, monkeypatch):
    """By up to thirty years at each look at it. Orbax measures its timeouts by this clock."""
    now, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: now() + jumps.uniform(-1e9, 1e9))
    problems = []
    with Checkpoints(tmp_path, 2, on_problem=problems.append) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(fresh_state()._replace(step=jnp.int32(step)), Progress())
            assert checkpoints.wait()
    assert checkpoints.steps == [3, 4] and problems == []


def test_a_failed_save_is_said_and_the_process_stays_as_it_was(tmp_path, monkeypatch):
    """Errors of late callbacks are ignored until the checkpoints are closed, others never."""
    before, problems, unraisable = sys.unraisablehook, [], []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    hook = sys.unraisablehook
    with Checkpoints(tmp_path, 2, on_problem=problems.append) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(ocp.AsyncCheckpointer, "save", _fail)
            for step in (1, 2):
                checkpoints.save(fresh_state()._replace(step=jnp.int32(step)), Progress())
        assert not checkpoints.wait() and len(problems) == 2
        assert "The checkpoint of step 2 can't be written" in problems[1] and "the disk is full" in problems[1]
        assert sys.unraisablehook is not hook
        for message in ("Event loop is closed", "another error"):
            sys.unraisablehook(type("", (), {"exc_value": RuntimeError(message)}))
        checkpoints.save(fresh_state()._replace(step=jnp.int32(3)), Progress())
        assert checkpoints.wait()
    assert [str(each.exc_value) for each in unraisable] == ["another error"]
    assert sys.unraisablehook is hook and checkpoints.steps == [3]
    monkeypatch.undo()
    assert sys.unraisablehook is before


def _fail(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")


def test_progress_survives_json():
    for progress in (Progress(), Progress(0.25, 7, 2, True)):
        assert progress_from_json(json.loads(json.dumps(progress._asdict()))) == progress


@pytest.mark.parametrize("name", ["v[1]", "what?", "a*b", "with \\ backslash", "with space, é and $x"])
def test_signs_in_the_workdir_are_taken_literally(tmp_path, name):
    """Orbax reads [, ? and * in a path as a pattern, and then writes what can't be read, without an error."""
    state = fresh_state()._replace(step=jnp.int32(3))
    with Checkpoints(tmp_path / name / "checkpoints", 2) as checkpoints:
        checkpoints.save(state, Progress(0.5, 3))
        assert checkpoints.wait()
    with Checkpoints(tmp_path / name / "checkpoints", 2) as checkpoints:
        assert checkpoints.steps == [3]
        again, progress = checkpoints.restore(fresh_state())
    assert progress == Progress(0.5, 3)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert find_damage(tmp_path / name / "checkpoints/3") == ""


def test_orbax_still_needs_that(tmp_path):
    """When this fails, PlainPath has had its day."""
    folder = tmp_path / "v[1]"
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "1", {"a": np.arange(3.0)})
        writer.wait_until_finished()
        with pytest.raises(Exception, match="NOT_FOUND"):
            writer.restore(folder / "1", {"a": np.zeros(3)})
