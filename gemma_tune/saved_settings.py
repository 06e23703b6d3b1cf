"""Settings as earlier versions wrote them into the files of runs, in today's words.

A run's `config.json` outlives the version that wrote it. Values that have been renamed since are translated when they
are read; flags and config files take today's names alone.
"""

from collections.abc import Mapping
from typing import Any

_RENAMED_VALUES = {
    ("training", "remat"): {"blocks": "dots"},
    ("training", "program"): {"blocks": "per_block"},
    ("training", "attention"): {"blocks": "xla"},
}


def in_current_words(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of saved settings in which renamed values have their names of today.

    Args:
        tree: Nested dicts as `Config.to_dict` gave them, in this version or an earlier one.
    """
    current = {name: dict(group) if isinstance(group, Mapping) else group for name, group in tree.items()}
    for (group, name), renamed in _RENAMED_VALUES.items():
        settings = current.get(group)
        if isinstance(settings, dict) and isinstance(settings.get(name), str):
            settings[name] = renamed.get(settings[name], settings[name])
    return current
