"""Bad steps are found, left out, named, and not done again."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_loops import fresh_state, make_loop
from helpers.training_steps import lora_model, num_targets, random_batch, sgd

from gemma_tune.errors import TrainingError
from gemma_tune.models.functional import parameters
from gemma_tune.training.guard import MIN_GOOD_STEPS, LossGuard, init_guard, is_bad, next_guard
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.state import StepMetrics, TrainState, init_state
from gemma_tune.training.step.per_block import per_block_program
from gemma_tune.training.step.train_step import make_train_step
from gemma_tune.training.step.update import make_update


def test_what_is_bad_against_a_plain_loop(rng):
    """A moving average of the good losses, and random weather."""
    guard, mean, good, bad, in_a_row, num_spikes = init_guard(), 0.0, 0, 0, 0, 0
    for _ in range(300):
        loss = float(rng.choice([rng.uniform(1, 2), rng.uniform(3, 9), math.nan, math.inf], p=[0.8, 0.1, 0.05, 0.05]))
        wanted = not math.isfinite(loss) or (good >= MIN_GOOD_STEPS and loss > 2.5 * mean)
        found = is_bad(guard, jnp.float32(loss), 2.5)
        assert bool(found) == wanted
        guard = next_guard(guard, jnp.float32(loss), found)
        num_spikes += wanted and math.isfinite(loss)
        if wanted:
            bad, in_a_row = bad + 1, in_a_row + 1
        else:
            share = max(0.05, 1 / (good + 1))  # The plain mean of the first twenty.
            mean, good, in_a_row = mean + share * (loss - mean), good + 1, 0
        np.testing.assert_allclose(guard.mean_loss, mean, rtol=1e-5)  # float32, 300 sums.
        assert (guard.num_good, guard.num_bad, guard.num_bad_in_a_row) == (good, bad, in_a_row)
    assert num_spikes > 5


def test_without_a_factor_only_what_is_no_number_is_bad():
    guard = LossGuard(jnp.float32(1), jnp.int32(100), jnp.int32(0), jnp.int32(0))
    assert not is_bad(guard, jnp.float32(1e30), 0.0) and is_bad(guard, jnp.float32(math.nan), 0.0)


@pytest.mark.parametrize("guard", [None, init_guard()], ids=["without", "with a guard"])
def test_an_update_holds_no_second_array_of_the_weights_size(guard):
    """Beside weights, moments and gradients: of a 270M each is a gigabyte."""
    schedule = make_schedule("constant", 1e-3, 0, 1)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.01, b1=0.9, b2=0.999, epsilon=1e-8, clip_norm=1.0)
    weights = {f"w{index}": jax.ShapeDtypeStruct((1024, 512), jnp.float32) for index in range(3)}
    scalar, ids = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, weights, jax.eval_shape(optimizer.init, weights), None, guard)
    update = jax.jit(make_update(optimizer, 64), donate_argnums=0)
    compiled = update.lower(state, weights, LossSums(scalar, scalar, scalar), ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1024 * 512


@pytest.mark.parametrize("program", ["whole", "per_block"])
def test_a_spikes_update_is_left_out(tiny, rng, program):
    """All of weights, moments and the usual loss keep their bits; without the guard they change."""
    model, batch = lora_model(tiny, "gemma3", rng)[0], random_batch(rng)
    per_block = per_block_program(program, model, "dots")
    usual = LossGuard(jnp.float32(0.5), jnp.int32(MIN_GOOD_STEPS), jnp.int32(0), jnp.int32(0))
    for guard, changes in ((usual, False), (usual._replace(mean_loss=jnp.float32(50)), True), (None, True)):
        step = make_train_step(model, sgd(0.1), num_targets(batch), 1, per_block, spike_factor=2.0)
        state = init_state(model, sgd(0.1))
        if guard:
            state = state._replace(guard=jax.tree.map(jnp.copy, guard))
        before = jax.tree.map(np.array, (state.trainable, state.opt_state))
        after, metrics = step(state, parameters(model).frozen, batch)
        same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), (after.trainable, after.opt_state), before)
        assert all(jax.tree.leaves(same)) == (not changes)
        assert int(after.step) == 1 and bool(metrics.is_bad) == (not changes)


def guarded_loop(path, losses, skips):
    """A loop over given losses; the guard decides as in a real step."""
    loop, checkpoints = make_loop(path, num_steps=len(losses), settings=(0, 3, 0, 1, skips))

    def train_step(state, frozen, batch):
        loss = jnp.float32(losses[int(state.step)])
        bad = is_bad(state.guard, loss, 2.0)
        values = StepMetrics(loss, jnp.float32(4), jnp.float32(6), jnp.float32(1), bad.astype(jnp.float32))
        trainable = {"w": jnp.where(bad, state.trainable["w"], state.trainable["w"] + 1)}
        return state._replace(
            step=state.step + 1, trainable=trainable, guard=next_guard(state.guard, loss, bad)
        ), values

    loop.train_step = train_step
    loop.origins = lambda step: [f"a.jsonl:{step + 1}", f"b.jsonl:{step + 7}", f"a.jsonl:{step + 90}"]
    return loop, checkpoints


def start():
    return fresh_state()._replace(guard=init_guard())


def test_a_bad_step_stops_and_names_its_examples(tmp_path):
    losses = [1.0] * 24
    losses[22] = 5.0
    loop, checkpoints = guarded_loop(tmp_path, losses, skips=False)
    with pytest.raises(TrainingError) as raised:
        loop.run(start(), Progress())
    for said in (
        "Step 23: the loss is 5, and the usual loss 1. Its examples: a.jsonl:23,112; b.jsonl:29.",
        "The last good checkpoint is that of step 21",
        "on_bad_step=skip goes on from there and skips such steps",
    ):
        assert said in str(raised.value)
    assert checkpoints.steps[-1] == 21
    assert json.loads((tmp_path / "bad_steps.jsonl").read_text()) == {
        "step": 23,
        "problem": "the loss is 5, and the usual loss 1",
        "examples": ["a.jsonl:23", "b.jsonl:29", "a.jsonl:112"],
    }


def test_skipped_steps_change_nothing_and_are_said(tmp_path):
    losses = [1.0] * 30
    losses[5], losses[22], losses[23] = math.nan, 5.0, math.inf
    loop, _ = guarded_loop(tmp_path, losses, skips=True)
    state, _ = loop.run(start(), Progress())
    assert int(state.step) == 30 and float(state.trainable["w"][0]) == 27
    assert [problem.split(":")[0] for problem in loop.reporter.problems] == [
        f"Step {step} was skipped" for step in (6, 23, 24)
    ]
    assert len((tmp_path / "bad_steps.jsonl").read_text().splitlines()) == 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["num_skipped_steps"] == 3 and "loss" not in rows[5] and rows[22]["loss"] == 5.0


def test_only_bad_steps_stop_in_the_end(tmp_path):
    loop, checkpoints = guarded_loop(tmp_path, [1.0] * 4 + [math.nan] * 40, skips=True)
    with pytest.raises(TrainingError, match=r"Step 24: .*; it is the 20th bad step in a row"):
        loop.run(start(), Progress())
    state, _ = checkpoints.restore(start(), checkpoints.steps[-1])
    assert float(state.trainable["w"][0]) == min(checkpoints.steps[-1], 4)
