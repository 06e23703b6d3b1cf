"""Schedules by their definition, and update rules by their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_tune.training.optimizer import is_matrix, make_hyperparameters, make_optimizer, make_schedule

PARAMS = {"a/kernel": jnp.ones((2, 3)) * 2.0, "a/scale": jnp.ones(3) * 2.0}
GRADS = {"a/kernel": jnp.full((2, 3), 0.5), "a/scale": jnp.full(3, 0.5)}


def make(name, rate=0.1, weight_decay=0.0, clip_norm=0.0, b1=0.9, ratio=1.0):
    return make_optimizer(
        name,
        make_schedule("constant", rate, 0, 10),
        weight_decay=weight_decay,
        b1=b1,
        b2=0.99,
        epsilon=1e-8,
        clip_norm=clip_norm,
        loraplus_lr_ratio=ratio,
    )


def first_update(optimizer):
    return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]


def test_schedules():
    constant, linear, cosine = (make_schedule(name, 1.0, 4, 20) for name in ("constant", "linear", "cosine"))
    for schedule in (constant, linear, cosine):
        np.testing.assert_allclose([schedule(step) for step in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    steps = np.arange(4, 20)
    np.testing.assert_allclose([constant(step) for step in steps], 1.0)
    np.testing.assert_allclose([linear(step) for step in steps], 1 - (steps - 4) / 16, rtol=1e-5)
    np.testing.assert_allclose(
        [cosine(step) for step in steps], 0.5 * (1 + np.cos(np.pi * (steps - 4) / 16)), rtol=1e-5
    )


@pytest.mark.parametrize("num_train_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_short_runs_reach_the_peak_and_never_stand_still(name, num_train_steps):
    rates = [float(make_schedule(name, 1.0, 100, num_train_steps)(step)) for step in range(num_train_steps)]
    assert max(rates) == 1.0 and min(rates) > 0


def test_adamw_decays_matrices_only():
    update = first_update(make("adamw", weight_decay=0.3))
    # First step: m / sqrt(v) = 1 after bias correction; decay adds 0.3 · 2.
    np.testing.assert_allclose(update["a/kernel"], -0.1 * (1 + 0.6), rtol=1e-5)
    np.testing.assert_allclose(update["a/scale"], -0.1, rtol=1e-5)
    assert is_matrix(PARAMS) == {"a/kernel": True, "a/scale": False}


def test_lion_moves_by_the_sign():
    update = first_update(make("lion", weight_decay=0.3))
    np.testing.assert_allclose(update["a/kernel"], -0.1 * (1 + 0.6), rtol=1e-5)
    np.testing.assert_allclose(update["a/scale"], -0.1, rtol=1e-5)


def test_sgd_with_momentum():
    optimizer = make("sgd", b1=0.5)
    state = optimizer.init(PARAMS)
    first, state = optimizer.update(GRADS, state, PARAMS)
    second, _ = optimizer.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(first["a/kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(second["a/kernel"], -0.075, rtol=1e-5)


def test_adafactor_runs_and_keeps_less_state_than_adamw():
    params = {"k": jnp.ones((256, 256))}
    sizes = {}
    for name in ("adamw", "adafactor"):
        optimizer = make(name)
        state = optimizer.init(params)
        update, state = optimizer.update({"k": jnp.ones((256, 256))}, state, params)
        assert np.isfinite(update["k"]).all() and np.all(update["k"] < 0)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes["adafactor"] < 0.05 * sizes["adamw"]


def test_clipping_scales_the_global_norm():
    norm = np.sqrt(9 * 0.25)
    update = first_update(make("sgd", b1=0.0, clip_norm=0.3))
    np.testing.assert_allclose(update["a/kernel"], -0.1 * 0.5 * 0.3 / norm, rtol=1e-5)


def test_doras_magnitudes_do_not_decay():
    params = {"a/lora_kernel_magnitude": jnp.ones((2, 3)), "a/lora_kernel_a": jnp.ones((2, 3))}
    assert is_matrix(params) == {"a/lora_kernel_magnitude": False, "a/lora_kernel_a": True}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_lora_plus_by_hand(name):
    """Three steps of each rule with a rate of its own for B (arXiv:2402.12354), by NumPy."""
    rng, ratio, rate, decay = np.random.default_rng(0), 16.0, 0.1, 0.3
    names = ("q/lora_kernel_a", "q/lora_kernel_b", "e/lora_embeddings_b", "q/lora_kernel_magnitude")
    params = {path: rng.normal(size=(3, 2)) for path in names}
    optimizer = make(name, rate, weight_decay=decay, ratio=ratio)
    ours = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
    state = optimizer.init(ours)
    first, second = ({path: np.zeros((3, 2)) for path in names} for _ in range(2))
    for step in range(1, 4):
        grads = {path: rng.normal(size=(3, 2)) for path in names}
        updates, state = optimizer.update({p: jnp.asarray(g, jnp.float32) for p, g in grads.items()}, state, ours)
        ours = {path: ours[path] + update for path, update in updates.items()}
        for path, grad in grads.items():
            if name == "adamw":
                first[path] = 0.9 * first[path] + 0.1 * grad
                second[path] = 0.99 * second[path] + 0.01 * grad**2
                direction = first[path] / (1 - 0.9**step) / (np.sqrt(second[path] / (1 - 0.99**step)) + 1e-8)
            elif name == "sgd":
                direction = first[path] = 0.9 * first[path] + grad
            else:
                direction = np.sign(0.9 * first[path] + 0.1 * grad)
                first[path] = 0.99 * first[path] + 0.01 * grad
            decays = 0.0 if path.endswith("magnitude") else decay
            own_rate = rate * (ratio if path.endswith("_b") else 1)
            params[path] = params[path] - own_rate * (direction + decays * params[path])
    for path, value in params.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def steps_of(optimizer, num_steps=25, hyperparameters=None):
    """Parameters after a number of compiled updates with random gradients."""
    rng = np.random.default_rng(3)
    params = {
        path: jnp.asarray(rng.normal(size=(16, 9)), jnp.float32) for path in ("q/lora_kernel_a", "q/lora_kernel_b")
    }
    state, extra = optimizer.init(params), {"hyperparameters": hyperparameters} if hyperparameters else {}

    @jax.jit
    def step(params, state, grads, extra):
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        grads = {path: jnp.asarray(rng.normal(size=(16, 9)) * 0.1, jnp.float32) for path in params}
        params, state = step(params, state, grads, extra)
    return params


NUMBERS = {
    "weight_decay": 0.03,
    "b1": 0.9,
    "b2": 0.995,
    "epsilon": 1e-7,
    "clip_norm": 0.5,
    "loraplus_lr_ratio": 4.0,  # A power of two: XLA multiplies constants with each other first, which rounds once less.
}


def assert_bits(ours, wanted):
    for path, value in wanted.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_numbers_as_inputs_give_the_bits_of_constants(name, kind):
    """One optimizer serves runs of other numbers, and those of a run without clipping, decay and ratio."""
    schedule = make_schedule(kind, 3e-3, 7, 25)
    constants = steps_of(make_optimizer(name, schedule, **NUMBERS))
    other = make_optimizer(
        name, make_schedule("constant", 1.0, 0, 1), **NUMBERS | {"b1": 0.1, "clip_norm": 9.0, "weight_decay": 0.5}
    )
    assert_bits(steps_of(other, hyperparameters=make_hyperparameters(schedule, **NUMBERS).as_arrays()), constants)
    none = NUMBERS | {"clip_norm": 0.0, "loraplus_lr_ratio": 1.0}
    without = steps_of(make_optimizer(name, schedule, **none))
    inputs = make_hyperparameters(schedule, **none).as_arrays()
    if name != "adafactor":  # Its ratio is multiplied last, and rounds.
        assert_bits(steps_of(other, hyperparameters=inputs), without)
    assert not np.array_equal(without["q/lora_kernel_b"], constants["q/lora_kernel_b"])


def test_adamw_and_lion_are_optaxs_bit_for_bit():
    """Checkpoints of optax.adamw's state go on as before."""
    schedule = make_schedule("cosine", 3e-3, 7, 25)
    plain = {"weight_decay": 0.03, "b1": 0.9, "b2": 0.995}
    for name, rule in (
        ("adamw", optax.adamw(schedule, eps=1e-7, mask=is_matrix, **plain)),
        ("lion", optax.lion(schedule, mask=is_matrix, **plain)),
    ):
        ours = make_optimizer(name, schedule, epsilon=1e-7, clip_norm=0.0, **plain)
        assert_bits(steps_of(ours), steps_of(rule))
        assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(rule.init(PARAMS))


