"""Describes which settings a search may change, and reads such a description from YAML.

A space names settings by their path in Config or by their flag:

    lora.rank: [4, 8, 16]                                          # a choice
    optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}    # a range
    training.num_epochs: {low: 2, high: 6, step: 2}                # whole numbers: 2, 4, 6
    lora.alpha: {choices: [8.0, 16.0], when: {training.method: lora}}
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.settings import flatten, setting_paths

_KEYS = ("choices", "low", "high", "log", "step", "when")
_MOST_CORNERS = 2048  # Above it, every pair of settings is checked instead of every combination.
_FIXED = ("workdir", "data.source", "data.eval_source", "data.split", "data.eval_split", "data.eval_fraction", "seed")


@dataclasses.dataclass(frozen=True)
class SearchedSetting:
    """A setting that a search changes.

    Attributes:
        path: Path of the setting in Config.
        choices: Values that it may have; empty: a range.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range is searched on a logarithmic scale.
        step: Distance between the values of a range; None: 1 for whole numbers, otherwise any value.
        when: Values that other settings must have for this one to be searched, by path. Otherwise it keeps the value
            of the base config.
    """

    path: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Returns all choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Returns whether the setting is searched.

        Args:
            values: Values of all settings by path.
        """
        return all(values[path] in wanted for path, wanted in self.when)

    def nearest(self, value: Any) -> Any:
        """Returns the value of the range that is nearest to `value`; of choices, `value` itself."""
        if self.choices:
            return value
        inside = min(max(value, self.low), self.high)
        if self.step:
            inside = self.low + round((inside - self.low) / self.step) * self.step
        return inside


@dataclasses.dataclass(frozen=True)
class Space:
    """The settings that a search changes.

    Attributes:
        settings: Searched settings. Those that others depend on come first.
    """

    settings: tuple[SearchedSetting, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values: what makes two spaces the same."""
        return {setting.path: _described(setting) for setting in self.settings}

    def including(self, base: Config) -> "Space":
        """Returns a space whose choices contain the values of `base`, so that the first trial can have them."""
        values = base_values(base)
        return Space(
            tuple(
                dataclasses.replace(setting, choices=(values[setting.path], *setting.choices))
                if setting.choices and values[setting.path] not in setting.choices
                else setting
                for setting in self.settings
            )
        )

    def first_values(self, base: Config) -> dict[str, Any]:
        """Returns the searched values of the first trial: those of `base`, moved into the ranges where outside."""
        values = base_values(base)
        first: dict[str, Any] = {}
        for setting in self.settings:
            if setting.applies(values | first):
                first[setting.path] = setting.nearest(values[setting.path])
        return first

    def check(self, base: Config) -> None:
        """Checks that the corners of the space are valid Configs.

        Every combination of choices and ends of ranges is checked, or every pair of settings where there are too many.

        Raises:
            ConfigError: A corner isn't valid; names its values.
        """
        for corner in self._corners():
            try:
                apply_values(self, base, corner)
            except ConfigError as error:
                where = ", ".join(f"{path}={value}" for path, value in corner.items())
                raise ConfigError(f"The space contains settings that are not allowed: {where}: {error}") from error

    def _corners(self) -> Iterator[dict[str, Any]]:
        count = math.prod(len(setting.extremes) for setting in self.settings)
        size = len(self.settings) if count <= _MOST_CORNERS else 2
        for chosen in itertools.combinations(self.settings, size):
            for values in itertools.product(*(setting.extremes for setting in chosen)):
                yield {setting.path: value for setting, value in zip(chosen, values, strict=True)}


def base_values(base: Config) -> dict[str, Any]:
    """Returns the plain values of a Config by path, with those that its method gives instead of a 0."""
    values = {path: _plain(value) for path, value in flatten(base.to_dict()).items()}
    return values | {"optimizer.learning_rate": base.learning_rate, "lora.alpha": base.lora_alpha}


def apply_values(space: Space, base: Config, values: Mapping[str, Any]) -> Config:
    """Returns `base` with the values of a trial. Settings whose condition doesn't hold keep the value of `base`.

    Raises:
        ConfigError: The values are not allowed together.
    """
    now, changes = base_values(base), {}
    for setting in space.settings:
        if setting.path in values and setting.applies(now):
            now[setting.path] = changes[setting.path] = values[setting.path]
    return base.replace(changes)


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
    values: list[Any] = [_as_type(path, _plain(choice)) for choice in choices]
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
        conditions.append((other, tuple(_as_type(other, _plain(value)) for value in values)))
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


def _plain(value: Any) -> Any:
    """Returns a list of names as one text, `query,value`: as Config and Optuna take it."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _in_order(settings: Iterable[SearchedSetting]) -> Iterator[SearchedSetting]:
    """Yields the settings so that each one comes after those that its condition names."""
    left = {setting.path: setting for setting in settings}
    while left:
        ready = [setting for setting in left.values() if not any(path in left for path, _ in setting.when)]
        if not ready:
            raise ConfigError(f"The conditions of {' and '.join(left)} depend on each other. Remove one `when`.")
        for setting in ready:
            yield left.pop(setting.path)


def _described(setting: SearchedSetting) -> dict[str, Any]:
    when = {path: list(values) for path, values in setting.when}
    if setting.choices:
        found: dict[str, Any] = {"choices": list(setting.choices)}
    else:
        found = {"low": setting.low, "high": setting.high, "log": setting.log, "step": setting.step}
    return found | ({"when": when} if when else {})
