"""The flags that several verbs share, and the way from flags, config file and overrides to a Config."""

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gemma_tune.config import Config
from gemma_tune.config_checks import METHODS, PRECISIONS
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.quantization.spec import SCHEMES
from gemma_tune.settings import flatten, setting_paths

# Flag -> (setting, help). Types and defaults are the setting's: they stand in Config alone.
_FLAGS = {
    "model": (
        "model.source",
        "A preset (see `gemma-tune models`), kaggle://…, hf://…, a directory, a .gguf file, demo, tiny, or the workdir "
        "of a run.",
    ),
    "data": (
        "data.source",
        "Training data: .jsonl, .json, .csv, .tsv or .parquet files (also .gz; globs and commas allowed), "
        "tfds:name/config, or sample:smartphone_support.",
    ),
    "calibration": (
        "data.source",
        "Data to calibrate with, best that of training; named as --data of train.",
    ),
    "eval_data": ("data.eval_source", "Held-out data of its own. If not given, a part of --data is held out."),
    "workdir": ("workdir", "Folder of the run. The same command on the same folder goes on where it was."),
    "method": ("training.method", f"{', '.join(METHODS[:-1])} or {METHODS[-1]}. qlora is lora on quantized weights."),
    "quantize": (
        "model.quantize",
        f"Holds weights in few bits: {', '.join(SCHEMES)}. With --method=qlora nf4 if not given.",
    ),
    "qat": (
        "training.qat",
        f"Trains for conversion to {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}: computes with rounded weights "
        "(quantization-aware training).",
    ),
    "block_size": ("model.block_size", "Weights of int4 and nf4 that share a scale: 32, 64, 128 or 256."),
    "double_quant": ("model.double_quant", "Also holds the scales of int4 and nf4 in eight bits."),
    "or_int8": ("model.or_int8", "Takes int8 for layers whose inputs --block_size does not divide."),
    "lora_rank": ("lora.rank", "Width of the LoRA factors."),
    "lora_alpha": ("lora.alpha", "LoRA updates are scaled by alpha / rank; 0: alpha = rank."),
    "lora_targets": ("lora.target_layers", "Layers with LoRA: attention, all-linear, or names with commas between."),
    "adapter": ("model.adapter", "LoRA factors to go on training, of a run or from PEFT, instead of new ones."),
    "lora_layout": (
        "lora.layout",
        "keras: factors for each head, as Keras's enable_lora. peft: those of the flattened matrix, as PEFT's.",
    ),
    "use_rslora": ("lora.use_rslora", "Scales LoRA updates by alpha / sqrt(rank)."),
    "use_dora": ("lora.use_dora", "Also trains the length of each output's weights (DoRA)."),
    "loraplus_lr_ratio": ("lora.loraplus_lr_ratio", "Learning rate of LoRA's B over that of A (LoRA+); 16 is usual."),
    "learning_rate": ("optimizer.learning_rate", "Peak learning rate; 0: 5e-4 for lora, 5e-5 for full."),
    "num_epochs": ("training.num_epochs", "Passes over the data."),
    "batch_size": ("training.batch_size", "Rows of --max_length tokens in one step. Short examples share a row."),
    "max_length": ("data.max_length", "Longest example in tokens."),
    "precision": (
        "model.precision",
        f"{', '.join(PRECISIONS)}. mixed: float32 weights, 16-bit arithmetic. float16: for GPUs without bfloat16.",
    ),
    "mesh": (
        "training.mesh",
        "Devices to spread the run over: auto, or data:2,fsdp:2,model:2 (copies, parts of weights, parts of products).",
    ),
    "on_error": ("data.on_error", "raise: stop at the first unreadable row. skip: count and report such rows."),
    "max_new_tokens": ("generation.max_new_tokens", "Longest answer in tokens."),
    "temperature": ("generation.temperature", "0: the likeliest token each time. Higher: bolder."),
    "top_k": ("generation.top_k", "Sample from the k likeliest tokens; 0: from all."),
    "top_p": ("generation.top_p", "Sample from the fewest tokens that hold this probability."),
    "min_p": ("generation.min_p", "Leave out tokens that are less than this times as likely as the likeliest."),
    "repetition_penalty": ("generation.repetition_penalty", "Above 1: tokens that have occurred get less likely."),
    "seed": ("seed", "Of everything random."),
}
_FOR_ANSWERS = (
    "model", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "precision", "quantize",
    "block_size", "mesh", "seed",
)  # fmt: skip
_WITHOUT_DEFAULT = ("calibration",)  # Given, where it is needed.
_DEFINITIONS: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    list: flags.DEFINE_string,
    tuple: flags.DEFINE_string,
}


