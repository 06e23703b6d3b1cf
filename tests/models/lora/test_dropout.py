"""Dropout on the input of LoRA's first factor: which layers have it, its rate, and what its keys depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import fingerprint, sample_values
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.dropout import drop_out, enable_dropout, has_dropout, make_dropout_values
from gemma_tune.models.lora.enable import enable_lora, merge_lora
from gemma_tune.models.lora.layers import factors_of, make_scale_an_input, scale_of


@pytest.fixture
def backbone(tiny):
    backbone = tiny("gemma3").backbone
    enable_lora(backbone, 2, 4.0, ("query", "ffw_gating", "token_embedding"), seed=0)
    enable_dropout(backbone)
    return backbone


def test_a_layer_drops_the_input_of_a_alone(backbone, rng):
    layer = next(layer for layer in lora_layers(backbone) if layer.name == "ffw_gating")
    a, b = factors_of(layer)
    b.assign(rng.normal(size=b.shape))
    x = jnp.asarray(rng.normal(size=(2, 50, a.shape[0])), jnp.float32)
    frozen = jnp.einsum(layer.equation, x, layer._kernel.value)
    without = layer(x)
    np.testing.assert_allclose(without, frozen + scale_of(layer) * (x @ a.value) @ b.value, atol=1e-4)
    layer.dropout_rate.assign(0.25)
    layer.dropout_key.assign(jax.random.key_data(jax.random.key(3)))
    dropped = drop_out(layer, x)
    is_kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped, np.where(is_kept, x / 0.75, 0), rtol=1e-6)
    share, deviation = is_kept.mean(), np.sqrt(0.25 * 0.75 / is_kept.size)
    assert abs(share - 0.75) < 4 * deviation
    np.testing.assert_allclose(layer(x), frozen + scale_of(layer) * (dropped @ a.value) @ b.value, atol=1e-4)
    assert float(jnp.abs(layer(x) - without).max()) > 0.1


def test_which_layers_have_it_and_merging_removes_it(backbone):
    assert {layer.name: has_dropout(layer) for layer in lora_layers(backbone)} == {
        "query": True,
        "ffw_gating": True,
        "token_embedding": False,
    }
    merge_lora(backbone)
    assert not [variable.path for variable in backbone.variables if "dropout" in variable.path]
    assert make_dropout_values(backbone) is None


def test_adapters_still_know_their_base(tiny):
    """What a program takes as an input is no weight of the base."""
    model = tiny("gemma3")
    wanted = fingerprint(model), sample_values(model)
    enable_lora(model.backbone, 2, 4.0, ("query", "value"), seed=0)
    enable_dropout(model.backbone)
    for layer in lora_layers(model.backbone):
        make_scale_an_input(layer)
    assert (fingerprint(model), sample_values(model)) == wanted


def test_a_block_that_multiplies_a_merged_kernel_is_refused(backbone):
    layer = next(layer for layer in lora_layers(backbone) if layer.name == "ffw_gating")
    with pytest.raises(ModelError, match=r"can't have lora.dropout.*leave the layer out of lora.target_layers"):
        layer.kernel  # noqa: B018


def test_keys_differ_by_seed_step_micro_batch_and_layer(backbone):
    values = make_dropout_values(backbone)
    cases = list(itertools.product((0, 1), (0, 1), (0, 1)))
    keys = [
        tuple(np.asarray(value).tolist())
        for case in cases
        for path, value in values(0.5, *case).items()
        if path.endswith("dropout_key")
    ]
    num_layers = sum(has_dropout(layer) for layer in lora_layers(backbone))
    assert len(keys) == len(set(keys)) == num_layers * len(cases) and num_layers > 2
    again = values(0.5, 1, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, again, values(0.5, 1, 0, 1))
    assert {float(value) for path, value in again.items() if path.endswith("dropout_rate")} == {0.5}
