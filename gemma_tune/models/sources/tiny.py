"""Builds tiny Gemmas with random weights, for tests, dry runs and first steps.

They have the real architectures, a real tokenizer, and 0.2 M parameters.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.models.family import FAMILIES
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.sources.lazy_initialization import fill_whole, lazy_initialization
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras, keras_hub

TOKENIZER_PATH = Path(__file__).parent / "assets" / "tiny.spm"

# Together they cover one and several key/value heads, local and global layers, both kinds of soft caps, extra norms,
# and Gemma 4's shared keys and values and per-layer inputs. The window is shorter than short texts.
_SHAPE = {"num_query_heads": 4, "hidden_dim": 64, "intermediate_dim": 128, "head_dim": 16}
_WINDOW = {"use_sliding_window_attention": True, "sliding_window_size": 16}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {**_SHAPE, "num_layers": 3, "num_key_value_heads": 1},
    "gemma2": {
        **_SHAPE, **_WINDOW, "num_layers": 4, "num_key_value_heads": 2, "query_head_dim_normalize": True,
        "use_post_ffw_norm": True, "use_post_attention_norm": True,
        "attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0,
    },
    "gemma3": {
        **_SHAPE, **_WINDOW, "num_layers": 6, "num_key_value_heads": 1, "image_size": None,
        "use_post_ffw_norm": True, "use_post_attention_norm": True,
    },
    "gemma4": {
        **_SHAPE, **_WINDOW, "num_layers": 6, "num_key_value_heads": 2, "image_size": None, "global_head_dim": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8, "global_rope_partial_rotary_factor": 0.25, "final_logit_soft_cap": 30.0,
    },
}  # fmt: skip


def tiny_backbone(
    family: str, precision: str, seed: int, quant_spec: QuantSpec | None = None
) -> keras_hub.models.Backbone:
    """Builds a tiny backbone with seeded random weights.

    Args:
        family: `gemma`, `gemma2`, `gemma3` or `gemma4`.
        precision: Keras dtype policy.
        seed: Random seed; equal seeds give equal weights, on every machine.
        quant_spec: Quantization of the weights.

    Raises:
        ModelError: There is no such family.
    """
    if family not in _CONFIGS:
        known = [f"tiny:{name}" for name in _CONFIGS]
        raise ModelError(
            f"There is no tiny:{family}. Known: {', '.join(known)}.{did_you_mean(f'tiny:{family}', known)}"
        )
    with lazy_initialization():
        backbone = FAMILIES[family].causal_lm.backbone_cls(**tiny_config(family), dtype=precision)
    for variable in backbone.variables:
        fill_whole(variable, _random_value(variable, seed))
    if quant_spec:
        quantize_layers(backbone, quant_spec)
    return backbone


def tiny_config(family: str) -> dict[str, Any]:
    """Returns the sizes of a family's tiny model, as arguments of KerasHub's backbone."""
    from sentencepiece import SentencePieceProcessor

    return {"vocabulary_size": SentencePieceProcessor(model_file=str(TOKENIZER_PATH)).vocab_size(), **_CONFIGS[family]}


def _random_value(variable: keras.Variable, seed: int) -> np.ndarray:
    """Returns an initial value: a normal kernel scaled by its fan-in, or the zeros or ones of Keras's initializer."""
    path, shape = variable.path, tuple(variable.shape)
    if isinstance(variable._initializer, (keras.initializers.Zeros, keras.initializers.Ones)):
        return np.asarray(variable._initializer(shape), np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if path.endswith("embeddings"):
        fan_in = shape[-1]
    elif len(shape) == 3 and "attention_output" not in path:
        fan_in = shape[1]  # Kernels of (heads, width, head width).
    else:
        fan_in = int(np.prod(shape[:-1]))
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
