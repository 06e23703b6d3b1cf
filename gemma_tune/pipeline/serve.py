"""Starts the service behind a server: loads a model, names it and its adapters, and compiles the engine's programs."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gemma_tune.config import Config, GenerationConfig
from gemma_tune.errors import ConfigError
from gemma_tune.models.base_fingerprint import fingerprint
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.adapter import adapter_path
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.sources.source import Source, config_with_base, parse_source
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.progress import track_progress
from gemma_tune.serve_config import ServeConfig
from gemma_tune.serving.engine.engine import Engine
from gemma_tune.serving.engine.request import BASE
from gemma_tune.serving.http.served_models import RequestDefaults, ServedModel, Service
from gemma_tune.serving.prompt_encoder import prompt_encoder_of
from gemma_tune.serving.sampling import Sampling


class Base(NamedTuple):
    """The base model of all adapters.

    Attributes:
        source: Source of the model.
        name: Name of the model in requests.
        quant_spec: Quantization spec of its weights, or None.
        adapters: Adapters of the run that was named as the model, by name.
    """

    source: str
    name: str
    quant_spec: QuantSpec | None
    adapters: Mapping[str, Path]


def start_service(config: Config, settings: ServeConfig, adapters: Sequence[str], console: Console) -> Service:
    """Loads and names the models, and compiles the engine's programs.

    Args:
        config: Settings: the model, its precision, and the defaults of requests.
        settings: Settings of the server.
        adapters: `NAME=PATH` of LoRA adapters, or of runs with one.
        console: Console that shows progress.

    Raises:
        ConfigError: An adapter has no name, or one that is taken.
        ModelError: A model or adapter can't be loaded.
    """
    base = resolve_base(config, settings.name)
    paths = {**base.adapters, **_named_paths(adapters, {base.name, *base.adapters})}
    with console.status(f"Loading {base.source}…"):
        model = load_model(base.source, precision=config.model.precision, quant_spec=base.quant_spec, seed=config.seed)
        if lora_layers(model.backbone):  # The base is itself a run.
            merge_lora(model.backbone)
    version = fingerprint(model) + (f"@{base.quant_spec.scheme}" if base.quant_spec else "")
    engine = Engine(
        model,
        adapters=paths,
        max_concurrent=settings.max_concurrent,
        max_tokens_in_flight=settings.max_tokens_in_flight,
        max_length=settings.max_length,
        max_queued=settings.max_queued,
    )
    with track_progress("compiled programs") as advance:
        engine.start(lambda done, total: advance(1))
    return _service(engine, model, config.generation, _served(base.name, version, paths))


def resolve_base(config: Config, name: str) -> Base:
    """Returns the base model that `--model` stands for.

    For a run with an adapter that is the run's base, with the adapter beside it, so that both can be requested.

    Args:
        config: Settings; `model` names the model.
        name: Name for the model in requests, or ''.
    """
    source = parse_source(config.model.source)
    own_name = name or name_of(config.model.source, source)
    workdir = Path(source.value)
    if source.kind != "run" or not (workdir / "adapter").exists() or (workdir / "model").exists():
        return Base(config.model.source, own_name, config.quant_spec, {})
    run_config = config_with_base(workdir)
    under = run_config.model.source
    base_name = name_of(under, parse_source(under))
    if base_name == own_name:
        base_name += "-base"
    return Base(under, base_name, config.quant_spec or run_config.quant_spec, {own_name: workdir / "adapter"})


def name_of(text: str, source: Source) -> str:
    """Returns a model's name in requests: the last part of its path or address that isn't a number."""
    if source.kind in ("tiny", "demo"):
        return text
    path = Path(text).expanduser().resolve() if "://" not in text else Path(text)
    parts = [part for part in path.parts if not part.isdecimal()]  # Kaggle's addresses end with a version.
    return parts[-1].removesuffix(".gguf")


def _named_paths(adapters: Sequence[str], taken: set[str]) -> dict[str, Path]:
    """Returns the paths of the command line's adapters by name."""
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, place = given.partition("=")
        if not (name and equals and place):
            raise ConfigError(f"--adapter={given}: write --adapter=NAME=PATH, with the name for requests.")
        if name in taken or name in found:
            raise ConfigError(f"--adapter={given}: there is already a model named {name!r}. Choose another name.")
        found[name] = adapter_path(place)
    return found


def _served(base_name: str, version: str, paths: Mapping[str, Path]) -> dict[str, ServedModel]:
    """Returns all models by name. Adapters come first, since they are what the user has trained."""
    models = {
        name: ServedModel(name, name, base_name, f"{version}+{_digest(path)}") for name, path in sorted(paths.items())
    }
    models[base_name] = ServedModel(base_name, BASE, "", version)
    return models


def _service(
    engine: Engine, model: keras.Model, generation: GenerationConfig, models: Mapping[str, ServedModel]
) -> Service:
    return Service(
        engine=engine,
        models=models,
        encoder=prompt_encoder_of(model),
        max_length=engine.max_length,
        defaults=RequestDefaults(
            generation.max_new_tokens, Sampling(*(getattr(generation, name) for name in Sampling._fields))
        ),
    )


def _digest(path: Path) -> str:
    """Returns a hash of an adapter's files, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
