"""Layers of quantization-aware training compute what the converted model will, and pass gradients straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import SPLIT_FAMILIES, assert_same, both_steps, num_targets, random_batch

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import assign, hidden_states, parameters, params_scope
from gemma_tune.models.layers import iter_layers, quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.lora.factors import kernel_update
from gemma_tune.models.quantized.convert import matrix_shape, quantize_layers
from gemma_tune.models.quantized.fake_quant_layers import (
    FakeQuantEinsumDense,
    FakeQuantLayer,
    rounded_kernel,
    weights_are_rounded,
)
from gemma_tune.models.quantized.qat import enable_qat, rounded_params
from gemma_tune.models.transforms import LoraSettings, transform_for_training
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.serving.generation import generate
from gemma_tune.training.step.loss import make_loss_fn
from gemma_tune.training.step.per_block import PerBlockProgram

INT4 = QuantSpec("int4", 32)
QUANT_SPECS = [QuantSpec("int8"), INT4, pytest.param(QuantSpec("nf4", 32), marks=pytest.mark.nightly)]
LORA = LoraSettings(4, 8.0, ("all-linear", "token_embedding"), 0)
SCALE = LORA.alpha / LORA.rank


def prepare(model, lora=None, qat=None):
    transform_for_training(model, lora, qat=qat, packing=True, remat="none", row_length=64, program="whole")
    return model


def qat_model(family, quant_spec, lora=None, rng=None):
    """Returns a model in quantization-aware training; with LoRA, its factors are random and B isn't zero."""
    model = prepare(load_model(f"tiny:{family}"), lora, quant_spec)
    if lora:
        trainable = parameters(model).trainable
        assign(model, {path: 0.1 * rng.normal(size=value.shape) for path, value in trainable.items()})
    return model


def fake_layers(model):
    return list(iter_layers(model.backbone, FakeQuantLayer))


def merged_floats(layer):
    """Returns the float kernel with LoRA's update."""
    kernel, *factors = (np.asarray(variable.value) for variable in layer.variables_to_round())
    return kernel + np.float32(SCALE) * (factors[0] @ factors[1]) if factors else kernel


def converted(model, family, quant_spec):
    """Returns a float model whose kernels NumPy quantized and dequantized."""
    twin = load_model(f"tiny:{family}")
    kernels = {}
    for layer in fake_layers(model):
        floats = merged_floats(layer)
        matrix = floats.reshape(matrix_shape(layer))
        kernels[layer.variables_to_round()[0].path] = dequantize(quantize(matrix, quant_spec)).reshape(floats.shape)
    assign(twin, kernels)
    return twin


def loss_and_gradients(model, batch):
    """Returns the summed loss, and its gradients by path in the trained arrays."""
    groups, loss_fn = parameters(model), make_loss_fn(model, num_targets(batch))
    loss_and_gradients = jax.jit(jax.value_and_grad(lambda t, batch: loss_fn(t, groups.frozen, batch).loss_sum))
    return loss_and_gradients(groups.trainable, batch)


