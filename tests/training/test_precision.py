"""Training in 16 bits follows float32, and float16 with loss scaling neither loses gradients nor breaks on large ones."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_loops import fresh_state, make_loop
from helpers.training_steps import num_targets, random_batch, sgd

from gemma_tune.cli.main import run as run_command
from gemma_tune.data import Batch, TokenizedExample, make_batch
from gemma_tune.errors import TrainingError
from gemma_tune.models import transforms as prepare
from gemma_tune.models.functional import parameters, variables_by_path
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.training.losses import loss_scale as loss_scale_module
from gemma_tune.training.losses.loss_scale import FIRST_SCALE, LossScale, init_loss_scale, next_loss_scale, power_of_two
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.run.checkpoint_content import Progress, state_to_tree
from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.state import StepMetrics, init_state
from gemma_tune.training.step.loss import make_loss_fn
from gemma_tune.training.step.per_block import PerBlockProgram, per_block_program
from gemma_tune.training.step.train_step import make_eval_step, make_train_step
from gemma_tune.training.step.update import make_update

FLOAT16 = ("float16", "mixed_float16")
NUM_STEPS, WINDOW = 100, 20
# float16 rounds at 2^-11, bfloat16 at 2^-8; both are unbiased, and steps average over them. A 1 % difference of a mean
# over a window would be visible in a curve. Half the learning rate is the negative control.
MOST = 0.01


def adamw(learning_rate=3e-3):
    schedule = make_schedule("constant", learning_rate, 0, 10)
    return make_optimizer("adamw", schedule, weight_decay=0.01, b1=0.9, b2=0.999, epsilon=1e-8, clip_norm=1.0)


def with_scale(state, scale, **others):
    return state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(scale), **others))


def lora_model(tiny, precision, family="gemma3", alpha=8.0, size=0.1):
    """A model whose factors are the same in every precision, B among them no zeros."""
    model = tiny(family, precision=precision)
    enable_lora(model.backbone, 4, alpha, ("all-linear",), seed=0)
    rng = np.random.default_rng(3)
    for variable in model.backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * size)
    return model


def snapshot(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


@functools.cache
def curve(method, precision, learning_rate=3e-3):
    """The mean losses of windows, over the same batches for all: new tokens in each step, few of them frequent, so that
    there is something to learn and nothing to learn by heart.
    """
    from gemma_tune.models.load import load_model

    model = load_model("tiny:gemma3", precision=precision)
    lora = LoraSettings(4, 4.0, ("all-linear",), seed=0) if method == "lora" else None
    transform_for_training(model, lora, packing=True, remat="dots", row_length=40)
    rng = np.random.default_rng(5)
    frequency = 1 / np.arange(1, 1001) ** 1.5
    step = make_train_step(model, adamw(learning_rate), 60, 1, PerBlockProgram(model, "dots"))
    state, frozen, losses = init_state(model, adamw(learning_rate), take_over=True), parameters(model).frozen, []
    for _ in range(NUM_STEPS):
        tokens = rng.choice(np.arange(10, 1010), size=(2, 40), p=frequency / frequency.sum()).astype(np.int32)
        batch = make_batch([[TokenizedExample(row, np.arange(40) >= 10)] for row in tokens], 2, 40)
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
    assert not state.loss_scale or int(state.loss_scale.num_skipped) <= 3
    return np.mean(np.reshape(losses, (-1, WINDOW)), axis=1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "precision"),
    [("full", "mixed_bfloat16"), ("full", "mixed_float16"), ("lora", "bfloat16"), ("lora", "float16")],
)
def test_the_loss_curve_is_float32s(method, precision):
    rate = 1e-3 if method == "full" else 1e-2
    wanted = curve(method, "float32", rate)
    assert wanted[-1] < 0.75 * math.log(1024)  # Where random weights begin. It learns: there is a curve to follow.
    np.testing.assert_allclose(curve(method, precision, rate), wanted, rtol=MOST)


@pytest.mark.nightly
def test_another_learning_rate_is_no_such_curve():
    wanted = curve("lora", "float32", 1e-2)
    assert np.max(np.abs(curve("lora", "float32", 5e-3) / wanted - 1)) > 2 * MOST


def tiny_gradients(tiny, precision, scale):
    """The gradients of A, which alpha / rank makes 2^-20 times what they would be, by one step of the whole program."""
    model, batch = lora_model(tiny, precision, "gemma", alpha=4 * 2.0**-20), random_batch(np.random.default_rng(1))
    state = init_state(model, sgd())
    if scale:
        state = with_scale(state, scale)
    step = make_train_step(model, sgd(), num_targets(batch), 1)
    state, _ = step(state, parameters(model).frozen, batch)
    traces = state.opt_state[0].trace  # Momentum 0: the gradient.
    return np.concatenate([np.ravel(value) for path, value in sorted(traces.items()) if path.endswith("_a")])


@pytest.mark.parametrize("precision", FLOAT16)
def test_tiny_gradients_live_by_the_scale(tiny, precision):
    wanted = tiny_gradients(tiny, "float32", None)
    scaled, unscaled = (tiny_gradients(tiny, precision, scale) for scale in (FIRST_SCALE, 1.0))
    assert np.abs(wanted).max() < 2.0**-16

    def error(found):
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    assert error(scaled) < 0.02  # Some six blocks, each rounding at 2^-11.
    assert error(unscaled) > 0.5 and np.mean(unscaled == 0) > 0.5 > np.mean(scaled == 0)


@pytest.mark.parametrize("program", ["whole", "per_block"])
@pytest.mark.parametrize("precision", FLOAT16)
def test_a_step_that_overflows_changes_nothing_but_the_scale(tiny, precision, program):
    model, batch = lora_model(tiny, precision), random_batch(np.random.default_rng(1))
    per_block = per_block_program(program, model, "dots")
    step, frozen = make_train_step(model, adamw(), num_targets(batch), 1, per_block), parameters(model).frozen
    state, _ = step(init_state(model, adamw()), frozen, batch)  # A good one first, so that there are moments to keep.
    assert state.loss_scale.scale == FIRST_SCALE and state.loss_scale.num_good == 1
    state = with_scale(state, 2.0**40)
    before = snapshot(state)
    state, metrics = step(state, frozen, batch)
    assert np.isfinite(metrics.loss) and not np.isfinite(metrics.grad_norm)
    assert_same_bits(snapshot((state.trainable, state.opt_state)), (before.trainable, before.opt_state))
    assert int(state.step) == 2
    assert snapshot(state.loss_scale) == LossScale(2.0**39, 0, 1)
    state, metrics = step(with_scale(state, 2.0**15), frozen, batch)
    assert np.isfinite(metrics.grad_norm) and int(state.loss_scale.num_skipped) == 1
    assert any((np.asarray(state.trainable[path]) != before.trainable[path]).any() for path in before.trainable)


def test_too_large_a_scale_comes_down_by_itself(tiny):
    model, batch = lora_model(tiny, "mixed_float16"), random_batch(np.random.default_rng(1))
    step, frozen = make_train_step(model, sgd(0.01), num_targets(batch), 1), parameters(model).frozen
    state = with_scale(init_state(model, sgd(0.01)), 2.0**30)
    for _ in range(24):
        state, metrics = step(state, frozen, batch)
    found = snapshot(state.loss_scale)
    assert 0 < found.num_skipped < 20 and found.scale == 2.0 ** (30 - found.num_skipped)
    assert np.isfinite(metrics.grad_norm) and found.num_good == 24 - found.num_skipped


@pytest.mark.parametrize(("precision", "num_micro"), [("float16", 1), ("mixed_float16", 2)])
def test_blocks_accumulation_and_scale_change_no_gradient(tiny, precision, num_micro):
    """Whatever the program, the portions and the scale, it is float32's gradient. SGD at rate 1: its trace."""
    batch = random_batch(np.random.default_rng(1), lengths=(38, 6, 3, 30))

    def gradient(precision, program, scale=None):
        model = lora_model(tiny, precision, "gemma")
        per_block = per_block_program(program, model, "dots")
        step = make_train_step(model, sgd(), num_targets(batch), num_micro, per_block)
        state = init_state(model, sgd())
        state, metrics = step(with_scale(state, scale) if scale else state, parameters(model).frozen, batch)
        trace = state.opt_state[0].trace
        return np.concatenate([np.ravel(trace[path]) for path in sorted(trace)]), metrics

    wanted, wanted_metrics = gradient("float32", "whole")
    for program, scale in (("whole", 2.0**15), ("per_block", 2.0**15), ("per_block", 2.0**11)):
        found, metrics = gradient(precision, program, scale)
        np.testing.assert_allclose(metrics.loss, wanted_metrics.loss, rtol=1e-3)  # 2^-11 and some.
        np.testing.assert_allclose(metrics.grad_norm, wanted_metrics.grad_norm, rtol=5e-3)
        assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)


