"""Defines which settings a search may change, and what Config a trial has."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.settings import flatten

_MOST_CORNERS = 2048  # Above it, every pair of settings is checked instead of every combination.


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
    values = {path: as_one_text(value) for path, value in flatten(base.to_dict()).items()}
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


def as_one_text(value: Any) -> Any:
    """Returns a list of names as one text, `query,value`: as Config and Optuna take it."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def short(value: Any) -> str:
    """Returns a setting's value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _described(setting: SearchedSetting) -> dict[str, Any]:
    when = {path: list(values) for path, values in setting.when}
    if setting.choices:
        found: dict[str, Any] = {"choices": list(setting.choices)}
    else:
        found = {"low": setting.low, "high": setting.high, "log": setting.log, "step": setting.step}
    return found | ({"when": when} if when else {})
