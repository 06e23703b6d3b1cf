"""Tests of layers with LoRA factors: both layouts, rsLoRA and DoRA on whole models, with float and quantized kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.logits import logits
from helpers.lora import METHODS, methods, randomize_b, with_lora

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import parameters, params_scope
from gemma_tune.models.layers import iter_layers, lora_layers
from gemma_tune.models.lora.enable import enable_lora, lora_specs, merge_lora, neutral_lora_values
from gemma_tune.models.lora.factors import (
    kernel_norms,
    kernel_update,
)
from gemma_tune.models.lora.layers import (
    LoraEinsumDense,
    factors_of,
    lora_spec_of,
    make_scale_an_input,
    remove_factors,
    set_alpha,
)
from gemma_tune.models.quantized.merge import merge_into_codes
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.models.sources.tiny import tiny_backbone
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras


def test_the_low_rank_path_equals_keras(tiny, family, rng):
    model = tiny(family)
    enable_lora(model.backbone, 3, 6.0, ("all-linear",), seed=0)
    randomize_b(model, rng)
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


def test_pefts_layout_has_pefts_parameter_count(family):
    """Of a Linear, r·(in + out)."""
    with lazy_initialization():
        backbone = tiny_backbone(family, "float32", 0)
        enable_lora(backbone, 4, 4.0, ("all-linear",), 0, "peft")
    count = sum(
        4 * (np.prod(v.shape[:-1]) if v.path.endswith("_a") else np.prod(v.shape[1:]))
        for v in backbone.trainable_variables
    )
    assert count == sum(int(np.prod(v.shape)) for v in backbone.trainable_variables)
    for layer in lora_layers(backbone):
        inputs, axes, _ = layer.equation.replace("->", ",").split(",")
        sizes = dict(zip(axes, layer._kernel.shape, strict=True))
        width = [np.prod([sizes[c] for c in axes if (c in inputs) is summed]) for summed in (True, False)]
        assert sum(int(np.prod(factor.shape)) for factor in factors_of(layer)) == 4 * sum(width)


@methods
def test_it_changes_nothing_at_the_start(tiny, some_family, method):
    model = tiny(some_family)
    before = logits(model)
    enable_lora(model.backbone, 4, 8.0, ("all-linear",), 0, **method)
    np.testing.assert_allclose(logits(model), before, atol=1e-4)  # As in test_enable.py.


@methods
def test_merging_changes_nothing(tiny, some_family, rng, method):
    model = tiny(some_family)
    base = logits(model)
    with_lora(model, rng, method)
    before = logits(model)
    assert np.abs(before - base).max() > 1e-2
    with params_scope(model, neutral_lora_values(model.backbone)):
        np.testing.assert_allclose(logits(model, neutral_lora_values(model.backbone)), base, atol=2e-4)
    merge_lora(model.backbone)
    np.testing.assert_allclose(logits(model), before, atol=2e-4)
    assert not lora_layers(model.backbone)


def merged_logits(model, params):
    """Logits by kernels merged from factors by the definition of DoRA and LoRA, for jax.grad."""
    kernels = {}
    for layer in lora_layers(model.backbone):
        lora_spec, variables = lora_spec_of(layer), factors_of(layer)
        a, b, *magnitude = (params[variable.path] for variable in variables)
        kernel = layer._kernel.value + kernel_update(layer.equation, lora_spec.scale, a, b)
        for length in magnitude:
            inputs, axes, _ = layer.equation.replace("->", ",").split(",")
            summed = [place for place, letter in enumerate(axes) if letter in inputs]
            norms = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(kernel**2, axis=summed, keepdims=True)))
            kernel = jnp.expand_dims(length, summed) * kernel / norms
        kernels[layer._kernel.path] = kernel
    neutral = {path: jnp.zeros_like(value) for path, value in params.items() if path.endswith("_b")}
    return kernels, neutral


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma", METHODS["peft-dora"]),
        *(
            pytest.param(f, m, marks=pytest.mark.nightly)
            for f in ("gemma", "gemma2", "gemma3", "gemma4")
            for m in METHODS.values()
        ),
    ],
)
def test_gradients_are_those_of_the_merged_model(tiny, family, rng, method):
    model = with_lora(tiny(family), rng, method)
    trainable = parameters(model).trainable
    ids = np.arange(10, 26)[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "position_ids": np.arange(16)[None]}
    inputs = {name: inputs[name] for name in model.backbone.input}
    weights = rng.normal(size=(1, 16, model.backbone.hidden_dim)).astype(np.float32)

    def ours(params):
        with params_scope(model, params):
            return (model.backbone(inputs) * weights).sum()

    gradients = jax.jit(jax.grad(ours))(trainable)
    layers = {layer._kernel.path: layer for layer in lora_layers(model.backbone)}

    def plain(params):
        kernels, _ = merged_logits(model, params)
        for layer in layers.values():
            layer.lora_enabled = False
        swapped = {path: layer.__class__ for path, layer in layers.items()}
        from gemma_tune.runtime.backend import keras

        try:
            for layer in layers.values():
                layer.__class__ = keras.layers.EinsumDense
            with params_scope(model, kernels):
                return (model.backbone(inputs) * weights).sum()
        finally:
            for path, layer in layers.items():
                layer.__class__, layer.lora_enabled = swapped[path], True

    wanted = jax.jit(jax.grad(plain))(trainable)
    for path, value in wanted.items():
        # float32 through four to six blocks, in another order of sums: 1e-3 of the largest entry.
        np.testing.assert_allclose(gradients[path], value, atol=1e-3 * np.abs(value).max(), err_msg=path)


@methods
def test_beside_codes(tiny, rng, method):
    """QLoRA computes with the floats that its codes stand for, and merged into codes again they are rounded."""
    model = with_lora(tiny("gemma3", quant_spec=QuantSpec("int8")), rng, method)
    floats = tiny("gemma3")
    held = {layer.path: layer for layer in iter_layers(model.backbone)}
    for layer in iter_layers(floats.backbone):
        if hasattr(held[layer.path], "dequantized"):
            layer._kernel.assign(held[layer.path].dequantized())
    floats.backbone.token_embedding._embeddings.assign(jnp.asarray(model.backbone.token_embedding.embeddings))
    with_lora(floats, rng, method)
    for ours, theirs in zip(lora_layers(model.backbone), lora_layers(floats.backbone), strict=True):
        for one, other in zip(factors_of(ours), factors_of(theirs), strict=True):
            other.assign(one.value)
    np.testing.assert_allclose(logits(model), logits(floats), atol=5e-4)
    with pytest.raises(ModelError, match="which is quantized to int8"):
        merge_lora(model.backbone)
    before, errors = logits(model), merge_into_codes(model.backbone)
    assert len(errors) == 42 and max(error.of_weights for error in errors) < 0.01
    assert 0 < np.abs(logits(model) - before).max() < 0.3 * np.abs(before).max()


def test_doras_magnitudes_begin_as_norms(tiny):
    model = tiny("gemma3", precision="bfloat16")
    enable_lora(model.backbone, 2, 2.0, ("query",), 0, "peft", use_dora=True)
    layer = lora_layers(model.backbone)[0]
    wanted = kernel_norms(layer.equation, layer._kernel.value.astype(jnp.float32))
    assert layer.lora_kernel_magnitude.dtype == "float32"
    np.testing.assert_array_equal(layer.lora_kernel_magnitude.value, wanted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_scale_that_is_an_input_computes_as_a_constant(tiny, rng, use_dora):
    """Outputs and gradients of a layer, bit for bit; one program serves both alphas."""
    model = tiny("gemma3")
    enable_lora(model.backbone, 4, 6.0, ("query",), seed=0, use_dora=use_dora)
    layers, x = lora_layers(model.backbone), rng.normal(size=(2, 5, model.backbone.hidden_dim)).astype("float32")
    randomize_b(model, rng)

    def outputs_and_gradients(groups, x):
        def outputs(trainable, x):
            with params_scope(model, trainable, groups.frozen):
                y = layers[0](x)
            return jnp.sum(y**2), y

        return jax.value_and_grad(outputs, argnums=(0, 1), has_aux=True)(groups.trainable, x)

    wanted = {}
    for alpha in (6.0, 10.0):
        for layer in layers:
            set_alpha(layer, alpha)
        wanted[alpha] = jax.jit(lambda *inputs: outputs_and_gradients(*inputs))(parameters(model), x)
    for layer in layers:
        make_scale_an_input(layer)
    compiled = jax.jit(outputs_and_gradients)
    for alpha, expected in wanted.items():
        for layer in layers:
            set_alpha(layer, alpha)
        jax.tree.map(np.testing.assert_array_equal, compiled(parameters(model), x), expected)
        assert {lora_spec.alpha for lora_spec in lora_specs(model.backbone).values()} == {alpha}
    assert compiled._cache_size() == 1
    assert float(wanted[6.0][0][0]) != float(wanted[10.0][0][0])
    before = len(model.backbone.variables)
    for layer in layers:
        remove_factors(layer)
    assert len(model.backbone.variables) == before - (4 if use_dora else 3) * len(layers)
