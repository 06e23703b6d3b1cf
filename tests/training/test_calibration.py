"""Calibrated quantization sees what flows through the model, in the right axes, and loses less than rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_steps import num_targets, random_batch

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import hidden_states, parameters, params_scope
from gemma_tune.models.layers import linear_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantized.convert import matrix_shape, quantize_layer, quantize_layers
from gemma_tune.models.transforms import transform_for_training
from gemma_tune.quantization.codes import dequantize
from gemma_tune.quantization.spec import LayerScheme, QuantSpec
from gemma_tune.training import calibration
from gemma_tune.training.calibration import quantize_calibrated
from gemma_tune.training.step.loss import make_loss_fn

METHODS = {"gptq": QuantSpec("int4", 32), "awq": QuantSpec("int4", 32), "smoothquant": QuantSpec("int8")}


def prepared(name):
    model = load_model(f"tiny:{name}")
    transform_for_training(model, None, packing=True, remat="none", row_length=64)
    return model


def batches(seed, count):
    """Tokens of a few kinds, so that inputs are correlated, with a short row that has padding."""
    rng = np.random.default_rng(seed)
    made = [random_batch(rng, (60, 20), 2, 64) for _ in range(count)]
    return [jax.tree.map(jnp.asarray, one._replace(token_ids=10 + one.token_ids % 40)) for one in made]


def loss(model, batch):
    groups = parameters(model)
    sums = jax.jit(make_loss_fn(model, num_targets(batch)))(groups.trainable, groups.frozen, batch)
    return float(sums.loss_sum / sums.weight_sum)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("gemma", "gemma2"))])
def test_layers_outputs_change_less_than_by_rounding(name, method):
    """On the data that calibrated them; for SmoothQuant, whose measure counts the weights' part only, not by much more.

    Negative control: the model computes something else than before.
    """
    model = prepared(name)
    batch = batches(1, 1)[0]
    before = loss(model, batch)
    errors = quantize_calibrated(model, batches(0, 4), method, METHODS[method])
    assert len(errors) == sum(len(linear_layers(block)) for block in model.backbone.transformer_layers)
    if method == "gptq":
        assert all(e.error < e.error_of_rounding for e in errors), errors
    elif method == "awq":
        assert all(e.error <= e.error_of_rounding for e in errors), errors
        assert sum(e.error < 0.98 * e.error_of_rounding for e in errors) > len(errors) / 4
    else:
        assert all(e.error < 1e-3 for e in errors), errors
    after = loss(model, batch)
    assert after != before and after == pytest.approx(before, rel=0.05)


def test_inputs_are_those_of_each_layer():
    """Of a block's first product: the Hessian is that of the normalised hidden states, padding left out; every kernel's
    sums run over the axes that its equation says.
    """
    model = prepared("gemma3")
    found = {}
    whole = calibration._quantize_one

    def remember(layer, statistics, method, quant_spec):
        found[layer.path] = statistics
        return whole(layer, statistics, method, quant_spec)

    calibration._quantize_one = remember
    try:
        (batch,) = batches(0, 1)
        twin = load_model("tiny:gemma3")
        quantize_calibrated(model, [batch], "gptq", QuantSpec("int8"))
    finally:
        calibration._quantize_one = whole
    quantize_layer(twin.backbone.token_embedding, LayerScheme(QuantSpec("int8")))
    first = twin.backbone.transformer_layers[0]
    x = twin.backbone.token_embedding(batch.token_ids) * twin.backbone.hidden_dim**0.5
    x = np.asarray(first.pre_attention_norm(x), np.float64)[np.asarray(batch.segment_ids) > 0]
    for name in ("query", "key", "value"):
        statistics = found[f"{first.path}/attention/{name}"]
        np.testing.assert_allclose(statistics.hessian, x.T @ x, rtol=1e-3, atol=1e-3 * np.abs(x.T @ x).max())
        assert float(statistics.count) == len(x)
    for layer in linear_layers(first):
        assert found[layer.path].hessian.shape == (matrix_shape(layer)[1],) * 2


@pytest.mark.nightly
def test_gptq_loses_less_on_held_out_text_than_rounding():
    """Text of the same kind. Gemma 2's soft cap, windows and all."""
    losses = {}
    for way in ("float", "rounded", "gptq"):
        model = prepared("gemma2")
        if way == "rounded":
            quantize_layers(model.backbone, QuantSpec("int4", 32))
        elif way == "gptq":
            quantize_calibrated(model, batches(0, 8), "gptq", QuantSpec("int4", 32))
        groups = parameters(model)
        held_out = batches(7, 1)[0]
        with params_scope(model, groups.trainable, groups.frozen):
            losses[way] = np.asarray(
                hidden_states(model.backbone, held_out.token_ids, held_out.segment_ids, held_out.positions)
            )
    error = {way: np.square(losses[way] - losses["float"]).mean() for way in ("rounded", "gptq")}
    assert error["gptq"] < error["rounded"]


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_is_the_same(method, tmp_path):
    model = prepared("gemma3")
    quantize_calibrated(model, batches(0, 2), method, METHODS[method])
    save_preset(model, tmp_path / "preset")
    again = load_model(str(tmp_path / "preset"))
    for path, value in parameters(model).frozen.items():
        np.testing.assert_array_equal(parameters(again).frozen[path], value, err_msg=path)
    prepare = model.generate("How do I", max_length=12)
    assert again.generate("How do I", max_length=12) == prepare