def test_the_scale_grows_after_good_steps_and_falls_after_bad_ones(rng, monkeypatch):
    """Against a plain loop, over random weather."""
    monkeypatch.setattr(loss_scale_module, "GROWTH_STEPS", 3)
    found, scale, num_good, num_skipped = init_loss_scale(), FIRST_SCALE, 0, 0
    assert found.scale == scale
    for is_good in rng.random(200) < 0.9:
        found = next_loss_scale(found, jnp.asarray(is_good))
        num_good, num_skipped = (num_good + 1, num_skipped) if is_good else (0, num_skipped + 1)
        if not is_good:
            scale /= 2
        elif num_good == 3:
            scale, num_good = min(2 * scale, 2.0**24), 0
        assert snapshot(found) == LossScale(scale, num_good, num_skipped)
    assert scale == pytest.approx(2.0**24, rel=0.9) and num_skipped > 5  # It was at its limit, and came down from it.


def test_powers_of_two():
    assert [power_of_two(number) for number in (1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]


def test_a_resumed_run_goes_on_with_its_scale(tiny, tmp_path, monkeypatch):
    """Skipped steps before, a doubled scale after: the end has the same bits."""
    monkeypatch.setattr(loss_scale_module, "GROWTH_STEPS", 4)
    model, batch = lora_model(tiny, "mixed_float16", "gemma"), random_batch(np.random.default_rng(1))
    step, frozen = make_train_step(model, adamw(), num_targets(batch), 1), parameters(model).frozen
    state = with_scale(init_state(model, adamw()), 2.0**40)

    def steps(state, count):
        for _ in range(count):
            state, _ = step(state, frozen, batch)
        return state

    state = with_scale(steps(state, 2), 2.0**15)
    state = steps(state, 2)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(state, Progress())
        wanted = snapshot(steps(state, 3))
        restored, _ = checkpoints.restore(init_state(model, adamw()))
    assert snapshot(restored.loss_scale) == LossScale(2.0**15, 2, 2)
    assert_same_bits(snapshot(steps(restored, 3)), wanted)
    assert wanted.loss_scale == LossScale(2.0**16, 1, 2) and wanted.step == 7


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_other_precisions_have_no_scale(tiny, precision):
    """Their checkpoints hold what they held, and the step computes nothing with a scale."""
    model, batch = lora_model(tiny, precision, "gemma"), random_batch(np.random.default_rng(1))
    state = init_state(model, sgd())
    assert state.loss_scale is None and not [
        name for name in state_to_tree(state) if "scale" in name and "loss" in name
    ]
    state, _ = make_train_step(model, sgd(), num_targets(batch), 1)(state, parameters(model).frozen, batch)
    assert state.loss_scale is None


# What stays float32.


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gemma3", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_what_stays_float32(tiny, monkeypatch, family, precision):
    """By the dtypes of a gradient's own operations: the exponentials and maxima of softmax and loss, the roots of
    norms, the angles, where there are no tables of them. That products with weights are not float32 shows that it can
    be seen.
    """
    import jax.extend

    monkeypatch.setattr(prepare, "use_rotary_tables", lambda backbone: None)
    model = tiny(family, precision=precision)
    lora = LoraSettings(4, 4.0, ("all-linear",), seed=0)
    transform_for_training(model, lora, packing=True, remat="none", row_length=40, program="whole")
    groups, batch = parameters(model), Batch(*map(jnp.asarray, random_batch(np.random.default_rng(1))))
    loss_fn = make_loss_fn(model, num_targets(batch))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda t: loss_fn(t, groups.frozen, batch).loss_sum))(groups.trainable)
    low = jnp.dtype(precision.removeprefix("mixed_"))
    found, products = {}, []
    for equation in equations(jaxpr.jaxpr):
        dtypes = {variable.aval.dtype for variable in equation.invars if hasattr(variable.aval, "dtype")}
        found.setdefault(equation.primitive.name, set()).update(dtypes)
        if equation.primitive.name == "dot_general":
            products.append((dtypes, equation.outvars[0].aval))
    for name in ("exp", "log", "sqrt", "reduce_max", "cos", "sin"):
        assert found[name] <= {jnp.dtype("float32")}, name
    assert any(dtypes == {low} and out.dtype == low for dtypes, out in products)
    # In float32 are the backward pass's products with attention's weights and scores alone.
    num_full = sum(dtypes == {jnp.dtype("float32")} for dtypes, _ in products)
    assert num_full < sum(dtypes == {low} for dtypes, _ in products) / 4
    heads = [out for _, out in products if out.shape[-1] in (1024, 4096) or out.ndim == 5]
    assert heads and {out.dtype for out in heads} >= {jnp.dtype("float32")}  # Scores and logits.
    assert {value.dtype for value in groups.trainable.values()} == {jnp.dtype("float32")}  # LoRA factors.
    weights = jnp.dtype("float32") if precision.startswith("mixed_") else low
    assert {value.dtype for value in groups.frozen.values()} == {weights}


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "mixed_float16"])
def test_gradients_are_added_up_and_applied_in_float32(tiny, precision):
    """All weights trained. The state keeps the weights' own dtype, everything between is float32."""
    model, batch = tiny("gemma3", precision=precision), random_batch(np.random.default_rng(1))
    state = init_state(model, adamw())
    floats = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    sums = make_eval_step(model, num_targets(batch))(state.trainable, {}, batch)
    assert {value.dtype for value in sums} == {jnp.dtype("float32")}
    gradients = {path: jnp.full(value.shape, 0.5, jnp.float32) for path, value in state.trainable.items()}
    update = make_update(adamw(), num_targets(batch))
    jaxpr = jax.make_jaxpr(update)(state, gradients, sums, batch.segment_ids)
    low = [e for e in equations(jaxpr.jaxpr) if e.outvars[0].aval.dtype in (jnp.bfloat16, jnp.float16)]
    # `cond`: the updated weights, or those there were. What is in its branches is looked at too.
    assert {e.primitive.name for e in low} <= {"convert_element_type", "select_n", "pjit", "jit", "cond"}
    after, _ = update(state, gradients, sums, batch.segment_ids)
    assert {p: v.dtype for p, v in after.trainable.items()} == {p: v.dtype for p, v in state.trainable.items()}


