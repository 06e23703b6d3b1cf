"""Knows the sizes of the published Gemmas, and builds models that have sizes but no weights.

KerasHub's presets have their sizes only after the download. These sizes are from the models' reports and configs: Gemma
(arXiv:2403.08295), Gemma 2 (arXiv:2408.00118), Gemma 3 (arXiv:2503.19786), VaultGemma (arXiv:2510.15001).
"""

import re
from pathlib import Path
from typing import Any

from gemma_tune.errors import ModelError
from gemma_tune.models.family import FAMILIES
from gemma_tune.models.lora.peft_import import peft_base
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.models.sources.download import gguf_path, hf_directory
from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint
from gemma_tune.models.sources.hf_checkpoint import build_backbone
from gemma_tune.models.sources.keras_preset import build_keras_preset
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.models.sources.preset_catalog import presets
from gemma_tune.models.sources.source import Source, config_with_base, parse_source
from gemma_tune.models.sources.tiny import tiny_config
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras_hub
from gemma_tune.runtime.json_files import read_json

_NAMES = ("num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim")
# For Gemma 1 and 2, KerasHub counts both halves of the gated feed-forward layer in intermediate_dim.
_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "gemma": {"2b": (18, 8, 1, 2048, 32_768, 256), "7b": (28, 16, 16, 3072, 49_152, 256)},
    "gemma2": {
        "1b": (26, 4, 4, 1152, 13_824, 256),
        "2b": (26, 8, 4, 2304, 18_432, 256),
        "9b": (42, 16, 8, 3584, 28_672, 256),
        "27b": (46, 32, 16, 4608, 73_728, 128),
    },
    "gemma3": {
        "270m": (18, 4, 1, 640, 2048, 256),
        "1b": (26, 4, 1, 1152, 6912, 256),
        "4b": (34, 8, 4, 2560, 10_240, 256),
        "12b": (48, 16, 8, 3840, 15_360, 256),
        "27b": (62, 32, 16, 5376, 21_504, 128),
    },
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma": {"vocabulary_size": 256_000},
    "gemma2": {
        "vocabulary_size": 256_000,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "attention_logit_soft_cap": 50.0,
        "final_logit_soft_cap": 30.0,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4096,
    },
    "gemma3": {
        "vocabulary_size": 262_144,
        "image_size": None,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
        "sliding_window_size": 1024,
    },
}
_SMALL_WINDOW, _WIDTH_OF_SMALL = 512, 1152  # Gemma 3 up to 1B.


def backbone_without_weights(
    source: str, precision: str, quant_spec: QuantSpec | None = None, sharding: MeshSharding | None = None
) -> keras_hub.models.Backbone:
    """Builds a backbone whose variables have shapes, dtypes and shardings, but no values.

    Args:
        source: A preset, a directory, a `.gguf` file, `hf://…`, `demo`, or `tiny:FAMILY`. A run stands for its base.
        precision: Keras dtype policy.
        quant_spec: Quantization of linear layers and embedding.
        sharding: Mesh sharding, on devices or on an abstract mesh.

    Raises:
        ModelError: The model's sizes aren't known without downloading its weights, or a layer doesn't fit the
            quantization spec.
    """
    parsed = parse_source(source)
    while parsed.kind in ("run", "peft"):
        if parsed.kind == "peft":
            parsed = parse_source(peft_base(Path(parsed.value)))
            continue
        parsed = parse_source(config_with_base(Path(parsed.value)).model.source)
    if parsed.kind in ("demo", "gguf", "hf", "hf_download"):
        return build_backbone(_hf_config(parsed), precision, source, quant_spec, sharding)
    with lazy_initialization():
        if parsed.kind == "keras":
            backbone = build_keras_preset(Path(parsed.value), precision)
        else:
            is_tiny = parsed.kind == "tiny"
            family, sizes = (parsed.value, tiny_config(parsed.value)) if is_tiny else preset_sizes(parsed.value)
            backbone = FAMILIES[family].causal_lm.backbone_cls(**sizes, dtype=precision)
        if quant_spec:
            quantize_layers(backbone, quant_spec)
        if sharding:
            sharding.place(backbone)
    return backbone


def preset_sizes(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the family of a preset and the sizes of its text part, as arguments of KerasHub's backbone.

    Raises:
        ModelError: The sizes of this preset aren't known.
    """
    found = {preset.name: preset for preset in presets()}.get(name)
    size = re.search(r"(?:^|_)(\d+[bm])(?:_|$)", name)
    known = _SIZES.get(found.family, {}).get(size[1]) if found and size else None
    if found is None or known is None:
        raise ModelError(
            f"The sizes of {name} are not known without its weights. Known are the presets of Gemma 1, 2 and 3 (see "
            "`gemma-tune models`). For any other model name its directory, or hf://ORG/NAME."
        )
    sizes = {**_OF_FAMILY[found.family], **dict(zip(_NAMES, known, strict=True))}
    if found.family == "gemma3" and sizes["hidden_dim"] <= _WIDTH_OF_SMALL:
        sizes["sliding_window_size"] = _SMALL_WINDOW
    if name.startswith("vault_gemma"):
        sizes |= {
            "use_post_ffw_norm": False,
            "use_post_attention_norm": False,
            "attention_logit_soft_cap": None,
            "final_logit_soft_cap": None,
            "sliding_window_size": _SMALL_WINDOW,
        }
    return found.family, sizes


def _hf_config(source: Source) -> dict[str, Any]:
    if source.kind in ("demo", "gguf"):
        return GgufCheckpoint(gguf_path(source)).config
    return read_json(hf_directory(source, weights=False) / "config.json")