def assert_gradients(ours, wanted):
    assert ours.keys() == wanted.keys()
    for path, gradient in wanted.items():
        # The same sums in another order; Gemma 4 magnifies roundings the most.
        np.testing.assert_allclose(ours[path], gradient, atol=1e-3 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_loss_and_gradients_are_those_at_the_rounded_weights(some_family, quant_spec, rng):
    """For all weights, the embedding with both its uses included, straight-through gradients are those at the rounded
    weights.
    """
    model, batch = qat_model(some_family, quant_spec), random_batch(rng)
    float_loss, _ = loss_and_gradients(load_model(f"tiny:{some_family}"), batch)
    wanted, gradients = loss_and_gradients(prepare(converted(model, some_family, quant_spec)), batch)
    loss, ours = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert float(loss) != pytest.approx(float(float_loss), rel=1e-5)  # Rounding does change it.
    assert_gradients(ours, gradients)


@pytest.mark.nightly
def test_pefts_layout_is_rounded_as_the_sum_too(rng):
    """Loss and gradients are those of the merged kernels, and the factors' those that jax.vjp makes of theirs."""
    lora, batch = LORA._replace(layout="peft", use_rslora=True), random_batch(rng)
    model, twin = qat_model("gemma2", INT4, lora, rng), load_model("tiny:gemma2")
    layers, wanted = fake_layers(model), {}
    merged, pullbacks = {}, {}
    for layer in layers:
        kernel, a, b = (variable.value for variable in layer.variables_to_round())
        equation = getattr(layer, "equation", "")
        update, pullbacks[layer] = jax.vjp(lambda a, b, e=equation: kernel_update(e, 4.0, a, b), a, b)  # 8 / sqrt(4).
        merged[layer.variables_to_round()[0].path] = kernel + update
    assign(twin, merged)
    wanted_loss, gradients = loss_and_gradients(prepare(twin, qat=INT4), batch)
    for layer in layers:
        kernel, a, b = layer.variables_to_round()
        wanted[a.path], wanted[b.path] = pullbacks[layer](gradients[kernel.path])
    loss, ours = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    assert ours.keys() == wanted.keys()
    for path, gradient in wanted.items():
        np.testing.assert_allclose(ours[path], gradient, atol=5e-3 * np.abs(gradient).max(), err_msg=path)


def test_dora_is_refused():
    with pytest.raises(ModelError, match="has DoRA factors, which training.qat can't round"):
        qat_model("gemma", INT4, LORA._replace(target_layers=("query",), use_dora=True))


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_lora_gradients_are_those_of_the_rounded_sum(some_family, quant_spec, rng):
    """With G the gradient at round(W + s·A·B): A gets s·G·Bᵀ and B gets s·Aᵀ·G (summed over heads); W gets none."""
    model, batch = qat_model(some_family, quant_spec, LORA, rng), random_batch(rng)
    wanted_loss, gradients = loss_and_gradients(prepare(converted(model, some_family, quant_spec)), batch)
    loss, ours = loss_and_gradients(model, batch)
    # Merging by NumPy and by XLA differs by roundings, which push a few values to the next code.
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    wanted = {}
    for layer in fake_layers(model):
        kernel, a, b = layer.variables_to_round()
        gradient = gradients[kernel.path]
        wanted[a.path] = SCALE * gradient @ b.value.T
        wanted[b.path] = SCALE * a.value.reshape(-1, LORA.rank).T @ gradient.reshape(-1, gradient.shape[-1])
    assert ours.keys() == wanted.keys()
    for path, gradient in wanted.items():
        np.testing.assert_allclose(ours[path], gradient, atol=5e-3 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_converting_gives_the_weights_that_were_trained_with(quant_spec):
    """Bit for bit: `quantize_layers` on the floats, and what the layers computed with."""
    model, quantized = qat_model("gemma3", quant_spec), load_model("tiny:gemma3")
    quantize_layers(quantized.backbone, quant_spec)
    rounded = jax.jit(rounded_kernel, static_argnums=0)
    trained_with = {layer.path: rounded(layer.rounding, *layer.float_arrays()) for layer in fake_layers(model)}
    layers = quantized_layers(quantized.backbone)
    assert {layer.path for layer in layers} == trained_with.keys()
    for layer in layers:
        codes = dequantize(layer.quantized())
        np.testing.assert_array_equal(trained_with[layer.path], codes.reshape(trained_with[layer.path].shape))


@pytest.mark.parametrize("quant_spec", QUANT_SPECS, ids=str)
def test_merging_and_converting_gives_the_weights_that_were_trained_with(quant_spec, rng, tmp_path):
    """The adapter, saved, loaded on the float base, merged and quantized, gives the same codes. Rounding W alone does not."""
    model = qat_model("gemma3", quant_spec, LORA, rng)
    save_adapter(model, tmp_path)
    base = load_model("tiny:gemma3", adapter=str(tmp_path))
    merge_lora(base.backbone)
    layers = {layer.path: layer for layer in iter_layers(base.backbone)}
    for layer in fake_layers(model):
        variable = layers[layer.path]._embeddings if layer.name == "token_embedding" else layers[layer.path]._kernel
        again = dequantize(quantize(np.asarray(variable.value).reshape(matrix_shape(layer)), quant_spec))
        trained_with = np.asarray(layer.rounded()).reshape(again.shape)
        # The compiled sum may round otherwise, so that one value in a hundred thousand goes to the next code.
        assert np.mean(np.abs(trained_with - again) > 1e-5 * np.abs(again).max()) < 1e-4, layer.path
        alone = dequantize(quantize(np.asarray(layer.variables_to_round()[0].value).reshape(again.shape), quant_spec))
        assert np.mean(trained_with != alone) > 0.1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.nightly
@pytest.mark.parametrize("family", SPLIT_FAMILIES)
def test_per_block_is_the_whole_program(family, lora, rng):
    assert_same(*both_steps(qat_model(family, INT4, lora, rng), random_batch(rng), "dots"))


@pytest.mark.nightly
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("quant_spec", [QuantSpec("int8"), QuantSpec("nf4", 32)], ids=str)
def test_per_block_with_other_quant_specs_and_a_frozen_head(quant_spec, remat, rng):
    model = qat_model("gemma3", quant_spec, LORA._replace(target_layers=("query", "value")), rng)
    assert_same(*both_steps(model, random_batch(rng), remat))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_no_rounded_kernel_is_kept_for_the_backward_pass(lora, rng):
    """Also when all activations are kept."""
    model = qat_model("gemma3", INT4, lora, rng)
    groups, batch = parameters(model), jax.tree.map(jnp.asarray, random_batch(rng, (40,), 1, 64))
    kernels = {layer._kernel.shape for layer in fake_layers(model) if isinstance(layer, FakeQuantEinsumDense)}
    forward = PerBlockProgram(model, "none").forward(*groups, batch)
    kept = {leaf.shape for leaf in jax.tree.leaves(forward.residuals)}
    assert len(kernels) > 3 and kept and not kept & kernels


@pytest.mark.nightly
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_answers_are_those_of_the_converted_model(family, lora, rng):
    """KerasHub's `generate`, which rounds for every token, and ours, which rounds once, give the same tokens."""
    model = qat_model(family, INT4, lora, rng)
    twin = converted(model, family, INT4)
    assert model.generate("How do I", max_length=16) == twin.generate("How do I", max_length=16)
    assert generate(model, "How do I", max_new_tokens=8) == generate(twin, "How do I", max_new_tokens=8)


def test_weights_are_rounded_once_for_many_tokens(rng):
    """Within the context nothing is rounded any more, and the hidden states are the same."""
    model, batch = qat_model("gemma3", INT4, LORA, rng), random_batch(rng)
    groups = parameters(model)
    params = {**groups.trainable, **groups.frozen}
    once = rounded_params(model, params)
    assert params.keys() - once.keys() == groups.trainable.keys()  # The factors are merged.

    def hidden(params):
        with params_scope(model, params):
            return hidden_states(model.backbone, batch.token_ids, batch.segment_ids, batch.positions)

    def hidden_of_rounded(params):
        with weights_are_rounded():
            return hidden(params)

    np.testing.assert_allclose(jax.jit(hidden_of_rounded)(once), jax.jit(hidden)(params), rtol=1e-3, atol=1e-4)
    assert " round[" in str(jax.make_jaxpr(hidden)(params))
    assert " round[" not in str(jax.make_jaxpr(hidden_of_rounded)(once))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_rounding_is_in_float32_whatever_the_precision(precision, rng):
    """The float32 master weights are rounded where there are any, and then cast, as a converted layer casts its own."""
    model = load_model("tiny:gemma3", precision=precision)
    enable_qat(model.backbone, INT4)
    layer = model.backbone.transformer_layers[0].gating_ffw
    inputs = jnp.asarray(rng.normal(size=(1, 3, 64)), jnp.bfloat16)
    floats = np.asarray(layer._kernel.value, np.float32)
    wanted = inputs @ dequantize(quantize(floats[None], INT4), jnp.bfloat16)[0]
    outputs = layer.activation(wanted) if layer.activation else wanted
    np.testing.assert_array_equal(np.asarray(layer(inputs), np.float32), np.asarray(outputs, np.float32))


def test_the_floats_are_saved(tmp_path):
    model = qat_model("gemma3", INT4)
    model.save_to_preset(str(tmp_path / "model"))
    saved = parameters(load_model(str(tmp_path / "model"))).trainable
    for path, value in parameters(model).trainable.items():
        np.testing.assert_array_equal(saved[path], value, err_msg=path)


def test_preparing_anew_takes_it_off(rng):
    model, batch = qat_model("gemma3", INT4, LORA, rng), random_batch(rng)
    rounded, _ = loss_and_gradients(model, batch)
    merge_lora(model.backbone)
    twin = prepare(load_model("tiny:gemma3"))
    assign(twin, parameters(model).trainable)
    wanted, _ = loss_and_gradients(twin, batch)
    loss, _ = loss_and_gradients(prepare(model), batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert float(loss) != pytest.approx(float(rounded), rel=1e-4)


def test_what_cannot_be_rounded():
    with pytest.raises(ModelError, match=r"int4: block_size=256 does not divide its 64 inputs.*--or_int8"):
        qat_model("gemma3", QuantSpec("int4", 256))
    with pytest.raises(ModelError, match="is held in int8, so that its floats can.t be trained"):
        enable_qat(load_model("tiny:gemma3", quant_spec=QuantSpec("int8")).backbone, INT4)
