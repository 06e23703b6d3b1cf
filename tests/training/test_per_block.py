"""One program for each kind of block computes what one program for everything computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import SPLIT_FAMILIES, assert_same, both_steps, lora_model, num_targets, random_batch, sgd

from gemma_tune.errors import ModelError
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.blocks import block_kinds, blocks_are_sequential
from gemma_tune.models.functional import parameters
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.training.state import init_state
from gemma_tune.training.step.loss import make_loss_of_hidden
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.per_block_gradients import PerBlockGradients
from gemma_tune.training.step.train_step import make_eval_step, make_train_step


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("family", SPLIT_FAMILIES)
def test_a_lora_step_is_the_same(tiny, family, remat, rng):
    model, trainable, _ = lora_model(tiny, family, rng)
    for variable in model.backbone.trainable_variables:
        variable.assign(trainable[variable.path])
    enable_packing(model.backbone)
    assert_same(*both_steps(model, random_batch(rng), remat))


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_step_with_pefts_layout_and_dora_is_the_same(tiny, remat, rng):
    model, trainable, _ = lora_model(tiny, "gemma", rng, layout="peft", use_rslora=True, use_dora=True)
    for variable in model.backbone.trainable_variables:
        variable.assign(trainable[variable.path])
    enable_packing(model.backbone)
    assert_same(*both_steps(model, random_batch(rng), remat))


@pytest.mark.parametrize("family", SPLIT_FAMILIES)
def test_a_full_step_is_the_same(tiny, family, rng):
    """The embedding gets gradients from both of its ends."""
    assert_same(*both_steps(tiny(family), random_batch(rng), "dots"))


def test_lora_on_the_embedding_and_one_layer(tiny, rng):
    model, trainable, _ = lora_model(tiny, "gemma3", rng, ("token_embedding", "value"))
    for variable in model.backbone.trainable_variables:
        variable.assign(trainable[variable.path])
    assert_same(*both_steps(model, random_batch(rng), "dots"))


def test_accumulation_is_the_same(tiny, rng):
    model, trainable, _ = lora_model(tiny, "gemma3", rng)
    for variable in model.backbone.trainable_variables:
        variable.assign(trainable[variable.path])
    batch = random_batch(rng, lengths=(38, 6, 3, 30))
    assert_same(*both_steps(model, batch, "dots", grad_accum_steps=2))


def test_a_batch_with_few_targets_takes_a_smaller_head(tiny, rng):
    """Padded positions of the head have no loss: with fewer of them the step is the same, with the largest bit for bit."""
    model, trainable, _ = lora_model(tiny, "gemma3", rng)
    for variable in model.backbone.trainable_variables:
        variable.assign(trainable[variable.path])
    batch, optimizer, per_block = random_batch(rng), sgd(), PerBlockProgram(model, "dots")
    count, frozen = num_targets(batch), parameters(model).frozen
    padded, sized, exact = (
        make_train_step(model, optimizer, sizes, 1, per_block)(init_state(model, optimizer), frozen, batch)
        for sizes in (count + 50, (count // 2, count, count + 50), count)
    )
    assert_same(padded, sized)
    for path, value in exact[0].trainable.items():
        np.testing.assert_array_equal(sized[0].trainable[path], value)
    with pytest.raises(AssertionError, match=f"has {count} positions"):
        make_train_step(model, optimizer, count - 1, 1, per_block)(init_state(model, optimizer), frozen, batch)


def test_the_held_out_loss_is_the_same(tiny, rng):
    model, batch = tiny("gemma2"), random_batch(rng)
    groups = parameters(model)
    whole, blocks = (
        make_eval_step(model, num_targets(batch), per_block)(groups.trainable, groups.frozen, batch)
        for per_block in (None, PerBlockProgram(model, "dots"))
    )
    np.testing.assert_allclose(blocks, whole, rtol=1e-5)


def test_blocks_of_a_kind_are_found(tiny):
    """Gemma 3's last has no window and other rotations; blocks that are trained differ from those that aren't."""
    assert block_kinds(tiny("gemma").backbone) == [0, 0, 0]
    assert block_kinds(tiny("gemma2").backbone) == [0, 1, 0, 1]
    backbone = tiny("gemma3").backbone
    assert block_kinds(backbone) == [0, 0, 0, 0, 0, 5]
    backbone.transformer_layers[2].attention.query_dense.trainable = False
    assert block_kinds(backbone) == [0, 0, 2, 0, 0, 5]


def test_gemma_4_takes_one_whole_program(tiny):
    model = tiny("gemma4")
    assert not blocks_are_sequential(model.backbone)
    lora = LoraSettings(2, 2.0, ("query",), 0)
    assert transform_for_training(model, lora, packing=True, remat="dots", row_length=64).program == "whole"
    with pytest.raises(ModelError, match="training.program=whole"):
        transform_for_training(tiny("gemma4"), lora, packing=True, remat="dots", row_length=64, program="per_block")


def test_the_program_is_compiled_once_for_a_shape(tiny, rng):
    model = tiny("gemma3")
    lora = LoraSettings(2, 2.0, ("query",), 0)
    assert transform_for_training(model, lora, packing=True, remat="dots", row_length=40).program == "per_block"
    optimizer = sgd()
    step, state = (
        make_train_step(model, optimizer, 160, 1, PerBlockProgram(model, "dots")),
        init_state(model, optimizer),
    )
    frozen = parameters(model).frozen
    for lengths in ((20, 9), (5, 30, 12), (40, 3)):
        state, _ = step(state, frozen, random_batch(rng, lengths))
    assert step.num_programs == 1
    with pytest.warns(RuntimeWarning, match=r"train_step is being recompiled \(2nd time\)"):
        step(state, frozen, random_batch(rng, (20,), row_length=48))
    assert step.num_programs == 2


def test_the_forecast_counts_what_is_kept_for_the_backward_pass(tiny, rng):
    """Nothing is run. Recomputing keeps less; twice the rows keep about twice as much."""
    totals = []
    for remat, num_rows in (("none", 8), ("dots", 8), ("full", 8), ("none", 16)):
        model, _, frozen = lora_model(tiny, "gemma3", rng)
        batch = random_batch(rng, (200,) * num_rows, num_rows, 200)
        optimizer = sgd()
        step = make_train_step(model, optimizer, 64, 1, PerBlockProgram(model, remat))
        inputs = init_state(model, optimizer), frozen, batch
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), inputs)
        totals.append(step.memory(*shapes).temporary_bytes)
    none, blocks, full, twice = totals
    assert full < 0.8 * blocks and blocks < 0.8 * none and 1.8 * none < twice < 2.2 * none


def test_two_shapes_traced_before_the_first_backward_pass_keep_their_own_pullbacks(tiny, rng):
    """As when evaluation has run batches of another shape before the first training step."""
    model, trainable, frozen = lora_model(tiny, "gemma3", rng)
    batches = [random_batch(rng), random_batch(rng, (30, 7), num_rows=2, row_length=56)]
    shared = PerBlockProgram(model, "none")
    for batch in batches:
        shared.forward(trainable, frozen, batch)
    losses = {120: make_loss_of_hidden(model, 120)}
    gradients = PerBlockGradients(shared, losses)
    for batch in batches:
        found, _ = gradients(trainable, frozen, None, batch)
        wanted, _ = PerBlockGradients(PerBlockProgram(model, "none"), losses)(trainable, frozen, None, batch)
        for path, value in wanted.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
