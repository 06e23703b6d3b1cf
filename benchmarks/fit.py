"""How a measured quantity grows, against how it is claimed to grow."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_TOLERANCE = 0.15  # Of an exponent: between points that are a factor of two apart, times 10 % off.
NAMES = {0: "constant", 1: "at most linear", 2: "at most quadratic"}


class Growth(NamedTuple):
    """y against x.

    Attributes:
        exponent: p of the best b·x^p through all points (least squares of logarithms).
        last_exponent: Of the line through the last two points: what is constant weighs least there.
        constant: a of the best a + b·x (least squares).
        slope: Its b.
        r_squared: How much of y's variance a + b·x explains.
        claimed: The largest exponent that is claimed.
    """

    exponent: float
    last_exponent: float
    constant: float
    slope: float
    r_squared: float
    claimed: int

    @property
    def is_as_claimed(self) -> bool:
        """Whether neither exponent is larger than claimed."""
        return max(self.exponent, self.last_exponent) <= self.claimed + _TOLERANCE


def growth(x: Sequence[float], y: Sequence[float], claimed: int) -> Growth:
    """Fits at least two points with different positive x, in rising order, and positive y."""
    log_x, log_y = np.log(x), np.log(y)
    slope, constant = np.polyfit(x, y, 1)
    residual, variance = np.square(y - (constant + slope * np.asarray(x))).sum(), np.square(y - np.mean(y)).sum()
    return Growth(
        exponent=float(np.polyfit(log_x, log_y, 1)[0]),
        last_exponent=float((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])),
        constant=float(constant),
        slope=float(slope),
        r_squared=float(1.0 - residual / variance) if variance > 0 else 1.0,
        claimed=claimed,
    )
