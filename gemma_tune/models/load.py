"""Loads a model, or its tokenizer alone, from any of the places that a source can name."""

from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.config import Config, ModelConfig
from gemma_tune.config_checks import PRECISIONS
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.models.family import FAMILIES, family_of, family_of_config
from gemma_tune.models.lora.adapter import ADAPTER_FILE, load_adapter
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.lora.peft_import import peft_base
from gemma_tune.models.precision import check_float16_range
from gemma_tune.models.sharding.placement import MeshSharding, make_mesh_sharding
from gemma_tune.models.sources.download import gguf_path, hf_directory
from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint
from gemma_tune.models.sources.hf_checkpoint import SafetensorsCheckpoint, load_backbone, load_hf_tokenizer
from gemma_tune.models.sources.keras_preset import load_keras_preset, load_keras_preset_tokenizer
from gemma_tune.models.sources.lazy_initialization import check_filled
from gemma_tune.models.sources.preprocessor import keras_tokenizer, text_preprocessor
from gemma_tune.models.sources.source import Source, config_with_base, parse_source
from gemma_tune.models.sources.tiny import TOKENIZER_PATH, tiny_backbone
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.json_files import read_json

_DEFAULTS = ModelConfig()


def load_model(
    source: str = _DEFAULTS.source,
    *,
    precision: str = _DEFAULTS.precision,
    quant_spec: QuantSpec | None = None,
    as_trained: bool = True,
    adapter: str = "",
    seed: int = 0,
    sharding: MeshSharding | None = None,
) -> keras.Model:
    """Loads a Gemma as a KerasHub CausalLM.

    Args:
        source: A preset (`gemma3_1b`), `kaggle://…`, `hf://…`, a directory (Keras preset, Hugging Face checkpoint, a
            run's workdir, or a PEFT adapter that names its base), a `.gguf` file, `demo`, `tiny` or `tiny:FAMILY`.
        precision: `float32`, `bfloat16`, `float16`, `mixed_bfloat16` or `mixed_float16`.
        quant_spec: Quantization of linear layers and embedding. They are quantized while they are read, so that the
            float weights are never in memory all at once. None: as the run was trained if `source` is a run, else none.
        as_trained: Whether the base of a run that was trained on quantized weights is quantized again; False: its
            floats are loaded.
        adapter: LoRA adapter to put on the model: a file or folder of gemma_tune's, or a folder of PEFT's.
        seed: Random seed of a tiny model's weights.
        sharding: Mesh sharding to load the weights onto. None: one device.

    Returns:
        A `keras_hub.models.CausalLM` with a preprocessor, so that `generate`, `fit`, `summary` and `save_to_preset`
        work.

    Raises:
        ModelError: The source doesn't exist, can't be downloaded or read, or is not a Gemma; or the precision can't
            hold its weights. The message says what to do.
    """
    if precision not in PRECISIONS:
        raise ModelError(
            f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.{did_you_mean(precision, PRECISIONS)}"
        )
    parsed = parse_source(source)
    if parsed.kind == "peft":
        adapter, parsed = adapter or parsed.value, parse_source(peft_base(Path(parsed.value)))
    if parsed.kind == "run":
        model = _load_run(Path(parsed.value), precision, seed, quant_spec, as_trained, sharding)
    else:
        with np.errstate(over="ignore"):  # `check_float16_range` finds values too large for float16.
            backbone, tokenizer = _load_parts(parsed, precision, seed, quant_spec, sharding)
        check_filled(backbone)
        check_float16_range(backbone)
        correct_query_scale(backbone)
        preprocessor = text_preprocessor(tokenizer, with_positions="position_ids" in backbone.input)
        model = FAMILIES[family_of(backbone)].causal_lm(preprocessor=preprocessor, backbone=backbone)
    if adapter:
        merge_lora(model.backbone)  # The LoRA of the run that the adapter builds on.
        load_adapter(model, adapter)
        if sharding:
            sharding.place(model.backbone)
    return model


