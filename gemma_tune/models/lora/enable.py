"""LoRA on a KerasHub backbone: which layers have factors, enabling it, and merging it.

What the factors of a layer are, and how it computes with them, is in low_rank.py and lora_layers.py.
"""

import zlib
from collections.abc import Mapping, Sequence

from gemma_tune.config import LoraConfig
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.models.functional import value_in_scope
from gemma_tune.models.layers import iter_layers, lora_layers
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import (
    add_factors,
    lora_spec_of,
    merged_kernel,
    neutral_factors,
    remove_factors,
)
from gemma_tune.runtime.backend import keras, keras_hub

GROUPS = {
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
    """Freezes the backbone and gives the named layers trainable factors; A random, B zero, so that nothing changes at
    first.

    Args:
        backbone: With its weights loaded, since loading afterwards would overwrite A and B with zeros.
        rank: Width of the factors.
        alpha: The update is scaled by alpha / rank, or alpha / sqrt(rank).
        target_layers: Layer names, or a key of GROUPS.
        seed: Of A.
        layout: `keras` or `peft`.
        use_rslora: Scales by alpha / sqrt(rank) (arXiv:2312.03732).
        use_dora: Also trains the length of each output's weights (arXiv:2402.09353).

    Returns:
        Number of layers that got factors.

    Raises:
        ModelError: LoRA is on already, or no layer has one of the names; lists those there are. Or DoRA is asked for on
            the embedding.
    """
    names = {name for target in target_layers for name in GROUPS.get(target, (target,))}
    layers = layers_with_weights(backbone)
    available = sorted({layer.name for layer in layers if hasattr(layer, "enable_lora")})
    unknown = sorted(names - set(available)) if not set(target_layers) & set(GROUPS) else []
    chosen = [layer.path for layer in layers if layer.name in names and hasattr(layer, "enable_lora")]
    if unknown or not chosen:
        wrong = unknown or sorted(names)
        raise ModelError(
            f"No layer matches lora.target_layers={','.join(wrong)}.{did_you_mean(wrong[0], [*available, *GROUPS])} "
            f"Layers: {', '.join(available)}. Groups: {', '.join(GROUPS)}."
        )
    lora_spec = LoraSpec(layout, rank, float(alpha), use_rslora, use_dora)
    enable_on_layers(backbone, dict.fromkeys(chosen, lora_spec), seed)
    return len(chosen)


def enable_on_layers(backbone: keras_hub.models.Backbone, factors: Mapping[str, LoraSpec], seed: int) -> None:
    """Like `enable_lora`, for layers by their paths, each with factors of its own kind.

    Raises:
        ModelError: LoRA is on already, there is no such layer, or it can't have such factors.
    """
    layers = {layer.path: layer for layer in layers_with_weights(backbone)}
    if lora_layers(backbone):
        raise ModelError("LoRA is already enabled on this model. Load the model anew for other factors.")
    for path, lora_spec in factors.items():
        _check(layers.get(path), path, lora_spec)
    backbone.trainable = True
    for layer in iter_layers(backbone):
        layer.trainable = False
    for path, lora_spec in factors.items():
        add_factors(layers[path], lora_spec, [seed, zlib.crc32(path.encode())])
    # KerasHub's save_lora_weights reads these two.
    backbone._lora_enabled_layers = [index for index, path in enumerate(layers) if path in factors]
    backbone._lora_rank = next(iter(factors.values())).rank


def _check(layer: keras.layers.Layer | None, path: str, lora_spec: LoraSpec) -> None:
    if layer is None:
        raise ModelError(f"The model has no layer {path} that LoRA factors could be for.")
    is_embedding = isinstance(layer, keras.layers.Embedding)
    if is_embedding and hasattr(layer, "quantized_scheme"):
        raise ModelError(f"{path} is quantized, and can't have LoRA factors. Leave it out of lora.target_layers.")
    if is_embedding and lora_spec.use_dora:
        raise ModelError(
            f"{path} can't have DoRA factors: it looks up rows, and as the head multiplies with them. Leave it out of "
            "lora.target_layers, or set lora.use_dora=false."
        )


def layers_with_weights(backbone: keras_hub.models.Backbone) -> list[keras.layers.Layer]:
    """Returns the layers that KerasHub's `.lora.h5` files count, in their order."""
    return [layer for layer in iter_layers(backbone) if layer.weights]


def lora_specs(backbone: keras_hub.models.Backbone) -> dict[str, LoraSpec]:
    """Returns what the factors of each layer are, by its path."""
    return {layer.path: lora_spec_of(layer) for layer in lora_layers(backbone)}


def neutral_lora_values(backbone: keras_hub.models.Backbone) -> dict:
    """Returns path -> array of those factors that, so changed, make the backbone compute as its base does."""
    values = {}
    for layer in lora_layers(backbone):
        values.update(neutral_factors(layer))
    return values


def merge_lora(backbone: keras_hub.models.Backbone) -> None:
    """Puts each layer's factors into its kernel, in float32, and takes them away.

    The model computes the same as before.
    """
    for layer in lora_layers(backbone):
        if hasattr(layer, "quantized_scheme"):
            raise ModelError(
                f"LoRA can't be merged into {layer.path}, which is held in {layer.quantized_scheme}: rounding would "
                "lose it. Load the model without quantization, and merge there."
            )
        weights = layer._embeddings if isinstance(layer, keras.layers.Embedding) else layer._kernel
        weights.assign(merged_kernel(layer, value_in_scope(weights)).astype(weights.dtype))
        remove_factors(layer)
        weights.trainable = True
    for layer in iter_layers(backbone):
        layer.trainable = True
