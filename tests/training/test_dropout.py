"""Dropout in training steps: the same masks in every kind of program, and others in each step."""

import numpy as np
import pytest
from helpers.training_steps import assert_same, lora_model, num_targets, random_batch, sgd

from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.lora.dropout import enable_dropout
from gemma_tune.models.remat import enable_remat
from gemma_tune.training.optimizer import make_hyperparameters, make_schedule
from gemma_tune.training.state import init_state
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.train_step import make_eval_step, make_train_step

NUMBERS = {"weight_decay": 0.0, "b1": 0.0, "b2": 0.0, "epsilon": 1e-8, "clip_norm": 0.0}


def one_step(model, batch, per_block, grad_accum_steps=1, rate=0.3, seed=0, step=0):
    """Returns (state, metrics) of a step of SGD at rate 1."""
    hyperparameters = make_hyperparameters(
        make_schedule("constant", 1.0, 0, 10), lora_dropout=rate, seed=seed, **NUMBERS
    )
    train_step = make_train_step(model, sgd(), num_targets(batch), grad_accum_steps, per_block)
    state = init_state(model, sgd(), hyperparameters=hyperparameters)
    return train_step(state._replace(step=state.step + step), parameters(model).frozen, batch)


@pytest.fixture
def model(tiny, rng):
    model, trainable, _ = lora_model(tiny, "gemma3", rng, ("query", "ffw_linear"))
    assign(model, trainable)
    enable_dropout(model.backbone)
    return model


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_whole_and_per_block_programs_draw_the_same_masks(model, rng, remat):
    batch = random_batch(rng)
    per_block = one_step(model, batch, PerBlockProgram(model, remat), 2)
    enable_remat(model.backbone, remat)
    assert_same(one_step(model, batch, None, 2), per_block)


def test_masks_change_with_seed_and_step_and_rate_zero_is_none(model, rng):
    batch, per_block = random_batch(rng), PerBlockProgram(model, "none")
    losses = [
        float(one_step(model, batch, per_block, **case)[1].loss)
        for case in ({}, {}, {"seed": 1}, {"step": 1}, {"rate": 0.0}, {"rate": 0.0, "seed": 1})
    ]
    sums = make_eval_step(model, num_targets(batch), per_block)(*parameters(model), batch)
    assert losses[0] == losses[1] and losses[4] == losses[5] and len(set(losses)) == 4
    np.testing.assert_allclose(losses[4], sums.loss_sum / sums.weight_sum, rtol=1e-6)