def test_integers_and_their_floats_are_the_same_product(rng, monkeypatch):
    """What accelerators multiply as integers, for each form of kernel; with a scale for the inputs."""
    model = prepared("gemma3")
    quantize_calibrated(model, batches(0, 2), "smoothquant", QuantSpec("int8"))
    block = model.backbone.transformer_layers[0]
    for layer in (block.attention.query_dense, block.attention.output_dense, block.ffw_linear):
        inputs = layer.float_kernel.shape[:2] if layer.equation.startswith("btnh") else (matrix_shape(layer)[1],)
        x = jnp.asarray(rng.normal(size=(2, 5, *inputs)), jnp.float32)
        on_cpu = layer.call(x)
        with monkeypatch.context() as patched:
            patched.setattr(jax, "default_backend", lambda: "tpu")
            integers = layer.call(x)
        np.testing.assert_allclose(integers, on_cpu, atol=1e-5 * np.abs(on_cpu).max(), err_msg=layer.path)


def test_rounded_inputs_are_an_int8_product(rng):
    """smoothquant-int8 and int8-dynamic: integers times integers, and two scales."""
    model = prepared("gemma3")
    quantize_calibrated(model, batches(0, 2), "smoothquant", QuantSpec("int8"))
    layer = model.backbone.transformer_layers[0].gating_ffw
    x = jnp.asarray(rng.normal(size=(2, 5, matrix_shape(layer)[1])), jnp.float32)
    quantized = layer.quantized()
    scaled = np.asarray(x * quantized.input_scale[0, :, 0], np.float64)
    step = np.abs(scaled).max(-1, keepdims=True) / 127
    codes = np.round(scaled / step).astype(np.int64)
    wanted = (codes @ np.asarray(quantized.codes[0], np.int64)) * step * np.asarray(quantized.scales.values[0, 0])
    outputs = type(layer).call(layer, x)
    if layer.activation is not None:
        wanted = layer.activation(jnp.asarray(wanted, jnp.float32))
    # A value half-way between two codes may go the other way: one code of 127.
    np.testing.assert_allclose(outputs, wanted, atol=2e-2 * np.abs(wanted).max())
    assert np.mean(np.abs(outputs - wanted)) < 1e-4 * np.abs(wanted).max()
    floats = np.asarray(x, np.float64) @ np.asarray(dequantize(quantized))[0]
    assert np.abs(np.asarray(outputs) - floats).max() > 1e-3 or layer.activation is not None


def test_gemma4_is_refused():
    with pytest.raises(ModelError, match="are not a plain sequence"):
        quantize_calibrated(prepared("gemma4"), batches(0, 1), "gptq", QuantSpec("int4", 32))
