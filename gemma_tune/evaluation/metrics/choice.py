"""Finds metrics by name, or chooses those that suit the questions."""

import importlib.util
from collections.abc import Sequence

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.json_answers import JSON_METRICS
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.metrics.numbers import NUMBER_METRICS, last_number
from gemma_tune.evaluation.metrics.own_function import own_metric
from gemma_tune.evaluation.metrics.patterns import PATTERN_METRICS
from gemma_tune.evaluation.metrics.text import TEXT_METRICS
from gemma_tune.evaluation.metrics.tool_calls import TOOL_METRICS

METRICS = {
    metric.name: metric for metric in (*TEXT_METRICS, *NUMBER_METRICS, *JSON_METRICS, *TOOL_METRICS, *PATTERN_METRICS)
}
_PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score", "bleu": "sacrebleu"}
_EXTRA = "pip install 'gemma-tune[eval]'"
_OF_COLUMNS = ("regex", "contains", "forbidden", "json_schema")  # Chosen wherever their columns are.
_LABEL_WORDS = 3  # Wanted answers of so few words are labels or short facts.


def find_metrics(names: Sequence[str], functions: Sequence[str] = ()) -> list[Metric]:
    """Returns metrics by name, and those of the user's own functions.

    Raises:
        ConfigError: There is no such metric (suggests the nearest), it needs a package that isn't installed, or a
            function can't be used.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"There is no metric {name!r}.{did_you_mean(name, METRICS)} Metrics: {', '.join(METRICS)}; and "
                "functions of your own, --metric=FILE.py:FUNCTION."
            )
        if not _is_installed(name):
            raise ConfigError(f"The metric {name} needs the package {_PACKAGES[name]}. Run: {_EXTRA}")
    return [METRICS[name] for name in dict.fromkeys(names)] + [own_metric(each) for each in functions]


def choose_metrics(
    names: Sequence[str], functions: Sequence[str], cases: Sequence[EvalCase]
) -> tuple[list[Metric], dict[str, str]]:
    """Returns the metrics of an evaluation, the most important first.

    Args:
        names: Names of metrics; none: those that suit the cases.
        functions: Metrics of the user's own, as in `own_metric`.
        cases: The questions.

    Returns:
        Metrics, and for those that would suit but were left out, what they need.

    Raises:
        ConfigError: As `find_metrics`; or a metric doesn't suit the cases (says why, and which do).
    """
    own = find_metrics((), functions)
    chosen = find_metrics(names) if names else []
    for metric in (*own, *chosen):
        if problem := metric.problem(cases):
            suited = ", ".join(name for name, each in METRICS.items() if not each.problem(cases))
            raise ConfigError(f"The metric {metric.name} doesn't suit this data: {problem} Metrics that do: {suited}.")
    if names:
        return [*own, *chosen], {}
    wanted = [name for name in _suited(cases) if not METRICS[name].problem(cases)]
    left_out = {name: f"it needs {_PACKAGES[name]}: {_EXTRA}" for name in wanted if not _is_installed(name)}
    return [*own, *(METRICS[name] for name in wanted if name not in left_out)], left_out


def _suited(cases: Sequence[EvalCase]) -> list[str]:
    """Returns the names of metrics that suit the cases, which may still have a problem with them."""
    by_column = [name for name in _OF_COLUMNS if not METRICS[name].problem(cases)]
    references = [case.reference for case in cases if case.reference]
    if not references:
        return [*by_column, "refusal", "length_words"]
    kinds = (
        (("tool_arguments", "tool_name"), lambda: not METRICS["tool_name"].problem(cases)),
        (("json_match", "json_valid"), lambda: all(text.lstrip()[:1] in ("{", "[") for text in references)),
        (("number_match", "exact_match"), lambda: all(_is_number(text) for text in references)),
        (("exact_match", "f1"), lambda: all(len(text.split()) <= _LABEL_WORDS for text in references)),
    )
    for names, fits in kinds:
        if fits():
            return [*by_column, *names, "length_words"]
    return [*by_column, "f1", "right_answer", "exact_match", "rougeL", "bleu", "chrf", "length_words"]


def _is_number(text: str) -> bool:
    return last_number(text) is not None and len(text.split()) <= 2


def _is_installed(name: str) -> bool:
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
