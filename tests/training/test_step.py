"""The step: gradients against KerasHub's own forward, accumulation, what is trained and what is not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training_steps import lora_model, num_targets, random_batch, sgd

from gemma_tune.data import Batch, TokenizedExample, make_batch
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import assign, parameters, params_scope
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.loss import make_loss_fn
from gemma_tune.training.step.train_step import make_eval_step, make_train_step


def plain_loss(model, trainable, frozen, batch):
    """KerasHub's own forward with all logits, and the mean cross-entropy of the weighted targets."""
    inputs = {
        "token_ids": batch.token_ids,
        "padding_mask": (batch.segment_ids > 0).astype(np.int32),
        "position_ids": batch.positions,
    }
    with params_scope(model, trainable, frozen):
        logits = model({name: inputs[name] for name in model.backbone.input})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.target_ids)
    return (losses * batch.loss_weights).sum() / batch.loss_weights.sum()


def test_packed_lora_gradients_equal_those_of_separate_rows_through_keras_hubs_forward(tiny, family, rng):
    model, trainable, frozen = lora_model(tiny, family, rng)
    lengths = (20, 9, 30, 5)
    examples = [TokenizedExample(rng.integers(10, 1024, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]
    separate, packed = make_batch([[each] for each in examples], 4, 40), make_batch([examples[:3], examples[3:]], 2, 60)
    wanted_loss, wanted = jax.jit(jax.value_and_grad(lambda t: plain_loss(model, t, frozen, separate)))(trainable)
    enable_packing(model.backbone)
    loss_fn = make_loss_fn(model, num_targets(packed))
    loss_sum = jax.jit(jax.value_and_grad(lambda t, batch: loss_fn(t, frozen, batch).loss_sum))
    ours_loss, ours = jax.tree.map(lambda a: a / packed.loss_weights.sum(), loss_sum(trainable, packed))
    np.testing.assert_allclose(ours_loss, wanted_loss, rtol=1e-5)
    for path, gradient in wanted.items():
        # float32 through six layers in another order of sums, and rotary angles of other positions: 2e-4 of the
        # largest entry.
        np.testing.assert_allclose(ours[path], gradient, atol=2e-4 * float(np.abs(gradient).max()) + 1e-7, err_msg=path)


def test_full_gradients_equal_those_through_keras_hubs_forward(tiny, family, rng):
    model = tiny(family)
    groups = parameters(model)
    batch = random_batch(rng)
    wanted = jax.jit(jax.grad(lambda t: plain_loss(model, t, groups.frozen, batch)))(groups.trainable)
    loss_fn = make_loss_fn(model, num_targets(batch))
    loss_sum = jax.jit(jax.grad(lambda t, batch: loss_fn(t, groups.frozen, batch).loss_sum))
    ours = jax.tree.map(lambda a: a / batch.loss_weights.sum(), loss_sum(groups.trainable, batch))
    for path, gradient in wanted.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-4 * float(np.abs(gradient).max()) + 1e-7, err_msg=path)


@pytest.mark.parametrize(
    "targets", [("token_embedding", "query"), pytest.param(("token_embedding",), marks=pytest.mark.nightly)]
)
def test_lora_on_the_embedding_trains_head_and_input(tiny, rng, targets):
    model = tiny("gemma3")
    enable_lora(model.backbone, 4, 8.0, targets, seed=0)
    groups = parameters(model)
    trainable = {p: jnp.asarray(rng.normal(size=v.shape), jnp.float32) * 0.1 for p, v in groups.trainable.items()}
    batch = jax.tree.map(jnp.asarray, random_batch(rng))
    wanted = jax.jit(jax.grad(lambda t: plain_loss(model, t, groups.frozen, batch)))(trainable)
    loss_fn = make_loss_fn(model, num_targets(batch))
    ours = jax.jit(jax.grad(lambda t: loss_fn(t, groups.frozen, batch).loss_sum / batch.loss_weights.sum()))(trainable)
    for path, gradient in wanted.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-4 * float(np.abs(gradient).max()) + 1e-7, err_msg=path)


