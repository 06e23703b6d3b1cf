"""Reads and writes settings that are kept in trees of frozen dataclasses, and checks their types.

A setting is named by its path in the tree, such as `lora.rank`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from gemma_tune.errors import ConfigError, did_you_mean

_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def setting_paths(cls: Any, prefix: str = "") -> list[str]:
    """Returns the path of every setting: `['workdir', 'seed', 'model.source', …]`."""
    paths = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            paths += setting_paths(field.type, f"{prefix}{field.name}.")
        else:
            paths.append(prefix + field.name)
    return paths


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{path: value}` for nested dicts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def to_plain(value: Any) -> Any:
    """Returns nested dicts of plain values; tuples become lists, as in JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_plain(cls: Any, tree: Mapping[str, Any]) -> Any:
    """Builds dataclasses from what `to_plain` returned, with defaults for missing settings.

    Raises:
        ConfigError: A setting is unknown (suggests the nearest), or its value is of another type.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"Expected groups of settings, as Config.to_dict() gives them, got {tree!r:.60}.")
    return _build(cls, tree, "", setting_paths(cls))


def _build(cls: Any, tree: Mapping[str, Any], prefix: str, known: list[str]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        if name not in fields:
            raise ConfigError(f"There is no setting {prefix + name!r}.{did_you_mean(prefix + name, known)}")
        field_type = fields[name].type
        if dataclasses.is_dataclass(field_type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix + name} is a group of settings, got {value!r}.")
            value = _build(field_type, value, f"{prefix}{name}.", known)
        values[name] = value
    return cls(**values)


def check_types(config: Any, prefix: str) -> None:
    """Checks the type of each value, and converts lists to tuples and whole numbers to floats where those are expected.

    Raises:
        ConfigError: A value is of another type.
    """
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_types(value, path + ".")
            continue
        object.__setattr__(config, field.name, _coerce(value, field.type, path))


def _coerce(value: Any, expected: Any, path: str) -> Any:
    if isinstance(expected, types.GenericAlias):  # tuple[str, ...] is the only one.
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(
            isinstance(item, typing.get_args(expected)[0]) for item in items
        ):
            raise ConfigError(f"{path} must be a list of names, got {value!r}.")
        return tuple(item.strip() for item in items if item.strip())
    if expected is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{path} must be {_TYPE_NAMES[expected]}, got {value!r:.60}.")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, got {value}.")
    return value
