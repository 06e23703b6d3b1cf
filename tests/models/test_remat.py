"""Remat changes the memory of a step and nothing else."""

import jax
import numpy as np
import pytest
from helpers.training_steps import lora_model, num_targets, random_batch

from gemma_tune.errors import ModelError
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import parameters
from gemma_tune.models.remat import enable_remat
from gemma_tune.training.step.loss import make_loss_fn


def value_and_gradients(model, trainable, frozen, batch):
    loss_fn = make_loss_fn(model, num_targets(batch))
    loss = jax.value_and_grad(lambda trainable, batch: loss_fn(trainable, frozen, batch).loss_sum)
    return jax.jit(loss)(trainable, batch)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_loss_and_gradients_are_the_same(tiny, some_family, remat, rng):
    model, trainable, frozen = lora_model(tiny, some_family, rng)
    enable_packing(model.backbone)
    batch = random_batch(rng)
    loss, gradients = value_and_gradients(model, trainable, frozen, batch)
    enable_remat(model.backbone, remat)
    again, recomputed = value_and_gradients(model, trainable, frozen, batch)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)
    for path, gradient in gradients.items():
        # The same sums in another order. Gemma 4, with a norm around everything, magnifies roundings the most.
        np.testing.assert_allclose(recomputed[path], gradient, atol=5e-4 * np.abs(gradient).max(), err_msg=path)


def test_full_fine_tuning_too(tiny, rng):
    model = tiny("gemma3")
    trainable = parameters(model).trainable
    batch = random_batch(rng)
    _, gradients = value_and_gradients(model, trainable, {}, batch)
    enable_remat(model.backbone, "dots")
    _, recomputed = value_and_gradients(model, trainable, {}, batch)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(recomputed[path], gradient, atol=5e-4 * np.abs(gradient).max(), err_msg=path)


def test_each_policy_needs_less_memory_than_the_one_before(tiny, rng):
    """Temporary memory as XLA counts it. The batch is so large that most of it is activations."""
    temporary = []
    for remat in ("none", "dots", "full"):
        model, trainable, frozen = lora_model(tiny, "gemma3", rng)
        enable_remat(model.backbone, remat)
        batch = random_batch(rng, (200,) * 8, 8, 200)
        loss_fn = make_loss_fn(model, num_targets(batch))
        step = jax.jit(jax.grad(lambda trainable, frozen, batch, f=loss_fn: f(trainable, frozen, batch).loss_sum))
        temporary.append(step.lower(trainable, frozen, batch).compile().memory_analysis().temp_size_in_bytes)
    print(temporary)
    assert temporary[1] < 0.8 * temporary[0] and temporary[2] < 0.8 * temporary[1]


def test_a_gradient_that_is_no_number_stays_one(tiny, rng):
    """The backward pass of a block runs only for finite gradients; NaN and infinity must not turn into zeros."""
    model, trainable, frozen = lora_model(tiny, "gemma3", rng)
    enable_remat(model.backbone, "full")
    batch = random_batch(rng)
    batch = batch._replace(loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))
    _, gradients = value_and_gradients(model, trainable, frozen, batch)
    assert not [path for path, gradient in gradients.items() if np.isfinite(gradient).all()]


def test_generating_is_left_alone(tiny):
    model = tiny("gemma3")
    before = model.generate("How do I", max_length=12)
    enable_remat(model.backbone, "full")
    model.generate_function = None
    assert model.generate("How do I", max_length=12) == before


def test_a_backbone_without_blocks_is_refused():
    with pytest.raises(ModelError, match=r"training\.remat=none"):
        enable_remat(object(), "dots")
