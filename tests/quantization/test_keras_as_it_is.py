"""Tests of what Keras's own quantization does wrong on Gemma, so that we notice when Keras fixes it.

Each test here FAILS WHEN THE LIBRARY IS FIXED. Then look at what we do instead, and whether it can go.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras

NAMES = ("query", "value", "ffw_gating")


def lora_gradient(model, config):
    """One flat gradient of the next-token loss by all factors, through Keras's own layers and tied head."""
    if config is not None:
        model.backbone.quantize(config=config)
    factors, rng = [], np.random.default_rng(0)
    for layer in model.backbone._flatten_layers():
        if layer.name in NAMES and isinstance(layer, keras.layers.EinsumDense):
            layer.enable_lora(4)
            factors += [layer.lora_kernel_a, layer.lora_kernel_b]
    values = [jnp.asarray(0.1 * rng.normal(size=factor.shape), jnp.float32) for factor in factors]
    token_ids = jnp.asarray(rng.integers(5, 200, (2, 24)), jnp.int32)

    def loss(values):
        with keras.StatelessScope(state_mapping=list(zip(factors, values, strict=True))):
            hidden = model.backbone({"token_ids": token_ids, "padding_mask": jnp.ones_like(token_ids)})
            logits = model.backbone.token_embedding(hidden, reverse=True)
        scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(scores, token_ids[:, 1:, None], axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(values)
    return float(value), np.concatenate([np.ravel(part) for part in gradient])


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.nightly
def test_int8_with_rounded_activations_loses_the_gradient_in_the_tied_head(tiny):
    """Fails when Keras gives the quantized tied head a gradient.

    Our quantized layers keep activations float; `model.quantize("int8")` could then be an alternative.
    """
    loss, wanted = lora_gradient(tiny("gemma"), None)
    config = keras.quantizers.Int8QuantizationConfig
    with_weights, of_weights = lora_gradient(tiny("gemma"), config(activation_quantizer=None))
    with_activations, of_activations = lora_gradient(tiny("gemma"), config())
    assert cosine(of_weights, wanted) > 0.99
    assert cosine(of_activations, wanted) < 0.9
    # Nothing but the gradient tells.
    assert with_weights == pytest.approx(loss, rel=0.02) and with_activations == pytest.approx(loss, rel=0.05)


def int4_error(equation, outputs, kernel):
    """Squared error of Keras's int4 weights, a scale for each channel, read from the products with each input alone."""
    layer = keras.layers.EinsumDense(equation, (None, *outputs))
    layer.build((None, None, 64))
    layer.kernel.assign(kernel)
    layer.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=-1))
    read = np.asarray(layer(np.eye(64, dtype=np.float32)[None]))[0]
    wanted = np.einsum(equation, np.eye(64)[None], kernel)[0]
    return np.square(read - wanted).sum()


def test_int4_mixes_the_channels_of_several_heads(rng):
    """Fails when Keras's scales of a kernel (n, d, h) are those of its channels, as they are when the same kernel is
    stored as (d, n·h). Then its int4 is as good as ours.

    Groups along the inputs (its block_size) lie in the same wrong order, and are wrong where they touch two heads.
    """
    kernel = (rng.normal(size=(4, 64, 16)) * np.exp(rng.normal(size=(4, 1, 16)))).astype(np.float32)
    mixed = int4_error("btd,ndh->btnh", (4, 16), kernel)
    right = int4_error("btd,df->btf", (64,), kernel.transpose(1, 0, 2).reshape(64, 64))
    ours = np.square(dequantize(quantize(kernel, QuantSpec("int4", 64))) - kernel).sum()
    assert mixed > 1.5 * right
    assert ours < 1.1 * right


@pytest.mark.nightly
@pytest.mark.parametrize(("mode", "name"), [("gptq", "GPTQConfig"), ("awq", "AWQConfig")])
def test_calibration_sees_no_data(tiny, mode, name):
    """Fails when Keras's hooks are called for quantized layers: very different texts give the same codes, those of
    statistics that stay zero. Then its GPTQ and AWQ are worth a comparison with ours.
    """
    codes = []
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(5, 200 if seed else 20, 600)
        config = getattr(keras.quantizers, name)(
            dataset=[ids],
            tokenizer=object(),  # Not asked: these are tokens already.
            num_samples=4,
            sequence_length=32,
            group_size=32,
        )
        backbone = tiny("gemma").backbone
        blocks = backbone.transformer_layers
        config.quantization_layer_structure = {
            "pre_block_layers": [backbone.token_embedding],
            "sequential_blocks": blocks[:1],
        }
        backbone.quantize(mode, config=config, filters="^query$")
        codes.append({variable.path: np.asarray(variable) for variable in blocks[0].attention.query_dense.variables})
    assert any(value.dtype == np.uint8 and value.any() for value in codes[0].values())
    for path, value in codes[0].items():
        np.testing.assert_array_equal(value, codes[1][path], err_msg=path)