def load_configured(config: Config, adapter: str = "") -> keras.Model:
    """Loads the model of a Config: quantized, with a LoRA adapter and onto a mesh of devices, as it says.

    Args:
        config: Settings of a run.
        adapter: LoRA adapter that takes the place of `config.model.adapter`.
    """
    model, training = config.model, config.training
    sharding = make_mesh_sharding(training.mesh, training.batch_size // training.grad_accum_steps)
    return load_model(
        model.source,
        precision=model.precision,
        quant_spec=config.quant_spec,
        adapter=adapter or model.adapter,
        seed=config.seed,
        sharding=sharding,
    )


def load_tokenizer(source: str = _DEFAULTS.source) -> tuple[TextTokenizer, str]:
    """Returns a model's tokenizer and the name of its family, without reading the weights.

    Sources and errors are those of `load_model`.
    """
    parsed = parse_source(source)
    if parsed.kind == "run":
        if (Path(parsed.value) / "model").exists():
            return load_tokenizer(str(Path(parsed.value) / "model"))
        return load_tokenizer(config_with_base(Path(parsed.value)).model.source)
    if parsed.kind == "peft":
        return load_tokenizer(peft_base(Path(parsed.value)))
    if parsed.kind == "tiny":
        return TextTokenizer(TOKENIZER_PATH.read_bytes()), parsed.value
    if parsed.kind in ("demo", "gguf"):
        checkpoint = GgufCheckpoint(gguf_path(parsed))
        return TextTokenizer(checkpoint.tokenizer_proto()), family_of_config(checkpoint.config, source)
    if parsed.kind in ("hf", "hf_download"):
        directory = hf_directory(parsed, weights=False)
        config = read_json(directory / "config.json")
        family = family_of_config(config, source)
        return TextTokenizer(load_hf_tokenizer(directory, config).proto), family
    return load_keras_preset_tokenizer(parsed)


def _load_parts(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[keras_hub.models.Backbone, keras_hub.tokenizers.Tokenizer]:
    """Loads the backbone and the tokenizer of a source that is neither a run nor an adapter."""
    if source.kind == "tiny":
        backbone = tiny_backbone(source.value, precision, seed, quant_spec)
        if sharding:
            sharding.place(backbone)
        return backbone, keras_tokenizer(source.value, TOKENIZER_PATH.read_bytes())
    if source.kind in ("demo", "gguf"):
        gguf = GgufCheckpoint(gguf_path(source))
        backbone = load_backbone(gguf, precision, str(gguf.path), quant_spec, sharding)
        return backbone, keras_tokenizer(family_of(backbone), gguf.tokenizer_proto())
    if source.kind in ("hf", "hf_download"):
        directory = hf_directory(source)
        checkpoint = SafetensorsCheckpoint(directory)
        backbone = load_backbone(checkpoint, precision, source.value, quant_spec, sharding)
        return backbone, load_hf_tokenizer(directory, checkpoint.config)
    return load_keras_preset(source, precision, quant_spec, sharding)


def _load_run(
    workdir: Path,
    precision: str,
    seed: int,
    quant_spec: QuantSpec | None,
    as_trained: bool,
    sharding: MeshSharding | None,
) -> keras.Model:
    """Loads the result of a run: its base with its adapter, or its fully trained model."""
    if (workdir / "model").exists():
        return load_model(str(workdir / "model"), precision=precision, quant_spec=quant_spec, sharding=sharding)
    if not (workdir / "adapter" / ADAPTER_FILE).exists():
        raise ModelError(
            f"{workdir} holds a run that has not finished: there is neither adapter/ nor model/. Run its train command "
            "again."
        )
    config = config_with_base(workdir)
    return load_model(
        config.model.source,
        precision=precision,
        quant_spec=quant_spec or (config.quant_spec if as_trained else None),
        adapter=str(workdir / "adapter"),
        seed=config.seed,
        sharding=sharding,
    )


def correct_query_scale(backbone: Any) -> None:
    """Passes `query_head_dim_normalize` on to the attention layers, which Gemma's and Gemma 3's decoder blocks omit.

    Gemma 2 27B and Gemma 3 27B scale queries by 1/sqrt(width / heads) instead of 1/sqrt(head width).
    """
    normalize = getattr(backbone, "query_head_dim_normalize", True)
    for block in backbone.transformer_layers:
        if hasattr(block.attention, "query_head_dim_normalize"):
            block.attention.query_head_dim_normalize = normalize
