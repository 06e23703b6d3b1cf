"""Choices are read as ARC, MMLU and plain rows write them, and scored by KerasHub's own logits."""

import numpy as np
import pytest
from helpers.logits import logits_of
from scipy.special import log_softmax

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError, DataError
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.likelihood.multiple_choice import choice_statistics, has_choices, parse_choices
from gemma_tune.models.sources.tokenizer import tokenizer_of

TEXTS = ["Red", "Green", "Blue"]
ARC = {"text": TEXTS, "label": ["1", "2", "3"]}


def case(reference="", **columns):
    return EvalCase((Turn("user", "Which color?"),), reference, columns, "colors.jsonl:3")


@pytest.mark.parametrize(
    "row, answer",
    [
        (case(choices=TEXTS, answer=1), 1),
        (case(choices=TEXTS, answer=1.0), 1),
        (case(choices=TEXTS, answer="C"), 2),
        (case(choices=TEXTS, answer="Green"), 1),
        (case("Blue", choices=TEXTS), 2),
        (case(choices=ARC, answerKey="1"), 0),  # A label, not a number from 0.
        (case(choices=ARC, answerKey="3"), 2),
        (case(A="Red", B="Green", C="Blue", D=None, answer="B"), 1),
        (case(choices=["1", "2", "0"], answer="2"), 1),  # A text, not a number from 0.
        (case(choices=TEXTS, label=0), 0),
    ],
)
def test_all_ways_to_name_the_right_choice(row, answer):
    assert has_choices(row)
    assert parse_choices(row)[1:] == (tuple(TEXTS if row.columns.get("choices") != ["1", "2", "0"] else "120"), answer)


@pytest.mark.parametrize(
    "row, message",
    [
        (case(choices=TEXTS, answer=3), r"colors.jsonl:3: 'answer' is 3. It must name one of 3 choices.*A, B, C"),
        (case(choices=TEXTS, answer=True), "'answer' is True"),
        (case(choices=["Red", "Red"], answer="Red"), "'answer' is 'Red'"),
        (case(choices=["Red"], answer=0), "at least two choices"),
        (case(choices=["Red", " "], answer=0), "none of them empty"),
        (case(choices={"text": TEXTS, "label": ["A"]}, answer="A"), "3 texts and 1 labels"),
        (case(choices="Red, Green", answer=0), "no choices. Expected a list"),
        (case(question="?"), "no choices. Expected a list"),
    ],
)
def test_what_cannot_be_read_is_said(row, message):
    with pytest.raises(DataError, match=message):
        parse_choices(row)


def by_definition(model, prompt, choices):
    tokenizer = tokenizer_of(model)
    context = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    found = []
    for choice in choices:
        ids = [*context, *tokenizer.encode(choice)]
        log_probs = log_softmax(logits_of(model, np.array([ids[:-1]], np.int32))[0].astype(float), axis=1)
        found.append(sum(log_probs[at - 1, ids[at]] for at in range(len(context), len(ids))))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("prompt_style", ["chat", "plain"])
def test_the_likeliest_choice_counts(tiny, prompt_style):
    model = tiny()
    choices = ["Red", "A long sentence about the color green, and more", "Blue and white"]
    if prompt_style == "chat":
        prompt, texts = "<start_of_turn>user\nWhich color?<end_of_turn>\n<start_of_turn>model\n", choices
    else:
        prompt, texts = "Question: Which color?\nAnswer:", [f" {choice}" for choice in choices]
    log_probs = by_definition(model, prompt, texts)
    likeliest = int(log_probs.argmax())
    per_byte = int((log_probs / [len(choice) for choice in choices]).argmax())
    assert likeliest != per_byte  # Or else one could stand for the other.
    cases = [case(choices=choices, answer=number) for number in range(3)]
    found = choice_statistics(model, [*cases, case("no choices")], prompt_style=prompt_style)
    for name, right in (("choice_accuracy", likeliest), ("choice_accuracy_per_byte", per_byte)):
        assert found[name].tolist() == [[float(number == right), 1.0] for number in range(3)] + [[0.0, 0.0]]


def test_an_unknown_style_is_refused(tiny):
    with pytest.raises(ConfigError, match="Did you mean plain"):
        choice_statistics(None, [], prompt_style="plian")
