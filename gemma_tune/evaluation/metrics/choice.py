"""Finds metrics by name, or chooses those that suit the questions."""

import importlib.util
from collections.abc import Sequence

from gemma_tune.config_checks import HELDOUT_FIGURES
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.evaluation.answers import count_unspaced_characters
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.metrics.json_answers import JSON_METRICS
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.metrics.numbers import NUMBER_METRICS, last_number
from gemma_tune.evaluation.metrics.own_function import own_metric
from gemma_tune.evaluation.metrics.patterns import PATTERN_METRICS
from gemma_tune.evaluation.metrics.text import TEXT_METRICS
from gemma_tune.evaluation.metrics.tool_calls import TOOL_METRICS, parse_tool_calls

METRICS = {
    metric.name: metric for metric in (*TEXT_METRICS, *NUMBER_METRICS, *JSON_METRICS, *TOOL_METRICS, *PATTERN_METRICS)
}
# Figures of evaluations that aren't in METRICS, since they are not made of answers alone.
OTHER_FIGURES = (*HELDOUT_FIGURES, "num_tokens", "choice_accuracy", "choice_accuracy_per_byte", "judge_grade")
_PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score", "bleu": "sacrebleu"}
_EXTRA = "pip install 'gemma-tune[eval]'"
_OF_COLUMNS = ("regex", "contains", "forbidden", "json_schema")  # Chosen wherever their columns are.
_LABEL_WORDS = 3  # Wanted answers of so few words are labels or short facts.
_WORD_CHARACTERS = 2  # In a word of Chinese, on average; there are no spaces to count.
_SOME_CALLS = 0.1  # Share of tool calls among the wanted answers from which their metrics are chosen.


def find_metrics(names: Sequence[str], functions: Sequence[str] = ()) -> list[Metric]:
    """Returns metrics by name, and those of the user's own functions.

    Raises:
        ConfigError: There is no such metric (suggests the nearest), it needs a package that isn't installed, or a
            function can't be used or has the name of another metric.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"There is no metric {name!r}.{did_you_mean(name, METRICS)} Metrics: {', '.join(METRICS)}; and "
                "functions of your own, --metric=FILE.py:FUNCTION."
            )
        if not _is_installed(name):
            raise ConfigError(f"The metric {name} needs the package {_PACKAGES[name]}. Run: {_EXTRA}")
    own: dict[str, Metric] = {}
    for function in dict.fromkeys(functions):
        metric = own_metric(function)
        if metric.name in own or metric.name in METRICS or metric.name in OTHER_FIGURES:
            raise ConfigError(
                f"--metric={function}: there is another metric that is called {metric.name}. Rename the function."
            )
        own[metric.name] = metric
    return [METRICS[name] for name in dict.fromkeys(names)] + list(own.values())


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
        DataError: A row has something that its metric can't use, such as a wrong regular expression.
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
    texts = [text for text in references if not parse_tool_calls(text)]
    share = (len(references) - len(texts)) / len(references)
    calls = ["tool_arguments", "tool_name"] if share >= _SOME_CALLS else []
    if share > 0.5:
        return [*by_column, *calls, "length_words"]
    kinds = (
        (("json_match", "json_valid"), lambda: all(text.lstrip()[:1] in ("{", "[") for text in texts)),
        (("number_match", "exact_match"), lambda: all(map(_is_number, texts))),
        (("exact_match", "f1"), lambda: all(map(_is_label, texts))),
    )
    for names, fits in kinds:
        if fits():
            return [*by_column, *names, *calls, "length_words"]
    # sacrebleu's BLEU takes a sentence without spaces for one word.
    bleu = ["bleu"] if sum(map(_is_spaced, texts)) > len(texts) / 2 else []
    return [*by_column, "f1", "right_answer", "exact_match", "rougeL", *bleu, "chrf", *calls, "length_words"]


def _is_number(text: str) -> bool:
    return last_number(text) is not None and len(text.split()) <= 2


def _is_label(text: str) -> bool:
    has_few_characters = count_unspaced_characters(text) <= _LABEL_WORDS * _WORD_CHARACTERS
    return len(text.split()) <= _LABEL_WORDS and has_few_characters


def _is_spaced(text: str) -> bool:
    return count_unspaced_characters(text) <= len(text) / 2


def _is_installed(name: str) -> bool:
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None
