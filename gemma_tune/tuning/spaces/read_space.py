"""Reads which settings a search may change, from YAML or a mapping.

A space names settings by their path in Config or by their flag:

    lora.rank: [4, 8, 16]                                          # a choice
    optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}    # a range
    training.num_epochs: {low: 2, high: 6, step: 2}                # whole numbers: 2, 4, 6
    lora.alpha: {choices: [8.0, 16.0], when: {training.method: lora}}
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.settings import flatten, setting_paths
from gemma_tune.tuning.spaces.space import SearchedSetting, Space, as_one_text

_KEYS = ("choices", "low", "high", "log", "step", "when")
_FIXED = ("workdir", "data.source", "data.eval_source", "data.split", "data.eval_split", "data.eval_fraction", "seed")


def read_space(file: Path, flags: Mapping[str, str]) -> Space:
    """Reads a space from a YAML file.

    Args:
        file: YAML file.
        flags: Path of a setting by the name of its flag.

    Raises:
        ConfigError: The file can't be read, or describes no space.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--space={file} can't be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--space={file} is not valid YAML: {error}") from error
    try:
        return parse_space(tree, flags)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse_space(tree: Any, flags: Mapping[str, str] = {}) -> Space:
    """Returns the space that a mapping describes, as YAML holds it.

    Args:
        tree: Choices (a list) or range (a mapping) by path of the setting or name of its flag.
        flags: Path of a setting by the name of its flag.

    Raises:
        ConfigError: A key is unknown (suggests the nearest), or a range or choice is wrong.
    """
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(
            f"A space maps settings to choices or ranges, such as lora.rank: [4, 8, 16]; got {tree!r:.60}."
        )
    settings = [_parse_setting(_path_of(str(name), flags), value, flags) for name, value in tree.items()]
    paths = [setting.path for setting in settings]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ConfigError(f"{twice[0]} is in the space twice. Remove one of the two.")
    return Space(tuple(_in_order(settings)))


def _path_of(name: str, flags: Mapping[str, str]) -> str:
    known = setting_paths(Config)
    path = name if name in known else flags.get(name, "")
    if not path:
        raise ConfigError(f"There is no setting {name!r}.{did_you_mean(name, [*known, *flags])}")
    if path in _FIXED:
        raise ConfigError(f"{path} can't be searched: trials with another one can't be compared. Remove it.")
    return path


def _parse_setting(path: str, value: Any, flags: Mapping[str, str]) -> SearchedSetting:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"choices": list(value)}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{path}: expected choices such as [4, 8] or a range such as {{low: 1, high: 9}}; got {value!r}."
        )
    if unknown := [key for key in value if key not in _KEYS]:
        raise ConfigError(
            f"{path}: unknown key {unknown[0]!r}.{did_you_mean(str(unknown[0]), _KEYS)} Keys: {', '.join(_KEYS)}."
        )
    when = _parse_when(path, value.get("when", {}), flags)
    if "choices" in value:
        if extra := sorted({"low", "high", "log", "step"} & set(value)):
            raise ConfigError(f"{path} has both choices and {extra[0]!r}. Write either choices or a range.")
        return SearchedSetting(path, choices=_parse_choices(path, value["choices"]), when=when)
    return _parse_range(path, value, when)


def _parse_choices(path: str, choices: Any) -> tuple[Any, ...]:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise ConfigError(f"{path}: choices must be a list with at least one value, got {choices!r}.")
    values: list[Any] = [_as_type(path, as_one_text(choice)) for choice in choices]
    if len({repr(value) for value in values}) < len(values):
        raise ConfigError(f"{path}: a choice is there twice: {list(choices)}.")
    return tuple(values)


def _parse_range(path: str, value: Mapping[str, Any], when: Any) -> SearchedSetting:
    kind = type(_defaults()[path])
    if kind not in (int, float):
        raise ConfigError(f"{path} is no number, so it can't have a range. Write a list of choices.")
    if missing := [key for key in ("low", "high") if key not in value]:
        raise ConfigError(f"{path}: {missing[0]!r} is missing. A range is {{low: …, high: …}}.")
    low, high = (_as_type(path, value[key]) for key in ("low", "high"))
    log, step = value.get("log", False), value.get("step")
    if not isinstance(log, bool):
        raise ConfigError(f"{path}: log must be true or false, got {log!r}.")
    if not low < high:
        raise ConfigError(f"{path}: low must be less than high, got low={low} and high={high}.")
    if log and low <= 0:
        raise ConfigError(f"{path}: low must be greater than 0 on a logarithmic scale, got {low}.")
    if step is not None:
        step = _as_type(path, step)
        if log:
            raise ConfigError(f"{path}: a range has either log or step, not both.")
        if step <= 0 or step > high - low:
            raise ConfigError(f"{path}: step must be greater than 0 and at most high - low, got {step}.")
        high = low + math.floor((high - low) / step + 1e-9) * step  # The last value that the steps reach.
    return SearchedSetting(path, low=low, high=high, log=log, step=step, when=when)


def _parse_when(path: str, when: Any, flags: Mapping[str, str]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(when, Mapping):
        raise ConfigError(f"{path}: when maps settings to values, such as {{training.method: lora}}; got {when!r}.")
    conditions = []
    for name, wanted in when.items():
        other = _path_of(str(name), flags)
        values = wanted if isinstance(wanted, list) else [wanted]
        conditions.append((other, tuple(_as_type(other, as_one_text(value)) for value in values)))
    return tuple(conditions)


def _as_type(path: str, value: Any) -> Any:
    """Returns a value of the setting's type. YAML reads 1e-5, without a dot, as text."""
    default = _defaults()[path]
    if type(default) is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(default, list):
        if isinstance(value, str):
            return value
    elif type(value) is type(default):
        return value
    raise ConfigError(f"{path}: expected a value like {default!r}, got {value!r}.")


def _defaults() -> dict[str, Any]:
    return flatten(Config().to_dict())


def _in_order(settings: Iterable[SearchedSetting]) -> Iterator[SearchedSetting]:
    """Yields the settings so that each one comes after those that its condition names."""
    left = {setting.path: setting for setting in settings}
    while left:
        ready = [setting for setting in left.values() if not any(path in left for path, _ in setting.when)]
        if not ready:
            raise ConfigError(f"The conditions of {' and '.join(left)} depend on each other. Remove one `when`.")
        for setting in ready:
            yield left.pop(setting.path)