def test_products_add_up_in_float32():
    """A running sum in float16 would stop at 2048, where 1 is less than half a step."""
    ones = jnp.ones((1, 4096), jnp.float16)
    assert float((ones @ ones.T)[0, 0]) == 4096
    assert functools.reduce(lambda total, one: np.float16(total + one), np.ones(4096, np.float16)) == 2048


# When float16 is too small.


def test_a_forward_pass_that_overflows_stops_the_run(tiny, tmp_path):
    """Gemma 1's blocks have nothing that cuts values off, so large weights give a loss that is no number; in bfloat16
    they give one.
    """
    batch = random_batch(np.random.default_rng(1))
    losses = {}
    for precision in ("mixed_bfloat16", "mixed_float16"):
        model = tiny("gemma", precision=precision)
        for block in model.backbone.transformer_layers:
            block.ffw_linear._kernel.assign(block.ffw_linear._kernel * 3e5)
        step = make_train_step(model, sgd(1e-9), num_targets(batch), 1)
        state, metrics = step(init_state(model, sgd(1e-9)), {}, batch)
        losses[precision] = float(metrics.loss)
    assert math.isfinite(losses["mixed_bfloat16"]) and not math.isfinite(losses["mixed_float16"])
    loop, _ = make_loop(tmp_path)
    loop.train_step = lambda *_: (state, metrics)
    with pytest.raises(
        TrainingError, match=r"Step 1: the loss is nan.*float16 ends at 65504.*mixed_bfloat16 or float32"
    ):
        loop.run(fresh_state()._replace(loss_scale=init_loss_scale()), Progress())


