"""Makes the Config of a command from its config file, its flags and its `--config.KEY=value` overrides."""

import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.settings import setting_paths
from gemma_tune.workdir_config import CONFIG_JSON, with_found_paths


def resolve_config(base: Config, file: str | None, given: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Returns the Config of a command. Each source of settings wins over those before it.

    Args:
        base: Settings to start from.
        file: Config file, or workdir of a run, which takes the place of `base`; empty: none.
        given: Settings that flags have set, by path.
        overrides: Arguments `--config.KEY=value`.

    Raises:
        ConfigError: A file, key or value is wrong.
    """
    config = load_config_file(file) if file else base
    return apply_overrides(config.replace(given), overrides)


def load_config_file(name: str) -> Config:
    """Returns the Config that a config file's `get_config()` makes, or that a workdir's config.json holds.

    The workdir of a run's Config is the folder that was named, so that `--config=RUN` resumes it from any folder.

    Raises:
        ConfigError: There is no such file, or it holds no Config.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        config = load_config_file(str(path / CONFIG_JSON))
        return config.replace({"workdir": str(path)})
    if not path.exists():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no config file {path}.{did_you_mean(path.name, siblings)}")
    return _load_json(path) if path.suffix == ".json" else _run_python(path)


def _load_json(path: Path) -> Config:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return with_found_paths(saved, path.parent) if isinstance(saved, dict) else Config.from_saved(saved)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _run_python(path: Path) -> Config:
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except Exception as error:
        raise ConfigError(f"{path} can't be run: {type(error).__name__}: {error}.") from error
    config = get_config() if callable(get_config) else None
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path} must define get_config() and return a gemma_tune.Config; got {type(config).__name__}."
        )
    return config


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Applies `--config.KEY=value` arguments with ml_collections, which reads each value as the type of the setting.

    Raises:
        ConfigError: There is no such key (suggests the nearest), or a value is of another type.
    """
    if not overrides:
        return config
    from ml_collections import config_dict, config_flags

    for argument in overrides:
        key, equals, _ = argument.lstrip("-").removeprefix("config.").partition("=")
        if key not in setting_paths(Config):
            raise ConfigError(f"There is no setting {key!r}.{did_you_mean(key, setting_paths(Config))}")
        if not equals:
            raise ConfigError(f"{argument}: write --config.{key}=value.")
    tree = config.to_dict()
    tree["lora"]["target_layers"] = ",".join(tree["lora"]["target_layers"])
    values = flags.FlagValues()
    arguments = ["gemma-tune", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config_dict.ConfigDict(tree), flag_values=values, sys_argv=arguments)
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    return Config.from_dict(values.config.to_dict())
