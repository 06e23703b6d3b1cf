"""Makes a metric of a Python function of the user's: `--metric=my_file.py:score`."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

_KNOWN = ("answer", "reference", "question", "columns")


def own_metric(text: str) -> Metric:
    """Returns the metric that a function computes, as the mean of its scores.

    The function takes what it needs of `answer`, `reference`, `question` and `columns` (all values of the row), and
    columns of the data by their names. It returns a number, a bool, or None for an answer that doesn't count.

    Args:
        text: `FILE.py:FUNCTION`, or `package.module:FUNCTION`.

    Raises:
        ConfigError: The file or the function doesn't exist, or can't be imported.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"--metric={text}: expected FILE.py:FUNCTION or package.module:FUNCTION.")
    module = _module(place, text)
    function = getattr(module, name, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ConfigError(
            f"--metric={text}: {place} has no function {name!r}.{did_you_mean(name, names)} "
            f"Functions: {', '.join(names) or 'none'}."
        )
    parameters = inspect.signature(function).parameters.values()
    taken = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    own_columns = [each.name for each in taken if each.name not in _KNOWN and each.default is each.empty]

    def statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
        scores = []
        for case, answer in zip(cases, answers, strict=True):
            known = {"answer": answer, "reference": case.reference, "question": case.question, "columns": case.columns}
            offered = {**case.columns, **known}
            chosen = offered if takes_all else {each.name: offered[each.name] for each in taken if each.name in offered}
            scores.append(_score(function, chosen, text, case))
        return mean_statistics(scores)

    def problem(cases: Sequence[EvalCase]) -> str:
        missing = [column for column in own_columns if any(column not in case.columns for case in cases)]
        return f"{name} needs {missing[0]!r}, which not every row has as a column." if missing else ""

    description = (inspect.getdoc(function) or f"{name} of {Path(place).name}").partition("\n")[0].rstrip(".")
    return Metric(name, description, statistics, problem=problem)


def _module(place: str, text: str) -> ModuleType:
    try:
        return _import_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError as error:
        raise ConfigError(f"--metric={text}: there is no file {place}.") from error
    except Exception as error:  # Whatever the user's file raises.
        raise ConfigError(f"--metric={text}: {place} can't be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # It ends with .py.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _score(function: Callable[..., Any], arguments: dict[str, Any], text: str, case: EvalCase) -> float | None:
    try:
        score = function(**arguments)
    except Exception as error:  # Whatever the user's function raises.
        raise ConfigError(
            f"--metric={text} failed for {case.origin or repr(case.question[:60])}: {type(error).__name__}: {error}"
        ) from error
    if score is None:
        return None
    if isinstance(score, (bool, int, float, np.number, np.bool_)) and math.isfinite(score):
        return float(score)
    raise ConfigError(
        f"--metric={text} should return a number, a bool or None; it returned {score!r:.60} for "
        f"{case.origin or repr(case.question[:60])}."
    )
