"""Held-out figures and answer scores by their definitions."""

import html
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_tune.evaluation import evaluate_batches, score_answers, word_f1
from gemma_tune.evaluation.html_report import coloured_difference


def test_every_token_counts_once():
    """Batches of unequal size: the mean over tokens, not over batches."""
    sums = [
        SimpleNamespace(loss_sum=6.0, weight_sum=3.0, correct_sum=3.0),
        SimpleNamespace(loss_sum=2.0, weight_sum=1.0, correct_sum=0.0),
    ]
    values = evaluate_batches(lambda index: sums[index], [0, 1])
    assert values == {"loss": 2.0, "perplexity": pytest.approx(math.e**2), "token_accuracy": 0.75, "num_tokens": 4.0}


def test_an_endless_loss_has_a_perplexity():
    values = evaluate_batches(lambda _: SimpleNamespace(loss_sum=1e6, weight_sum=1.0, correct_sum=0.0), [0])
    assert np.isfinite(values["perplexity"])


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Go to Settings.", "go to SETTINGS", 1.0),
        ("a b", "b c", 0.5),
        ("a a b", "a b b", 2 / 3),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("", "", 1.0),
    ],
)
def test_word_f1(answer, reference, f1):
    assert word_f1(answer, reference) == pytest.approx(f1)
    assert word_f1(reference, answer) == pytest.approx(f1)


def test_right_is_the_own_answer_rather_than_any_other():
    references = [
        "Tap Settings then Reset",
        "Tap Settings then Battery",
        "Call us on Monday",
        "Tap Settings then Reset",
    ]
    answers = ["Tap Settings, then Reset!", "Tap Settings then Reset", "Call", "Tap Settings then Reset"]
    scores = score_answers(answers, references)
    assert [score.is_right for score in scores] == [True, False, False, True]
    assert [score.is_exact for score in scores] == [True, False, False, True]
    assert score_answers([], []) == []


def test_a_difference_is_coloured_word_by_word():
    """Without the marked words and with the struck ones, the text is the wanted answer."""
    answer, wanted = "Hold Power for <3> seconds, then let go.", "Hold Power for 12 seconds, then let it go."
    found = coloured_difference(answer, wanted)
    assert "<3>" not in found and "<ins> &lt;3&gt;</ins><del> 12</del>" in found
    assert html.unescape(re.sub(r"<ins>.*?</ins>|</?del>", "", found)) == wanted
    assert html.unescape(re.sub(r"<del>.*?</del>|</?ins>", "", found)) == answer
    assert coloured_difference(wanted, wanted) == wanted
    assert coloured_difference("请重启您的手机", "请重启您的电脑") == "请重启您的<ins>手机</ins><del>电脑</del>"
    assert coloured_difference("Something else & more", wanted) == "<ins>Something else &amp; more</ins>"


def test_the_loss_of_each_label_is_that_of_its_batches():
    sums = [
        SimpleNamespace(loss_sum=loss, weight_sum=weight, correct_sum=0.0) for loss, weight in ((6, 2), (1, 1), (4, 4))
    ]
    values = evaluate_batches(lambda index: sums[index], [0, 1, 2], labels=["a", "b", "b"])
    assert (values["loss/a"], values["loss/b"], values["loss"]) == (3.0, 1.0, 11 / 7)
    assert not [name for name in evaluate_batches(lambda index: sums[index], [0, 1, 2]) if "/" in name]