def test_accumulation_with_unequal_token_counts_equals_one_big_batch(tiny, rng):
    model, trainable, frozen = lora_model(tiny, "gemma3", rng)
    for path, value in trainable.items():
        next(v for v in model.backbone.variables if v.path == path).assign(value)
    batch = random_batch(rng, lengths=(38, 6, 3, 30))
    results = {}
    for steps in (1, 2, 4):
        optimizer = sgd()
        step = make_train_step(model, optimizer, num_targets(batch), steps)
        results[steps] = step(init_state(model, optimizer), frozen, batch)
    for steps in (2, 4):
        np.testing.assert_allclose(results[steps][1].loss, results[1][1].loss, rtol=1e-5)
        for path, value in results[1][0].trainable.items():
            np.testing.assert_allclose(results[steps][0].trainable[path], value, atol=2e-5, err_msg=path)
    # Negative control: the mean of the micro-batches' means is another number.
    loss_fn = jax.jit(make_loss_fn(model, num_targets(batch)))
    halves = [loss_fn(trainable, frozen, Batch(*(field[rows] for field in batch))) for rows in (np.s_[:2], np.s_[2:])]
    mean_of_means = np.mean([half.loss_sum / half.weight_sum for half in halves])
    assert abs(mean_of_means - results[1][1].loss) > 1e-3


def test_the_frozen_base_is_bit_identical_after_a_step(tiny, rng):
    model, _, frozen = lora_model(tiny, "gemma3", rng)
    before = {path: np.array(value) for path, value in frozen.items()}
    optimizer = sgd()
    batch = random_batch(rng)
    state, metrics = make_train_step(model, optimizer, num_targets(batch), 1)(
        init_state(model, optimizer), frozen, batch
    )
    assert int(state.step) == 1 and float(metrics.grad_norm) > 0
    for path, value in parameters(model).frozen.items():
        np.testing.assert_array_equal(np.asarray(value), before[path])


def test_padding_rows_and_spare_targets_change_nothing(tiny, rng):
    model = tiny("gemma3")
    groups = parameters(model)
    batch = random_batch(rng, lengths=(20, 9), num_rows=2)
    padded = Batch(*(np.concatenate([field, np.zeros_like(field)]) for field in batch))
    plain = make_eval_step(model, num_targets(batch))(groups.trainable, groups.frozen, batch)
    spare = make_eval_step(model, num_targets(batch) + 17)(groups.trainable, groups.frozen, padded)
    np.testing.assert_allclose(spare, plain, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_low_precision_follows_float32(tiny, rng, precision):
    batch = random_batch(rng)
    losses = {}
    for name in ("float32", precision):
        model = tiny("gemma3", precision=name)
        groups = parameters(model)
        sums = make_eval_step(model, num_targets(batch))(groups.trainable, groups.frozen, batch)
        losses[name] = float(sums.loss_sum / sums.weight_sum)
        assert sums.loss_sum.dtype == jnp.float32
    assert losses[precision] == pytest.approx(losses["float32"], rel=1e-2)  # bfloat16 has 8 bits.


def test_optimizer_state_and_lora_factors_are_float32(tiny):
    model = tiny("gemma3", precision="bfloat16")
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    optimizer = make_optimizer(
        "adamw", make_schedule("constant", 1e-3, 0, 10), weight_decay=0.1, b1=0.9, b2=0.99, epsilon=1e-8, clip_norm=1.0
    )
    state = init_state(model, optimizer)
    assert {value.dtype for value in state.trainable.values()} == {jnp.dtype("float32")}
    full = init_state(tiny("gemma3", precision="bfloat16"), optimizer)
    floats = [leaf for leaf in jax.tree.leaves(full.opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_one_program_serves_all_batches(tiny, rng):
    model, _, frozen = lora_model(tiny, "gemma3", rng)
    optimizer = sgd(0.1)
    step = make_train_step(model, optimizer, 120, 1)
    state = init_state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths in ((20, 9), (5, 38, 30), (40,)):
            state, _ = step(state, frozen, random_batch(rng, lengths))
    assert step.num_programs == 1
    with pytest.warns(
        RuntimeWarning, match=r"train_step is being recompiled \(2nd time\): a batch of another shape came, .*\[4, 48\]"
    ):
        state, _ = step(state, frozen, random_batch(rng, row_length=48))
    step(state, frozen, random_batch(rng))  # The first program is still there.
    assert step.num_programs == 2


def test_the_state_can_take_over_the_models_own_weights(tiny, rng):
    """Held once: the state's arrays are the model's. After `assign` the model computes as with copies."""
    losses = []
    for take_over in (False, True):
        model = tiny("gemma3")
        step = make_train_step(model, sgd(0.1), 120, 1)
        state = init_state(model, sgd(0.1), take_over=take_over)
        own = parameters(model).trainable
        assert all((state.trainable[path] is own[path]) == take_over for path in own)
        batch = random_batch(np.random.default_rng(1))
        state, _ = step(state, {}, batch)
        assign(model, state.trainable)
        losses.append(float(jax.jit(make_loss_fn(model, 120))(parameters(model).trainable, {}, batch).loss_sum))
    assert losses[0] == losses[1]
