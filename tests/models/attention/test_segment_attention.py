"""Causal attention by tiles gives what KerasHub's attention gives, and reads no later position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import lora_model, num_targets, random_batch

from gemma_tune.models.attention.kernels import causal_attention
from gemma_tune.models.attention.segment_attention import key_spans, segment_attention
from gemma_tune.models.attention.swap import use_attention_kernel
from gemma_tune.training.step.loss import make_loss_fn


def plain_attention(q, k, v, mask, scale, soft_cap):
    """Computes attention by its definition, head by head."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[row, :, head] @ k[row, :, head // group].T * scale
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask[row]
        out[row, :, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[row, :, head // group]
    return out


@pytest.mark.parametrize("attention", [causal_attention, segment_attention])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("length", [7, 128, 300])
@pytest.mark.parametrize("window", [None, 20, 200])
def test_by_the_definition(rng, attention, num_kv_heads, soft_cap, length, window):
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, num_kv_heads, num_kv_heads))
    segments = np.sort(rng.integers(0, 3, (2, length)))
    mask = np.tril(segments[:, :, None] == segments[:, None, :])
    mask &= np.arange(length)[:, None] - np.arange(length) < (window or length)
    ours = attention(*map(jnp.asarray, (q, k, v, mask)), scale=0.3, soft_cap=soft_cap, window=window)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, mask, 0.3, soft_cap), atol=1e-5)


def test_fewer_scores_are_computed(rng):
    """By XLA's count of operations, 10 of 16 tiles of scores are computed at a length of 512."""

    def operations(function):
        arrays = [jax.ShapeDtypeStruct((1, 512, heads, 64), jnp.float32) for heads in (4, 1, 1)]
        mask = jax.ShapeDtypeStruct((1, 512, 512), bool)
        return jax.jit(function).lower(*arrays, mask).cost_analysis()["flops"]

    def all_scores(q, k, v, mask):
        scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(1, 512, 1, 4, 64), k)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v)

    fewer = operations(lambda q, k, v, mask: causal_attention(q, k, v, mask, scale=1.0))
    fewest = operations(lambda q, k, v, mask: causal_attention(q, k, v, mask, scale=1.0, window=64))
    assert fewer < 0.7 * operations(all_scores) and fewest < 0.7 * fewer


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_by_segments(rng, window, dtype):
    """Two rows of 700 positions: six tiles of queries that need different spans of keys; the last tile is padded."""
    length = 700
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 16)), dtype) for heads in (4, 2, 2))
    segments = np.stack([np.repeat([1, 2, 3, 0], [40, 450, 130, 80]), np.repeat([1, 2, 0, 3], [300, 2, 1, 397])])
    mask = np.tril(segments[:, :, None] == segments[:, None, :])
    mask &= np.arange(length)[:, None] - np.arange(length) < (window or length)

    def gradients(attention):
        def total(q, k, v):
            attended = attention(q, k, v, jnp.asarray(mask), scale=0.3, soft_cap=3.0, window=window)
            return jnp.sum(attended * jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape))

        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    # bfloat16 has eight bits; and here keys' gradients are added up in float32, there in bfloat16.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for ours, theirs in zip(gradients(segment_attention), gradients(causal_attention), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_keys_before_a_segment_are_not_read(rng):
    """NaN at a position that isn't to be read would spread to every sum that it is in, even with weight 0."""
    q, k, v = (rng.normal(size=(2, 512, heads, 8)).astype(np.float32) for heads in (2, 1, 1))
    segments = np.stack([np.repeat([1, 2], [256, 256]), np.repeat([1, 2], [384, 128])])
    mask = np.tril(segments[:, :, None] == segments[:, None, :])
    v[segments == 1] = np.nan
    attended = {
        attention: np.isfinite(attention(*map(jnp.asarray, (q, k, v, mask)), scale=1.0)).all((2, 3))
        for attention in (segment_attention, causal_attention)
    }
    np.testing.assert_array_equal(attended[segment_attention], segments == 2)
    assert not attended[causal_attention].any()  # It reads all that lies before.


@pytest.mark.parametrize(("block", "longest"), [(128, 128), (100, 300), (128, 639), (128, 8192)])
def test_spans_of_keys(block, longest):
    spans = np.array(key_spans(block, longest))
    assert spans[0] == block and spans[-1] == longest
    assert np.all(np.diff(spans) > 0) and np.all(np.diff(spans) <= np.maximum(block, spans[:-1] / 2))


def test_loss_and_gradients_are_keras_hubs(tiny, family, rng):
    """Rows of 300 positions, longer than the tiny models' sliding windows: three tiles of queries."""
    model, trainable, frozen = lora_model(tiny, family, rng)
    batch = jax.tree.map(jnp.asarray, random_batch(rng, (300, 170), 2, 300))
    results = []
    for swap in (False, True):
        if swap:
            use_attention_kernel(model.backbone, "xla")
        loss_fn = make_loss_fn(model, num_targets(batch))
        loss = jax.value_and_grad(lambda trainable, f=loss_fn: f(trainable, frozen, batch).loss_sum)
        results.append(jax.jit(loss)(trainable))
    (before, gradients), (after, ours) = results
    assert float(after) == pytest.approx(float(before), rel=1e-5)
    for path, gradient in gradients.items():
        # The same sums in another order; Gemma 4 magnifies roundings the most.
        np.testing.assert_allclose(ours[path], gradient, atol=5e-4 * np.abs(gradient).max(), err_msg=path)


def test_generating_is_left_alone(tiny, family):
    model = tiny(family)
    before = model.generate("How do I", max_length=12)
    use_attention_kernel(model.backbone, "xla")
    model.generate_function = None
    assert model.generate("How do I", max_length=12) == before