@pytest.mark.parametrize("warmup_steps, num_train_steps", [(0, 33), (1, 21), (7, 50), (100, 24)])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_optaxs(kind, warmup_steps, num_train_steps):
    """Compiled with its numbers as constants, as Optax's are in a step, and with them as inputs.

    XLA may round a product and a sum once or twice, by what it fuses (jax 0.12 does so where 0.10 does not): each of the two or three
    roundings is at most half a unit in the last place of the peak rate.
    """
    ours = make_schedule(kind, 3e-4, warmup_steps, num_train_steps)
    warmup_steps = min(warmup_steps, num_train_steps // 2)
    rest = num_train_steps - warmup_steps
    theirs = {
        "constant": optax.constant_schedule(3e-4),
        "linear": optax.linear_schedule(3e-4, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(3e-4, rest),
    }[kind]
    if warmup_steps:
        warmup = optax.linear_schedule(3e-4 / warmup_steps, 3e-4, max(warmup_steps - 1, 1))
        theirs = optax.join_schedules([warmup, theirs], [warmup_steps])
    counts = jnp.arange(num_train_steps)
    wanted = jax.jit(jax.vmap(theirs))(counts)
    last_place = np.spacing(np.float32(3e-4))
    np.testing.assert_allclose(jax.jit(jax.vmap(ours))(counts), wanted, rtol=0, atol=1.5 * last_place)
    inputs = jax.tree.map(lambda number: jnp.asarray(number, jnp.int32 if type(number) is int else jnp.float32), ours)
    np.testing.assert_allclose(
        jax.jit(lambda schedule: jax.vmap(schedule)(counts))(inputs), wanted, rtol=0, atol=1.5 * last_place
    )
