"""LoRA: the tutorial's parameter count, identity at the start, and our low-rank path against Keras's own."""

import jax
import numpy as np
import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import assign, parameters, params_scope
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import enable_lora, merge_lora
from gemma_tune.models.lora.layers import LoraEinsumDense
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.runtime.backend import keras, keras_hub


def logits(model, params=None):
    inputs = {
        "token_ids": np.arange(10, 30)[None],
        "padding_mask": np.ones((1, 20), int),
        "position_ids": np.arange(20)[None],
    }
    inputs = {name: inputs[name] for name in model.backbone.input}
    with params_scope(model, params or {}):
        return np.asarray(model(inputs))


def random_second_factors(model, rng):
    trainable = parameters(model).trainable
    assign(
        model,
        {
            path: rng.normal(size=value.shape).astype(np.float32) * 0.1
            for path, value in trainable.items()
            if path.endswith("_b")
        },
    )


def test_the_default_has_the_tutorials_parameter_count():
    """Gemma 2B at rank 4: 1,363,968, as the Keras tutorial on fine-tuning Gemma with LoRA prints."""
    with lazy_initialization():
        backbone = keras_hub.models.GemmaBackbone(
            vocabulary_size=256000,
            num_layers=18,
            num_query_heads=8,
            num_key_value_heads=1,
            hidden_dim=2048,
            intermediate_dim=32768,
            head_dim=256,
        )
        enable_lora(backbone, 4, 4.0, ("query", "value"), seed=0)
    assert sum(int(np.prod(variable.shape)) for variable in backbone.trainable_variables) == 1_363_968


def test_it_changes_nothing_at_the_start(tiny, family, rng):
    model = tiny(family)
    before = logits(model)
    enable_lora(model.backbone, 4, 8.0, ("all-linear",), seed=0)
    # The low-rank path adds exact zeros, but the products around it may be ordered otherwise: some roundings of
    # float32 (6e-8 of values up to 5) through four blocks. A factor that isn't zero moves logits by more than 1e-2.
    np.testing.assert_allclose(logits(model), before, atol=1e-4)
    random_second_factors(model, rng)
    assert np.abs(logits(model) - before).max() > 1e-2


def test_the_low_rank_path_equals_keras(tiny, family, rng):
    model = tiny(family)
    enable_lora(model.backbone, 3, 6.0, ("all-linear",), seed=0)
    random_second_factors(model, rng)
    swapped = [layer for layer in lora_layers(model.backbone) if type(layer) is LoraEinsumDense]
    ours = logits(model)
    for layer in swapped:
        layer.__class__ = keras.layers.EinsumDense
    assert len(swapped) >= 6
    np.testing.assert_allclose(ours, logits(model), atol=2e-4)


def test_no_gradient_of_a_kernels_size_is_made(tiny):
    """In the jaxpr of our path's gradient no array has the kernel's shape but the kernel itself; Keras's path makes
    one.
    """
    model = tiny("gemma3")
    enable_lora(model.backbone, 2, 2.0, ("ffw_gating",), seed=0)
    layer = lora_layers(model.backbone)[0]

    def count(call):
        def loss(a, x):
            with keras.StatelessScope(state_mapping=[(layer.lora_kernel_a, a)]):
                return call(layer, x).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(layer.lora_kernel_a.value, np.ones((1, 5, 64), np.float32))
        made = [var for equation in jaxpr.jaxpr.eqns for var in equation.outvars]
        return sum(getattr(var.aval, "shape", None) == tuple(layer._kernel.shape) for var in made)

    assert count(LoraEinsumDense.call) == 0
    assert count(keras.layers.EinsumDense.call) > 0


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attention",), {"query", "key", "value", "attention_output"}),
        (("all-linear",), {"query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"}),
        (("key", "ffw_linear"), {"key", "ffw_linear"}),
        (("token_embedding",), {"token_embedding"}),
    ],
)
def test_targets(tiny, targets, names):
    model = tiny("gemma3")
    enable_lora(model.backbone, 2, 2.0, targets, seed=0)
    assert {layer.name for layer in lora_layers(model.backbone)} == names
    trainable = parameters(model).trainable
    assert trainable and all("lora_" in path for path in trainable)


def test_unknown_targets_list_those_there(tiny):
    with pytest.raises(
        ModelError,
        match=r"target_layers=querry. Did you mean query\? Layers: .*ffw_linear.*Groups: attention, all-linear",
    ):
        enable_lora(tiny().backbone, 2, 2.0, ("querry", "value"), seed=0)


def test_lora_is_enabled_once(tiny):
    model = tiny()
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    with pytest.raises(ModelError, match="already enabled"):
        enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)


def test_the_seed_decides_the_first_factors(tiny):
    factors = []
    for seed in (0, 0, 1):
        model = tiny()
        enable_lora(model.backbone, 2, 2.0, ("query",), seed=seed)
        factors.append(
            {path: np.asarray(value) for path, value in parameters(model).trainable.items() if path.endswith("_a")}
        )
    assert all(np.array_equal(factors[0][path], factors[1][path]) for path in factors[0])
    assert not any(np.array_equal(factors[0][path], factors[2][path]) for path in factors[0])


@pytest.mark.parametrize("targets", [("all-linear",), ("token_embedding", "value")])
def test_merging_changes_nothing_and_lora_can_be_enabled_anew(tiny, family, rng, targets):
    model = tiny(family)
    num_trainable = len(parameters(model).trainable)
    enable_lora(model.backbone, 3, 6.0, targets, seed=0)
    random_second_factors(model, rng)
    before = logits(model)
    merge_lora(model.backbone)
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
    assert not lora_layers(model.backbone) and len(parameters(model).trainable) == num_trainable
    enable_lora(model.backbone, 2, 2.0, ("query",), seed=0)
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
