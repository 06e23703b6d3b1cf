"""Translates the settings that earlier versions saved into today's values.

A run's `config.json` outlives the version that wrote it. Values that have been renamed since then are translated when
they are read. Flags and config files take today's values only.
"""

from collections.abc import Mapping
from typing import Any

RELATIVE_TO = "relative_to"  # Beside the settings: the folder from which relative paths start. It is no setting.
_RENAMED_VALUES = {
    ("training", "remat"): {"blocks": "dots"},
    ("training", "program"): {"blocks": "per_block"},
    ("training", "attention"): {"blocks": "xla"},
}


def with_current_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of saved settings with renamed values replaced by today's.

    Args:
        tree: Nested dicts as `Config.to_dict` returned them, in this version or an earlier one.
    """
    current = {name: dict(group) if isinstance(group, Mapping) else group for name, group in tree.items()}
    for (group, name), renamed in _RENAMED_VALUES.items():
        settings = current.get(group)
        if isinstance(settings, dict) and isinstance(settings.get(name), str):
            settings[name] = renamed.get(settings[name], settings[name])
    return current
