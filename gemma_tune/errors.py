"""Errors that a user can act on, and the did-you-mean suggestion that several of them contain.

Their messages say what was expected, what was found, where, and what to do. The command line prints such an error as
one message and exits with a code. Any other exception is a bug in gemma_tune and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class GemmaTuneError(Exception):
    """Base of all errors that gemma_tune raises on purpose."""

    def __str__(self) -> str:
        """Returns the message, with lone surrogates escaped: damaged files contain them; terminals can't print them."""
        return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class ConfigError(GemmaTuneError, ValueError):
    """A setting, flag or config file is wrong."""


class DataError(GemmaTuneError, ValueError):
    """A data set can't be read or used."""


class ModelError(GemmaTuneError, ValueError):
    """A model, tokenizer or adapter can't be found, read or used."""


class TrainingError(GemmaTuneError, RuntimeError):
    """A run can't start, continue or be resumed."""


class EvaluationError(GemmaTuneError, RuntimeError):
    """A model doesn't reach what a suite demands."""


class ServingError(GemmaTuneError, RuntimeError):
    """A request can't be answered."""


class EngineFull(ServingError):
    """The request queue is full. A later request may be accepted."""


class EngineClosed(ServingError):
    """The engine accepts no requests: it has not been started, is being drained, or is closed."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns ' Did you mean X?' with the closest choices, or '' where none is close.

    The leading space lets it follow a sentence.
    """
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(close) + "?"
