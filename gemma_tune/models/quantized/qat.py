"""Turns quantization-aware training of a backbone on and off, and rounds its weights once for many calls."""

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import Params
from gemma_tune.models.layers import is_quantized, iter_layers, quantizable_layers
from gemma_tune.models.linear import fitting_spec
from gemma_tune.models.lora.layers import equation_of, lora_spec_of
from gemma_tune.models.quantized.convert import matrix_shape
from gemma_tune.models.quantized.fake_quant_layers import (
    FakeQuantEinsumDense,
    FakeQuantEmbedding,
    FakeQuantLayer,
    Rounding,
    rounded_kernel,
)
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import jax, keras, keras_hub

_round_kernel = jax.jit(rounded_kernel, static_argnums=0)


def enable_qat(backbone: keras_hub.models.Backbone, quant_spec: QuantSpec) -> int:
    """Makes the layers that `quantize_layers` quantizes compute with rounded weights.

    Args:
        backbone: Backbone; LoRA is to be enabled before.
        quant_spec: Quantization spec of the later conversion, without double quantization.

    Returns:
        Number of layers.

    Raises:
        ModelError: The weights are quantized already, `block_size` doesn't divide the inputs of a layer, or a layer has
            DoRA factors.
    """
    layers = quantizable_layers(backbone)
    for layer in layers:
        if is_quantized(layer):
            raise ModelError(
                f"{layer.path} is held in {layer.quantized_scheme}, so that its floats can't be trained. Load the "
                "model without quantization for training.qat."
            )
        if layer.lora_enabled and lora_spec_of(layer).use_dora:
            raise ModelError(f"{layer.path} has DoRA factors, which training.qat can't round. Set lora.use_dora=false.")
    specs = [fitting_spec(layer.path, matrix_shape(layer)[1], quant_spec) for layer in layers]
    for layer, spec in zip(layers, specs, strict=True):
        rows, inputs, outputs = matrix_shape(layer)
        is_embedding = layer is backbone.token_embedding
        scale = lora_spec_of(layer).scale if layer.lora_enabled else 0.0
        layer.__class__ = FakeQuantEmbedding if is_embedding else FakeQuantEinsumDense
        # Of an embedding any number of rows is rounded at a time. Keras would look for variables in the tuple.
        shape = (-1 if is_embedding else rows, inputs, outputs)
        object.__setattr__(layer, "rounding", Rounding(spec, shape, scale, equation_of(layer)))
        for variable in layer.variables_to_round():
            variable._autocast = False  # Else mixed precision would round the floats to bfloat16 first.
    return len(layers)


def disable_qat(backbone: keras_hub.models.Backbone) -> None:
    """Makes the layers compute with their floats again. LoRA must be merged before."""
    for layer in iter_layers(backbone, FakeQuantLayer):
        for variable in layer.variables_to_round():
            variable._autocast = True
        object.__delattr__(layer, "rounding")
        is_embedding = layer is backbone.token_embedding
        layer.__class__ = keras.layers.ReversibleEmbedding if is_embedding else keras.layers.EinsumDense


def rounded_params(model: keras.Model, params: Params) -> Params:
    """Rounds all weights once, for many calls within `weights_are_rounded`.

    Args:
        model: CausalLM.
        params: All its arrays by variable path.

    Returns:
        The same arrays; where quantization-aware training is on, kernels are rounded with LoRA's updates merged, and
        the factors are left out.
    """
    changed = dict(params)
    for layer in iter_layers(model.backbone, FakeQuantLayer):
        paths = [variable.path for variable in layer.variables_to_round()]
        kernel, *factors = (changed.pop(path) for path in paths)
        changed[paths[0]] = _round_kernel(layer.rounding, kernel, tuple(factors))
    return changed
