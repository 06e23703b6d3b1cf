"""Loads a model by any of its names into a KerasHub CausalLM."""

import contextlib
from collections.abc import Iterator
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
from gemma_tune.models.precision import check_range
from gemma_tune.models.preset import check_whole, read_schemes
from gemma_tune.models.quantized.convert import apply_schemes, quantize_layers
from gemma_tune.models.sharding.placement import MeshSharding, make_mesh_sharding
from gemma_tune.models.sources import hf_checkpoint
from gemma_tune.models.sources.download import demo_path, download_hf, first_line
from gemma_tune.models.sources.gguf_checkpoint import GgufCheckpoint
from gemma_tune.models.sources.lazy_initialization import check_filled, lazy_initialization
from gemma_tune.models.sources.preprocessor import text_preprocessor
from gemma_tune.models.sources.source import Source, parse_source
from gemma_tune.models.sources.tiny import TOKENIZER_PATH, tiny_backbone
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras
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
    """Loads a Gemma.

    Args:
        source: A preset (`gemma3_1b`), `kaggle://…`, `hf://…`, a directory (Keras preset, Hugging Face, a run's
            workdir, or a PEFT adapter that says its base), a `.gguf` file, `demo`, `tiny` or `tiny:FAMILY`.
        precision: `float32`, `bfloat16`, `float16`, `mixed_bfloat16` or `mixed_float16`.
        quant_spec: Quantizes linear layers and embedding while they are read: there is never a float copy of them all. None:
            as a run was trained, if it is a run's, else not at all.
        as_trained: False: a run's base is read in floats even where it was trained on quantized weights.
        adapter: A LoRA adapter to put on top; a folder from PEFT too.
        seed: Of a tiny model's weights.
        sharding: Of a mesh of devices to load it onto. None: one device.

    Returns:
        A `keras_hub.models.CausalLM` with a preprocessor, so that `generate`, `fit`, `summary` and `save_to_preset`
        work.

    Raises:
        ModelError: There is no such model, it can't be downloaded or read, it is no Gemma, or the precision can't hold
            its weights; says what to do.
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
        with np.errstate(over="ignore"):  # What is too large for float16, `check_range` finds.
            backbone, tokenizer = _LOADERS[parsed.kind](parsed, precision, seed, quant_spec, sharding)
        check_filled(backbone)
        check_range(backbone)
        correct_query_scale(backbone)
        preprocessor = text_preprocessor(tokenizer, with_positions="position_ids" in backbone.input)
        model = FAMILIES[family_of(backbone)].causal_lm(preprocessor=preprocessor, backbone=backbone)
    if adapter:
        merge_lora(model.backbone)  # Of a run that the adapter builds on, if there is one.
        load_adapter(model, adapter)
        if sharding:
            sharding.place(model.backbone)
    return model


def load_configured(config: Config, adapter: str = "") -> keras.Model:
    """Loads the model that a Config names, quantized if it says so, with a LoRA adapter on top if one is named; onto
    the devices of its mesh, if it has one.
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
    """Returns a model's tokenizer and its family, without reading the weights. Names and errors as in `load_model`."""
    parsed = parse_source(source)
    if parsed.kind == "run":
        if (Path(parsed.value) / "model").exists():
            return load_tokenizer(str(Path(parsed.value) / "model"))
        return load_tokenizer(read_json(Path(parsed.value) / "config.json")["model"]["source"])
    if parsed.kind == "peft":
        return load_tokenizer(peft_base(Path(parsed.value)))
    if parsed.kind == "tiny":
        return TextTokenizer(TOKENIZER_PATH.read_bytes()), parsed.value
    if parsed.kind in ("demo", "gguf"):
        checkpoint = GgufCheckpoint(demo_path() if parsed.kind == "demo" else Path(parsed.value))
        return TextTokenizer(checkpoint.tokenizer_proto()), family_of_config(checkpoint.config, source)
    if parsed.kind in ("hf", "hf_download"):
        directory = Path(parsed.value) if parsed.kind == "hf" else download_hf(parsed.value, weights=False)
        config = read_json(directory / "config.json")
        family = family_of_config(config, source)
        return TextTokenizer(hf_checkpoint.load_hf_tokenizer(directory, FAMILIES[family], config).proto), family
    with _keras_errors(parsed):
        loader = _preset_loader(parsed)
        with lazy_initialization():
            backbone = _keras_backbone(loader, "float32")
        family = family_of(backbone)
        return TextTokenizer(loader.load_tokenizer(FAMILIES[family].tokenizer).proto), family


