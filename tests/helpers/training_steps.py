"""Batches, models and an optimizer for tests of training steps."""

import jax.numpy as jnp
import numpy as np

from gemma_tune.data import TokenizedExample, make_batch
from gemma_tune.models.functional import parameters
from gemma_tune.models.lora.enable import enable_lora
from gemma_tune.training.optimizer import make_optimizer, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.train_step import make_train_step

SPLIT_FAMILIES = ("gemma", "gemma2", "gemma3")


def random_batch(rng, lengths=(20, 9, 30, 5), num_rows=4, row_length=40):
    rows = []
    for length in lengths:
        is_target = np.arange(length) >= length // 2
        rows.append([TokenizedExample(rng.integers(10, 1024, length).astype(np.int32), is_target)])
    return make_batch(rows, num_rows, row_length)


def num_targets(batch):
    return int((batch.loss_weights > 0).sum())


def lora_model(tiny, family, rng, targets=("all-linear",), **method):
    model = tiny(family)
    enable_lora(model.backbone, 4, 8.0, targets, seed=0, **method)
    groups = parameters(model)
    # With B = 0 the gradient of A would be zero, and the test blind to it.
    trainable = {
        p: jnp.asarray(rng.normal(size=v.shape), jnp.float32) * 0.1 if p.endswith("_b") else v
        for p, v in groups.trainable.items()
    }
    return model, trainable, groups.frozen


def sgd(learning_rate=1.0):
    return make_optimizer(
        "sgd",
        make_schedule("constant", learning_rate, 0, 10),
        weight_decay=0.0,
        b1=0.0,
        b2=0.0,
        epsilon=1e-8,
        clip_norm=0.0,
    )


def both_steps(model, batch, remat, grad_accum_steps=1):
    """Returns (state, metrics) of one step with each program. SGD at rate 1: the state is the gradient."""
    optimizer = sgd()
    results = []
    for per_block in (None, PerBlockProgram(model, remat)):
        step = make_train_step(model, optimizer, num_targets(batch), grad_accum_steps, per_block)
        results.append(step(init_state(model, optimizer), parameters(model).frozen, batch))
    return results


def assert_same(whole, blocks):
    np.testing.assert_allclose(blocks[1], whole[1], rtol=1e-5)
    assert blocks[0].trainable.keys() == whole[0].trainable.keys()
    for path, value in whole[0].trainable.items():
        # float32, in another order of sums: 1e-4 of the largest entry.
        np.testing.assert_allclose(blocks[0].trainable[path], value, atol=1e-4 * np.abs(value).max(), err_msg=path)