def define(values: flags.FlagValues, *names: str, defaults: Mapping[str, Any] | None = None) -> None:
    """Defines shared flags, in the given order, and `--config`. A flag that isn't given is None.

    Args:
        values: Where.
        names: Of the flags.
        defaults: Setting -> what the help says of a verb that starts from other settings than Config's.
    """
    define_some(values, *names, defaults=defaults)
    flags.DEFINE_string(
        "config", None, "A config file, or the workdir of an earlier run, to start from.", flag_values=values
    )


def define_for_answers(values: flags.FlagValues) -> None:
    """Defines the flags of a verb in which a model answers, `--adapter` among them."""
    define(values, *_FOR_ANSWERS)
    flags.DEFINE_string("adapter", "", "A LoRA adapter to put on --model.", flag_values=values)


def define_some(values: flags.FlagValues, *names: str, defaults: Mapping[str, Any] | None = None) -> None:
    """Like `define`, without `--config`, for verbs with flags of their own between."""
    shown = flatten(Config().to_dict()) | dict(defaults or {})
    for name in names:
        path, text = _FLAGS[name]
        define_setting(values, name, shown[path], text, name not in _WITHOUT_DEFAULT)


def define_setting(values: flags.FlagValues, name: str, default: Any, text: str, shows_default: bool = True) -> None:
    """Defines a flag of a setting's type, whose help says the default, and which is None if it isn't given."""
    shown = ",".join(default) if isinstance(default, (list, tuple)) else default
    text = f"{text} (default: {shown})" if shown != "" and shows_default else text
    _DEFINITIONS[type(default)](name, None, text, flag_values=values)


def needed(values: flags.FlagValues, name: str, what: str) -> str:
    """Returns the value of a flag that must be given.

    Raises:
        ConfigError: It isn't; says what it means.
    """
    value = values[name].value
    if not value:
        raise ConfigError(f"--{name}=… is missing: {what}.")
    return str(value)


def to_config(values: flags.FlagValues, overrides: Sequence[str], base: Config | None = None) -> Config:
    """Returns the Config of a command: defaults, then the config file, then flags, then `--config.KEY=value`.

    Args:
        values: Parsed flags.
        overrides: The arguments that begin with `--config.`.
        base: What to start from instead of the defaults.

    Raises:
        ConfigError: A file, key or value is wrong.
    """
    config = base or Config()
    if "config" in values and values["config"].value:
        config = load_config_file(values["config"].value)
    given = {path: values[name].value for name, (path, _) in _FLAGS.items() if _is_given(values, name)}
    return apply_overrides(config.replace(given), overrides)


def _is_given(values: flags.FlagValues, name: str) -> bool:
    """Whether a shared flag is there and given; a verb may have one of its own by the same name."""
    return name in values and bool(values[name].present) and values[name].help.startswith(_FLAGS[name][1])


def load_config_file(name: str) -> Config:
    """Returns the Config that a config file's `get_config()` makes, or that a workdir's config.json holds."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no config file {path}.{did_you_mean(path.name, siblings)}")
    if path.suffix == ".json":
        import json

        try:
            return Config.from_saved(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from error
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
        ConfigError: No such key (suggests the nearest), or a value of another type.
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
    tree = values.config.to_dict()
    return Config.from_dict(tree)


def memory_bytes(text: str) -> float:
    """Returns the bytes that the flag --memory means; 0 when it isn't given.

    Raises:
        ConfigError: It is no size.
    """
    from gemma_tune.models.training_memory import parse_bytes

    try:
        return parse_bytes(text) if text else 0.0
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from error
