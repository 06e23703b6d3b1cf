"""The fused loss against the definition: logits, log-softmax, gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_cases import random_case

from gemma_tune.training.losses.cross_entropy import fused_linear_cross_entropy
from gemma_tune.training.losses.target_positions import gather_targets


def plain_loss(hidden, head, target_ids, weights, soft_cap):
    logits = hidden @ head.T
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.take_along_axis(log_p, target_ids[:, None], axis=1)[:, 0] * weights).sum()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("head_is_trained", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "tile"), [(1, 7, 4), (13, 50, 50), (13, 101, 32), (64, 96, 32), (5, 30, 64)]
)
def test_equals_the_plain_loss_and_its_gradients(rng, soft_cap, head_is_trained, num_tokens, vocabulary, tile):
    hidden, head, target_ids, weights = random_case(rng, num_tokens, vocabulary)

    def fused(hidden, head):
        options = {"soft_cap": soft_cap, "head_is_trained": head_is_trained, "tile": tile}
        return fused_linear_cross_entropy(hidden, head, target_ids, weights, **options).loss_sum

    def plain(hidden, head):
        return plain_loss(hidden, head, target_ids, weights, soft_cap)

    # Sums of some hundred float32 products in another order: 1e-5 relative to the loss, and to the largest gradient.
    np.testing.assert_allclose(fused(hidden, head), plain(hidden, head), rtol=1e-5)
    argnums = (0, 1) if head_is_trained else 0
    ours, wanted = (jax.grad(loss, argnums)(hidden, head) for loss in (fused, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, wanted)


def test_counts_weights_and_correct_tokens(rng):
    hidden, head, target_ids, weights = random_case(rng, 40, 30)
    target_ids = target_ids.at[:20].set(jnp.argmax(hidden @ head.T, axis=1)[:20])
    sums = fused_linear_cross_entropy(hidden, head, target_ids, weights, tile=8)
    assert sums.weight_sum == pytest.approx(float(weights.sum()))
    is_best = jnp.argmax(hidden @ head.T, axis=1) == target_ids
    assert sums.correct_sum == pytest.approx(float((is_best * weights).sum()))
    assert is_best[:20].all()


def test_weight_zero_equals_leaving_the_token_out(rng):
    hidden, head, target_ids, _ = random_case(rng, 10, 30)
    weights = jnp.ones(10).at[3:].set(0.0)
    masked = fused_linear_cross_entropy(hidden, head, target_ids, weights, tile=8)
    subset = fused_linear_cross_entropy(hidden[:3], head, target_ids[:3], jnp.ones(3), tile=8)
    np.testing.assert_allclose(masked.loss_sum, subset.loss_sum, rtol=1e-5)
    gradient = jax.grad(lambda h: fused_linear_cross_entropy(h, head, target_ids, weights, tile=8).loss_sum)(hidden)
    assert not np.any(gradient[3:])


def test_large_logits_stay_finite(rng):
    hidden, head, target_ids, weights = random_case(rng, 8, 30)
    loss, gradient = jax.value_and_grad(
        lambda h: fused_linear_cross_entropy(h, head, target_ids, weights, tile=8).loss_sum
    )(hidden * 1e4)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_uniform_logits_cost_log_v():
    sums = fused_linear_cross_entropy(jnp.zeros((4, 8)), jnp.ones((37, 8)), jnp.arange(4), jnp.ones(4), tile=16)
    assert float(sums.loss_sum) / 4 == pytest.approx(np.log(37), rel=1e-6)


def test_bfloat16_follows_float32(rng):
    hidden, head, target_ids, _ = random_case(rng, 64, 500)
    weights = jnp.ones(64)

    def loss(hidden, head):
        return fused_linear_cross_entropy(hidden, head, target_ids, weights, tile=128).loss_sum

    # bfloat16 has 8 bits: inputs are off by 0.4 %, the sums are float32.
    np.testing.assert_allclose(
        loss(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)), loss(hidden, head), rtol=2e-2
    )


def test_no_array_of_all_logits_exists(rng):
    """The compiled program's temporaries stay far below the logits' bytes; the plain loss's don't (negative control)."""
    num_tokens, vocabulary, width = 256, 32768, 16
    hidden, head = jnp.zeros((num_tokens, width)), jnp.zeros((vocabulary, width))
    target_ids, weights = jnp.zeros(num_tokens, jnp.int32), jnp.ones(num_tokens)
    logits_bytes = num_tokens * vocabulary * 4

    def temporaries(loss):
        return jax.jit(jax.grad(loss)).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes

    fused = temporaries(lambda h, e: fused_linear_cross_entropy(h, e, target_ids, weights, tile=1024).loss_sum)
    plain = temporaries(lambda h, e: plain_loss(h, e, target_ids, weights, None))
    assert fused < 0.25 * logits_bytes
    assert plain >= logits_bytes


@pytest.mark.parametrize("spare", [0, 5])
def test_target_positions_are_those_with_a_weight(rng, spare):
    """In the order of rows and positions; what is filled up has weight 0."""
    weights = rng.choice([0.0, 0.5, 1.0], (3, 7)).astype(np.float32)
    hidden, target_ids = rng.normal(size=(3, 7, 4)).astype(np.float32), rng.integers(0, 99, (3, 7))
    chosen, count = weights > 0, int((weights > 0).sum())
    found = gather_targets(jnp.asarray(hidden), jnp.asarray(target_ids), jnp.asarray(weights), count + spare)
    for ours, wanted in zip(found, (hidden[chosen], target_ids[chosen], weights[chosen]), strict=True):
        assert len(ours) == count + spare
        np.testing.assert_array_equal(ours[:count], wanted)
    assert not found.weights[count:].any()


def test_target_positions_of_a_batch_without_any(rng):
    hidden = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    found = gather_targets(hidden, jnp.ones((2, 3), jnp.int32), jnp.zeros((2, 3)), 4)
    assert found.hidden.shape == (4, 4) and not found.weights.any()
