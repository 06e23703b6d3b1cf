"""Enables LoRA on a KerasHub backbone, and merges it.

The kinds of factors and the arithmetic with them are in factors.py, the factors of one layer in layers.py.
"""

import zlib
from collections.abc import Mapping, Sequence

from gemma_tune.config import LoraConfig
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.models.functional import value_in_scope
from gemma_tune.models.layers import is_quantized, iter_layers, lora_layers
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import (
    add_factors,
    initial_values,
    lora_spec_of,
    merged_kernel,
    neutral_factors,
    remove_factors,
    set_alpha,
)
from gemma_tune.runtime.backend import jax, keras, keras_hub

TARGET_GROUPS = {
    "attention": ("query", "key", "value", "attention_output"),
    "all-linear": ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"),
}
_DEFAULTS = LoraConfig()


def enable_lora(
    backbone: keras_hub.models.Backbone,
    rank: int,
    alpha: float,
    target_layers: Sequence[str],
    seed: int,
    layout: str = _DEFAULTS.layout,
    use_rslora: bool = _DEFAULTS.use_rslora,
    use_dora: bool = _DEFAULTS.use_dora,
) -> int:
    """Freezes a backbone and adds trainable factors to some layers, A random and B zero, so that it computes as before.

    Args:
        backbone: Backbone with its weights loaded, since loading them afterwards would overwrite A and B with zeros.
        rank: Rank of the factors.
        alpha: Numerator of the scale, which is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        target_layers: Layer names, or keys of `TARGET_GROUPS`.
        seed: Random seed of A.
        layout: Layout of the factors, `keras` or `peft`.
        use_rslora: Whether to scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
        use_dora: Whether to train a magnitude for each output too (DoRA, arXiv:2402.09353).

    Returns:
        Number of layers that got factors.

    Raises:
        ModelError: LoRA is enabled already, a target is not a layer (the message lists the layers), or it is the
            embedding and `use_dora` is set.
    """
    names = {name for target in target_layers for name in TARGET_GROUPS.get(target, (target,))}
    layers = layers_with_weights(backbone)
    available = sorted({layer.name for layer in layers if hasattr(layer, "enable_lora")})
    unknown = sorted(names - set(available)) if not set(target_layers) & set(TARGET_GROUPS) else []
    chosen = [layer.path for layer in layers if layer.name in names and hasattr(layer, "enable_lora")]
    if unknown or not chosen:
        wrong = unknown or sorted(names)
        suggestion = did_you_mean(wrong[0], [*available, *TARGET_GROUPS])
        raise ModelError(
            f"No layer matches lora.target_layers={','.join(wrong)}.{suggestion} "
            f"Layers: {', '.join(available)}. Groups: {', '.join(TARGET_GROUPS)}."
        )
    lora_spec = LoraSpec(layout, rank, float(alpha), use_rslora, use_dora)
    enable_on_layers(backbone, dict.fromkeys(chosen, lora_spec), seed)
    return len(chosen)


def enable_on_layers(backbone: keras_hub.models.Backbone, specs: Mapping[str, LoraSpec], seed: int) -> None:
    """Freezes a backbone and adds trainable factors to the layers of some paths, each with a spec of its own.

    Args:
        backbone: Backbone with its weights loaded.
        specs: Spec of each layer's factors, by path.
        seed: Random seed of A.

    Raises:
        ModelError: LoRA is enabled already, a path is not of a layer, or the layer can't have such factors.
    """
    layers = {layer.path: layer for layer in layers_with_weights(backbone)}
    if lora_layers(backbone):
        raise ModelError("LoRA is already enabled on this model. Load the base model again for other factors.")
    for path, lora_spec in specs.items():
        _check_layer(layers.get(path), path, lora_spec)
    backbone.trainable = True
    for layer in iter_layers(backbone):
        layer.trainable = False
    for path, lora_spec in specs.items():
        add_factors(layers[path], lora_spec, _seeds(seed, path))
    # KerasHub's save_lora_weights reads these two.
    backbone._lora_enabled_layers = [index for index, path in enumerate(layers) if path in specs]
    backbone._lora_rank = next(iter(specs.values())).rank


def reset_lora(backbone: keras_hub.models.Backbone, seed: int, alpha: float) -> None:
    """Gives a backbone's factors the values that `enable_lora` gives them with this seed, and this alpha."""
    variables = {variable.path: variable for variable in backbone.variables}
    for layer in lora_layers(backbone):
        for path, value in initial_values(layer, _seeds(seed, layer.path)).items():
            variables[path].assign(value)
        set_alpha(layer, alpha)


def _seeds(seed: int, path: str) -> list[int]:
    return [seed, zlib.crc32(path.encode())]


def _check_layer(layer: keras.layers.Layer | None, path: str, lora_spec: LoraSpec) -> None:
    if layer is None:
        raise ModelError(f"The model has no layer {path}, for which there are LoRA factors.")
    is_embedding = isinstance(layer, keras.layers.Embedding)
    if is_embedding and is_quantized(layer):
        raise ModelError(f"{path} is quantized, and can't have LoRA factors. Leave it out of lora.target_layers.")
    if is_embedding and lora_spec.use_dora:
        raise ModelError(
            f"{path} can't have DoRA factors: a tied embedding is both a lookup and the LM head. Leave it out of "
            "lora.target_layers, or set lora.use_dora=false."
        )


def layers_with_weights(backbone: keras_hub.models.Backbone) -> list[keras.layers.Layer]:
    """Returns the layers with weights, in the order in which KerasHub's `.lora.h5` files number them."""
    return [layer for layer in iter_layers(backbone) if layer.weights]


def lora_specs(backbone: keras_hub.models.Backbone) -> dict[str, LoraSpec]:
    """Returns the spec of each layer's factors, by path."""
    return {layer.path: lora_spec_of(layer) for layer in lora_layers(backbone)}


def neutral_lora_values(backbone: keras_hub.models.Backbone) -> dict[str, jax.Array]:
    """Returns values of some of the factors, by path, with which the backbone computes as without LoRA."""
    values: dict[str, jax.Array] = {}
    for layer in lora_layers(backbone):
        values.update(neutral_factors(layer))
    return values


def merge_lora(backbone: keras_hub.models.Backbone) -> None:
    """Merges each layer's factors into its kernel, in float32, and removes them. The model computes the same as before.

    Raises:
        ModelError: A layer is quantized.
    """
    for layer in lora_layers(backbone):
        if is_quantized(layer):
            raise ModelError(
                f"LoRA can't be merged into {layer.path}, which is quantized to {layer.quantized_scheme}: rounding "
                "would lose the update. Load the model without quantization, and merge there."
            )
        weights = layer._embeddings if isinstance(layer, keras.layers.Embedding) else layer._kernel
        weights.assign(merged_kernel(layer, value_in_scope(weights)).astype(weights.dtype))
        remove_factors(layer)
        weights.trainable = True
    for layer in iter_layers(backbone):
        layer.trainable = True
