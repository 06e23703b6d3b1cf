"""Scores multiple-choice questions by the log-likelihoods of their choices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ConfigError, DataError, did_you_mean
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.likelihood.log_likelihood import MAX_LENGTH, Pair, log_likelihoods
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.prompt_encoder import PromptEncoder, prompt_encoder_of

CHOICE_ACCURACY, CHOICE_ACCURACY_PER_BYTE = "choice_accuracy", "choice_accuracy_per_byte"
PROMPT_STYLES = ("chat", "plain")
_LETTERS = "ABCDEFGHIJ"
_ANSWERS = ("answer", "answerKey", "label")


def _from_answers(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
    raise AssertionError("choice_statistics computes these with the model, not from answers")


CHOICE_METRICS = (
    Metric(CHOICE_ACCURACY, "share of questions whose likeliest choice is the right one", _from_answers),
    Metric(
        CHOICE_ACCURACY_PER_BYTE, "share of questions whose likeliest choice per byte is the right one", _from_answers
    ),
)


class ChoiceQuestion(NamedTuple):
    """A multiple-choice question.

    Attributes:
        case: Row that it was read from.
        choices: Texts of the choices.
        answer: Number of the right choice, from 0.
    """

    case: EvalCase
    choices: tuple[str, ...]
    answer: int


def has_choices(case: EvalCase) -> bool:
    """Returns whether a row has the columns of a multiple-choice question."""
    return "choices" in case.columns or {"A", "B"} <= case.columns.keys()


def parse_choices(case: EvalCase) -> ChoiceQuestion:
    """Returns the choices of a row, and which of them is right.

    The choices are a list `choices` of texts, lists of texts and labels `{"text": […], "label": […]}` (as in ARC), or
    columns A, B, C … (as in MMLU). The right one is named by `answer`, `answerKey` or `label`: its label, its letter,
    its number from 0, or its text.

    Raises:
        DataError: The row has no choices, or no answer that is one of them.
    """
    texts, labels = _texts_and_labels(case)
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{case.origin}: a question needs at least two choices, none of them empty; got {texts!r}.")
    column = next((name for name in _ANSWERS if name in case.columns), "")
    answer = case.columns[column] if column else case.reference
    number = _number_of(answer, texts, labels)
    if number is None:
        named = f"{column!r} is {answer!r}" if column else "'answer' is missing"
        raise DataError(
            f"{case.origin}: {named}. It must name one of {len(texts)} choices: by its label ({', '.join(labels)}), "
            f"its number from 0 to {len(texts) - 1}, or its text."
        )
    return ChoiceQuestion(case, tuple(texts), number)


def choice_statistics(
    model: keras.Model,
    cases: Sequence[EvalCase],
    *,
    prompt_style: str = "chat",
    max_length: int = MAX_LENGTH,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, np.ndarray]:
    """Returns, by metric, the [n, 2] statistics of n rows, for a Metric that is a mean; 0 and 0 without choices.

    `choice_accuracy` takes the choice with the largest log-likelihood, as lm-eval's `acc` does, and
    `choice_accuracy_per_byte` the one with the largest log-likelihood per byte of UTF-8, as its `acc_bytes`: long
    choices are less probable, whether right or wrong. Of equal ones the first counts.

    Args:
        model: CausalLM. It is left as it is.
        cases: Rows of the evaluation.
        prompt_style: `chat`: the choices are answers to the chat prompt, as a tuned model gives them; `plain`: they
            follow "Question: …" and "Answer:", which suits a model that was not tuned on chats.
        max_length: Most tokens of a question with a choice; longer ones lose their beginning.
        advance: Called with the number of choices that were scored since the last call.

    Raises:
        DataError: The choices of a row, or its answer, can't be read.
        ConfigError: There is no such prompt style.
    """
    if prompt_style not in PROMPT_STYLES:
        raise ConfigError(
            f"prompt_style must be one of {', '.join(PROMPT_STYLES)}; got {prompt_style!r}."
            f"{did_you_mean(prompt_style, PROMPT_STYLES)}"
        )
    questions = {row: parse_choices(case) for row, case in enumerate(cases) if has_choices(case)}
    encoder = prompt_encoder_of(model)
    encode = _chat_pairs if prompt_style == "chat" else _plain_pairs
    pairs = [pair for question in questions.values() for pair in encode(encoder, question)]
    scores = iter(log_likelihoods(model, pairs, max_length=max_length, advance=advance))
    right: dict[str, list[float | None]] = {metric.name: [None] * len(cases) for metric in CHOICE_METRICS}
    for row, question in questions.items():
        log_probs = np.array([next(scores).log_prob for _ in question.choices])
        num_bytes = np.array([len(choice.encode()) for choice in question.choices])
        right[CHOICE_ACCURACY][row] = float(log_probs.argmax() == question.answer)
        right[CHOICE_ACCURACY_PER_BYTE][row] = float((log_probs / num_bytes).argmax() == question.answer)
    return {name: mean_statistics(values) for name, values in right.items()}


def _texts_and_labels(case: EvalCase) -> tuple[list[Any], list[str]]:
    columns = case.columns
    choices = columns.get("choices")
    if isinstance(choices, Mapping) and {"text", "label"} <= choices.keys():
        texts, labels = list(choices["text"]), [str(label) for label in choices["label"]]
        if len(texts) != len(labels):
            raise DataError(f"{case.origin}: 'choices' has {len(texts)} texts and {len(labels)} labels.")
        return texts, labels
    if choices is None and has_choices(case):
        labels = [letter for letter in _LETTERS if columns.get(letter) is not None]
        return [columns[letter] for letter in labels], labels
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        if len(choices) > len(_LETTERS):
            raise DataError(f"{case.origin}: 'choices' has {len(choices)} texts; at most {len(_LETTERS)} are allowed.")
        return list(choices), list(_LETTERS[: len(choices)])
    raise DataError(
        f"{case.origin}: no choices. Expected a list 'choices' of texts, lists of texts and labels "
        f"({{'text': […], 'label': […]}}), or columns A, B, C …; keys found: {sorted(map(str, columns))}."
    )


def _number_of(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    """Returns the number of the choice that an answer names, or None."""
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    named = str(answer).strip()
    for among in (labels, [text.strip() for text in texts]):
        if among.count(named) == 1:  # Labels first: in ARC some are numbers from 1.
            return list(among).index(named)
    return int(named) if named.isdecimal() and int(named) < len(texts) else None


def _chat_pairs(encoder: PromptEncoder, question: ChoiceQuestion) -> list[Pair]:
    """Returns the question as a chat prompt, with each choice as the model's answer, tokenized as in training."""
    context = encoder.encode(question.case.prompt)
    return [(context, encoder.tokenizer.encode(choice.strip())) for choice in question.choices]


def _plain_pairs(encoder: PromptEncoder, question: ChoiceQuestion) -> list[Pair]:
    """Returns the question as plain text, with each choice behind "Answer:"."""
    prompt = f"Question: {question.case.question.strip()}\nAnswer:"
    context = encoder.encode_text(prompt)
    return [(context, encoder.encode_text(f"{prompt} {choice.strip()}")[len(context) :]) for choice in question.choices]
