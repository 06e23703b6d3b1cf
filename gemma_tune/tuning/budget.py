"""Reads how much a search may cost: a number of trials, or a time."""

import re
from typing import NamedTuple

from gemma_tune.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Budget(NamedTuple):
    """How much a search may cost.

    Attributes:
        num_trials: Number of trials; 0: no limit.
        seconds: Time that all trials may take together, divided by the number of workers; 0: no limit.
    """

    num_trials: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.num_trials} trials" if self.num_trials else f"{self.seconds / 60:g} minutes"


def parse_budget(text: str) -> Budget:
    """Returns the budget that `30_trials`, `2h`, `90m` or `1h30m` says.

    Raises:
        ConfigError: It is none of these.
    """
    compact = text.replace(" ", "").replace("_", "").lower()
    if match := re.fullmatch(r"(\d+)trials?", compact):
        if int(match[1]):
            return Budget(int(match[1]), 0.0)
    elif re.fullmatch(r"(\d+(\.\d+)?(s|min|m|h|d))+", compact):
        parts = re.findall(r"(\d+(?:\.\d+)?)(s|min|m|h|d)", compact)
        if seconds := sum(float(number) * _UNITS[unit] for number, unit in parts):
            return Budget(0, seconds)
    raise ConfigError(f"--budget={text} can't be read. Write a number of trials, 30_trials, or a time: 2h, 90m, 1h30m.")