def _load_tiny(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[Any, Any]:
    backbone = tiny_backbone(source.value, precision, seed, quant_spec)
    if sharding:
        sharding.place(backbone)
    return backbone, _tokenizer(source.value, TOKENIZER_PATH.read_bytes())


def _load_demo(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[Any, Any]:
    del source
    return _load_gguf(Source("gguf", str(demo_path())), precision, seed, quant_spec, sharding)


def _load_gguf(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[Any, Any]:
    del seed
    checkpoint = GgufCheckpoint(Path(source.value))
    backbone = hf_checkpoint.load_backbone(checkpoint, precision, source.value, quant_spec, sharding)
    return backbone, _tokenizer(family_of(backbone), checkpoint.tokenizer_proto())


def _load_hf(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[Any, Any]:
    del seed
    directory = Path(source.value) if source.kind == "hf" else download_hf(source.value)
    checkpoint = hf_checkpoint.SafetensorsCheckpoint(directory)
    backbone = hf_checkpoint.load_backbone(checkpoint, precision, source.value, quant_spec, sharding)
    return backbone, hf_checkpoint.load_hf_tokenizer(directory, FAMILIES[family_of(backbone)], checkpoint.config)


def _load_keras(
    source: Source, precision: str, seed: int, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[Any, Any]:
    """Loads a Keras preset: KerasHub builds it, without random weights first and without vision and audio towers."""
    del seed
    if source.kind == "keras":
        check_whole(Path(source.value))
    with _keras_errors(source):
        loader = _preset_loader(source)
        with lazy_initialization():
            backbone = _keras_backbone(loader, precision)
            apply_schemes(backbone, read_schemes(Path(source.value)) if source.kind == "keras" else {})
            if quant_spec:
                quantize_layers(backbone, quant_spec)
            if sharding:
                sharding.place(backbone)
                sharding.assign_parts(backbone)
        tokenizer_cls = FAMILIES[family_of(backbone)].tokenizer
        loader._load_backbone_weights(backbone)
        return backbone, loader.load_tokenizer(tokenizer_cls)


def keras_preset_backbone(source: Source, precision: str) -> Any:
    """Builds the backbone of a Keras preset in a directory, as it is held there. To be called within `skeleton`."""
    check_whole(Path(source.value))
    with _keras_errors(source):
        backbone = _keras_backbone(_preset_loader(source), precision)
        apply_schemes(backbone, read_schemes(Path(source.value)))
    return backbone


def _preset_loader(source: Source) -> Any:
    from keras_hub.src.utils.preset_utils import get_preset_loader

    return get_preset_loader(source.value)


def _keras_backbone(loader: Any, precision: str) -> Any:
    config = loader.config["config"]
    towers = {name: None for name in ("vision_encoder", "audio_encoder") if config.get(name) is not None}
    return loader.load_backbone(loader.check_backbone_class(), load_weights=False, dtype=precision, **towers)


@contextlib.contextmanager
def _keras_errors(source: Source) -> Iterator[None]:
    """Turns what Keras, h5py, kagglehub and requests raise, each in its own way, into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_keras_message(source, error)) from error


def _keras_message(source: Source, error: Exception) -> str:
    if source.kind == "keras":
        return f"{source.value} can't be read as a Keras preset: {first_line(error)}"
    reason = first_line(error)
    consent = any(word in str(error) for word in ("403", "401", "gated", "not accessible", "onsent", "redential"))
    advice = (
        "Accept the model's terms on its page at kaggle.com/models, make an API token (kaggle.com/settings) and set "
        "KAGGLE_USERNAME and "
        "KAGGLE_KEY, or save it as ~/.kaggle/kaggle.json."
    )
    if not consent:
        advice = "Check the network and the name. " + advice
    return f"{source.value} can't be downloaded from Kaggle: {reason} {advice}"


def _load_run(
    workdir: Path,
    precision: str,
    seed: int,
    quant_spec: QuantSpec | None,
    as_trained: bool,
    sharding: MeshSharding | None,
) -> keras.Model:
    """Loads what a run made: its base with its adapter, or its fully trained model."""
    if (workdir / "model").exists():
        return load_model(str(workdir / "model"), precision=precision, quant_spec=quant_spec, sharding=sharding)
    if not (workdir / "adapter" / ADAPTER_FILE).exists():
        raise ModelError(
            f"{workdir} is a run that has not finished: it has neither adapter/ nor model/. Run its train command "
            "again."
        )
    config = Config.from_saved(read_json(workdir / "config.json"))
    return load_model(
        config.model.source,
        precision=precision,
        quant_spec=quant_spec or (config.quant_spec if as_trained else None),
        adapter=str(workdir / "adapter"),
        seed=config.seed,
        sharding=sharding,
    )


def _tokenizer(family: str, proto: bytes) -> Any:
    from keras.src.utils.tracking import DotNotTrackScope

    classes = FAMILIES[family]
    with DotNotTrackScope():  # Else Keras copies the 262,144 pieces, twice, to look for variables among them.
        return classes.tokenizer(proto, **classes.tokenizer_arguments)


def correct_query_scale(backbone: Any) -> None:
    """Passes `query_head_dim_normalize` on to the attention layers, which Gemma's and Gemma 3's blocks forget.

    Gemma 2 27B and Gemma 3 27B scale queries by 1/sqrt(width / heads) instead of 1/sqrt(head width).
    """
    normalize = getattr(backbone, "query_head_dim_normalize", True)
    for block in backbone.transformer_layers:
        if hasattr(block.attention, "query_head_dim_normalize"):
            block.attention.query_head_dim_normalize = normalize


_LOADERS = {
    "tiny": _load_tiny,
    "demo": _load_demo,
    "gguf": _load_gguf,
    "hf": _load_hf,
    "hf_download": _load_hf,
    "keras": _load_keras,
    "keras_download": _load_keras,
}
