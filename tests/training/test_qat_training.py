"""Training with rounded weights: what it is for, and that a run's figures are those of its converted model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.loss_cases import random_case
from helpers.training_steps import num_targets, random_batch

from gemma_tune import Config, pipeline
from gemma_tune.models.functional import assign, parameters
from gemma_tune.models.load import load_model
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.transforms import transform_for_training
from gemma_tune.pipeline.setup import read_splits
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.training.losses.cross_entropy import fused_linear_cross_entropy
from gemma_tune.training.state import init_state
from gemma_tune.training.step.train_step import make_eval_step, make_train_step

INT4 = QuantSpec("int4", 32)


@pytest.mark.parametrize("quant_spec", [QuantSpec("int8"), QuantSpec("int4", 32), QuantSpec("nf4", 32)], ids=str)
@pytest.mark.parametrize("head_is_trained", [False, True])
def test_a_head_that_counts_as_rounded(rng, quant_spec, head_is_trained):
    """Loss and gradients are those of the rounded head, by blocks of which the last is shorter."""
    hidden, head, target_ids, weights = random_case(rng, 13, 101, width=64)
    counts_as_rounded = FakeQuantized(head, quant_spec)
    rounded = counts_as_rounded.rows(0, 101)

    def loss(hidden, head):
        options = {"head_is_trained": head_is_trained, "tile": 32, "soft_cap": 3.0}
        return fused_linear_cross_entropy(hidden, head, target_ids, weights, **options).loss_sum

    np.testing.assert_allclose(loss(hidden, counts_as_rounded), loss(hidden, rounded), rtol=1e-6)
    argnums = (0, 1) if head_is_trained else 0
    ours, wanted = (jax.grad(loss, argnums)(hidden, head) for head in (counts_as_rounded, rounded))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


def trained(batch, qat, num_steps):
    """The weights after some steps on one batch, from the same start."""
    model = load_model("tiny:gemma3")
    transform_for_training(model, None, qat=qat, packing=True, remat="none", row_length=40, program="whole")
    optimizer = optax.adam(3e-3)
    step, state = make_train_step(model, optimizer, num_targets(batch), 1), init_state(model, optimizer)
    frozen = parameters(model).frozen
    for _ in range(num_steps):
        state, _ = step(state, frozen, batch)
    return state.trainable


def loss_of(trainable, batch, quant_spec=None):
    """With these weights, or what conversion makes of them."""
    model = load_model("tiny:gemma3")
    assign(model, trainable)
    if quant_spec:
        quantize_layers(model.backbone, quant_spec)
    groups = parameters(model)
    sums = make_eval_step(model, num_targets(batch))(*groups, batch)
    return float(sums.loss_sum / sums.weight_sum)


@pytest.mark.nightly
def test_it_recovers_what_rounding_loses(rng):
    """The same steps on the same batch. Rounded after training in float, the loss goes up by more than a tenth of what
    is left; of that, training rounded takes back three fifths, as the real model must.
    """
    batch = jax.tree.map(jnp.asarray, random_batch(rng))
    in_float, aware = (trained(batch, qat, 60) for qat in (None, INT4))
    float_loss, rounded_loss, aware_loss = loss_of(in_float, batch), loss_of(in_float, batch, INT4), loss_of(aware, batch, INT4)  # fmt: skip
    print(float_loss, rounded_loss, aware_loss)
    assert rounded_loss > 1.1 * float_loss
    assert aware_loss - float_loss < 0.4 * (rounded_loss - float_loss)


@pytest.mark.nightly
def test_a_run_s_figures_are_those_of_its_converted_model(tmp_path):
    """Held-out loss and answers after training, and the saved floats, converted as they are loaded."""
    config = Config().replace(
        {
            "workdir": str(tmp_path / "run"),
            "model.source": "tiny:gemma3",
            "model.block_size": 32,
            "data.max_length": 128,
            "training.method": "full",
            "training.qat": "int4",
            "training.batch_size": 8,
            "training.num_train_steps": 4,
            "training.num_sample_answers": 1,
            "training.num_scored_answers": 2,
            "generation.max_new_tokens": 4,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup_steps": 0,
        }
    )
    result = pipeline.run_training(config)
    remembered = Config.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert remembered.qat_spec == INT4 and remembered.quant_spec is None
    heldout = read_splits(config).heldout
    losses = {
        quant_spec: pipeline.evaluate(
            load_model(str(result.saved_to), quant_spec=quant_spec), heldout, max_length=128, batch_size=8
        )
        for quant_spec in (remembered.qat_spec, None)
    }
    assert result.best_step == 4
    assert losses[INT4]["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    assert losses[None]["loss"] != pytest.approx(result.after["loss"], rel=1e-5)
    assert pipeline.evaluate(result.model, heldout, max_length=128, batch_size=8)["loss"] == pytest.approx(
        result.after["loss"], rel=1e-5
    )
