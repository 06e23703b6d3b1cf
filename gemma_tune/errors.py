"""Errors that a user can act on, and the did-you-mean that several of them share.

Each is raised with what was expected, what came, where, and what to do. The command line prints such an error as
one message and exits with 1; anything else that escapes is a defect of gemma_tune and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class GemmaTuneError(Exception):
    """Base of all errors that gemma_tune raises on purpose."""

    def __str__(self) -> str:
        """Returns the message, with half surrogate pairs escaped: damaged files hold them, no terminal prints them."""
        return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class ConfigError(GemmaTuneError, ValueError):
    """A setting, flag or config file is wrong."""


class DataError(GemmaTuneError, ValueError):
    """A data set can't be read or used."""


class ModelError(GemmaTuneError, ValueError):
    """A model, tokenizer or adapter can't be found, read or used."""


class TrainingError(GemmaTuneError, RuntimeError):
    """A run can't start, go on or be resumed."""


class ServingError(GemmaTuneError, RuntimeError):
    """A request can't be answered."""


class EngineFull(ServingError):
    """As many requests are waiting as may; later there is room again."""


class EngineClosed(ServingError):
    """The engine takes no requests: it hasn't been started, is being drained, or is closed."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the closest choices, or '' when nothing is close.

    The leading space lets it stand directly behind a sentence.
    """
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(close) + "?"