def test_a_held_out_loss_that_overflows_stops_before_training(tmp_path):
    loop, _ = make_loop(tmp_path, heldout=lambda w: math.nan)
    with pytest.raises(TrainingError, match=r"held-out loss at step 0 is nan. float16 ends at 65504"):
        loop.run(fresh_state()._replace(loss_scale=init_loss_scale()), Progress())
    assert not loop.reporter.steps


def overflowing_loop(path, bad_steps, num_steps):
    """A loop whose steps have gradients that are not finite, where `bad_steps(step)` says so."""
    loop, checkpoints = make_loop(path, num_steps=num_steps)

    def train_step(state, frozen, batch):
        is_bad = bad_steps(int(state.step))
        values = StepMetrics(*(jnp.asarray(value, jnp.float32) for value in (0.5, 4, 6, math.inf if is_bad else 1)))
        scale = next_loss_scale(state.loss_scale, jnp.asarray(not is_bad))
        return state._replace(step=state.step + 1, loss_scale=scale), values

    loop.train_step = train_step
    return loop, checkpoints


def test_skipped_steps_are_counted_and_logged(tmp_path):
    loop, _ = overflowing_loop(tmp_path, lambda step: step in (0, 4, 5), num_steps=8)
    loop.schedule = make_schedule("linear", 1.0, 0, 8)
    state, _ = loop.run(fresh_state()._replace(loss_scale=init_loss_scale()), Progress())
    assert int(state.step) == 8 and snapshot(state.loss_scale) == LossScale(FIRST_SCALE / 8, 2, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_skipped_steps"] for row in rows] == [1, 1, 1, 1, 2, 3, 3, 3]
    assert [row["loss_scale"] for row in rows] == [FIRST_SCALE / 2] * 4 + [FIRST_SCALE / 4] + [FIRST_SCALE / 8] * 3
    assert ["grad_norm" in row for row in rows] == [False, True, True, True, False, False, True, True]
    applied = [row["learning_rate"] for row in rows if "grad_norm" in row]
    np.testing.assert_allclose(applied, [1 - done / 8 for done in range(5)])  # The optimizer counts its own updates.


def test_a_scale_below_one_stops_the_run(tmp_path):
    loop, checkpoints = overflowing_loop(tmp_path, lambda step: step >= 4, num_steps=100)
    with pytest.raises(
        TrainingError,
        match=r"Step 17: .* at a loss scale of 0\.5\. The last good checkpoint is that of step 15.*float16 ends.*mixed_bfloat16",
    ):
        loop.run(fresh_state()._replace(loss_scale=init_loss_scale()), Progress())
    assert checkpoints.steps[-1] == 15


@pytest.mark.nightly
def test_a_run_from_the_command_line(tmp_path, capfd):
    """Trains, resumes nothing, says what suits this device, and counts."""
    arguments = ["train", "--model=tiny", "--max_length=64", "--batch_size=4", "--config.training.num_train_steps=4",
                 "--config.training.num_sample_answers=1", "--config.training.num_scored_answers=1",
                 "--config.generation.max_new_tokens=2"]  # fmt: skip
    for precision in ("float32", "mixed_float16"):
        workdir = tmp_path / precision
        assert run_command([*arguments, f"--precision={precision}", f"--workdir={workdir}"]) == 0
        said = capfd.readouterr().err
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        is_scaled = precision == "mixed_float16"
        assert (said.count("On a CPU, mixed_float16 is slower than float32") == 1) == is_scaled
        assert all(("loss_scale" in row) == is_scaled for row in rows if "loss" in row)
        assert json.loads((workdir / "result.json").read_text())["num_skipped_steps"] == 0


def test_lora_factors_are_float32_in_all_precisions(tiny):
    for precision in ("bfloat16", "float16", "mixed_float16"):
        model = tiny(precision=precision)
        enable_lora(model.backbone, 2, 2.0, ("all-linear", "token_embedding"), seed=0)
        factors = [v for path, v in variables_by_path(model).items() if "lora_" in path]
        assert len(factors) == 2 * (7 * 6 + 1) and {factor.dtype for factor in factors} == {"float32"}
