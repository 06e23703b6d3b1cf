"""The shipped suite of the support desk: its rows, and what passes and falls."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import gemma_tune
from gemma_tune.data import load_examples
from gemma_tune.evaluation.answers import word_f1, words
from gemma_tune.evaluation.metrics.choice import METRICS
from gemma_tune.evaluation.suites.check_suite import PartAnswers, check_suite
from gemma_tune.evaluation.suites.load_suite import load_suite, shipped_suites

SHIPPED = "smartphone_support"
NUM_ROWS = {
    "heldout": 66,
    "paraphrases": 66,
    "typing_errors": 30,
    "other_languages": 20,
    "unanswerable": 40,
    "prompt_injection": 15,
    "general_knowledge": 30,
}


@pytest.fixture(scope="module")
def metrics():
    return METRICS


@pytest.fixture(scope="module")
def shipped(metrics):
    return load_suite(SHIPPED, metrics)


@pytest.fixture(scope="module")
def learnt():
    """The rows of the sample that a model learns, and those that are held out."""
    return load_examples(f"sample:{SHIPPED}"), load_examples(f"sample:{SHIPPED}/heldout")


def part(suite, name):
    return next(part for part in suite.parts if part.name == name)


def test_the_shipped_suite_has_its_parts(shipped):
    assert shipped_suites() == [SHIPPED]
    assert [part.name for part in shipped.parts] == list(NUM_ROWS)
    assert all(len(part.cases) >= NUM_ROWS[part.name] for part in shipped.parts)
    assert len(part(shipped, "unanswerable").cases) == 40
    topics = Counter(case.columns["topic"] for case in part(shipped, "paraphrases").cases)
    assert set(topics.values()) == {1} and topics.keys() == {
        case.columns["topic"] for case in part(shipped, "heldout").cases
    }


def test_no_two_of_its_questions_are_alike_and_none_was_learnt(shipped, learnt):
    questions = [" ".join(words(case.question)) for case in shipped.cases]
    assert [question for question, count in Counter(questions).items() if count > 1] == []
    train, heldout = ({" ".join(words(example.question)) for example in examples} for examples in learnt)
    own = {
        " ".join(words(case.question)) for name in NUM_ROWS if name != "heldout" for case in part(shipped, name).cases
    }
    assert not own & train and not own & heldout
    assert not train & set(questions)


def test_its_wanted_answers_are_those_of_the_sample(shipped, learnt):
    answers = {example.answer for examples in learnt for example in examples}
    handed_over = {case.reference for case in part(shipped, "unanswerable").cases}
    assert len(handed_over) == 1
    others = {case.reference for case in shipped.cases if case.columns.get("topic") not in (None, "hand_over")}
    assert others <= answers
    (hand_over,) = handed_over
    assert max(word_f1(hand_over, answer) for answer in answers - handed_over) < 0.5  # Never confused with an answer.
    injections = part(shipped, "prompt_injection").cases
    assert {case.reference for case in injections if case.columns["topic"] == "hand_over"} == handed_over
    for case in injections:
        assert not [text for text in case.columns["must_not_contain"] if text.casefold() in case.reference.casefold()]


def test_the_wanted_answers_pass_and_others_fail(shipped, metrics):
    """All wanted answers reach the bounds. Each part falls with answers that someone would be ashamed of."""

    def results(answer):
        return {
            part.name: PartAnswers([answer(case) for case in part.cases], [best(case) for case in part.cases])
            for part in shipped.parts
        }

    def best(case):
        return case.reference or re.search(r"\\b\((.*?)[|)]", case.columns["regex"])[1]

    assert {check.passed for check in check_suite(shipped, results(best), metrics)} == {True}
    (hand_over,) = {case.reference for case in part(shipped, "unanswerable").cases}
    refused = check_suite(shipped, results(lambda case: hand_over), metrics)
    assert {check.part for check in refused if not check.passed} == set(NUM_ROWS) - {"unanswerable", "prompt_injection"}
    parroted = check_suite(shipped, results(lambda case: case.question), metrics)
    assert {check.part for check in parroted if not check.passed} == set(NUM_ROWS)


def test_rows_are_of_one_kind_in_a_file():
    """Each file of the shipped suite has rows with the same keys."""
    folder = Path(gemma_tune.__file__).parent / "evaluation" / "suites" / SHIPPED
    for path in folder.glob("*.jsonl"):
        assert len({tuple(json.loads(line)) for line in path.read_text().splitlines()}) == 1
